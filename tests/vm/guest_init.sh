#!/bin/bash
# First process of the guest. What concerns one run lies in the 9p share "run": command (a bash script), mounts (tag,
# directory, options); the exit status is left there as "status". Output goes to the virtio port "output", kernel
# messages to the serial console.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mountpoint -q /dev || mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -sfn /proc/self/fd /dev/fd
ln -sfn /proc/self/fd/0 /dev/stdin
ln -sfn /proc/self/fd/1 /dev/stdout
ln -sfn /proc/self/fd/2 /dev/stderr
hostname -F /etc/hostname
ip link set lo up
modprobe -a virtio_console virtio-rng 9pnet_virtio 9p configfs overlay
mount -t configfs configfs /sys/kernel/config

share() { mkdir -p "$3"; mount -t 9p -o "trans=virtio,version=9p2000.L,msize=1048576,$1" "$2" "$3"; }
share rw,cache=none run /run/vm || { echo "no 9p share" >/dev/console; exec /bin/busybox poweroff -n -f; }

# By its name, so that it does not matter whether udev runs.
output=/dev/console
for port in /sys/class/virtio-ports/*; do
  [ "$(cat "$port/name" 2>/dev/null)" = output ] && output=/dev/${port##*/}
done

/lib/systemd/systemd-udevd --daemon --resolve-names=never
udevadm trigger --action=add --subsystem-match=block --subsystem-match=nvme --subsystem-match=virtio-ports \
  --subsystem-match=mem --subsystem-match=misc
udevadm settle --timeout=30

while read -r tag directory options; do
  share "$options" "$tag" "$directory" || echo "cannot mount $tag on $directory" >/dev/console
done </run/vm/mounts
for card in /sys/bus/virtio/devices/*/device; do
  [ "$(cat "$card")" = 0x0001 ] && modprobe virtio_net
done

# A pipe, not the port itself: a virtio port can be opened only once, so that a script which writes to /dev/stderr fails.
mkfifo /run/output
cat /run/output >"$output" &
drain=$!
(cd /root && exec setsid --wait bash /run/vm/command </dev/null) >/run/output 2>&1
echo $? >/run/vm/status.tmp
mv /run/vm/status.tmp /run/vm/status

# What was left running (a daemon, an umount on a dead path) may hold the pipe for ever: a moment, not more.
for _ in 1 2 3 4 5 6 7 8 9 10; do
  [ -e "/proc/$drain" ] || break
  sleep 0.1
done
# Without an orderly shutdown and without a sync, which would wait for ever for a file system on a dead path. Should the
# power-off hang as well: a reset, on which QEMU ends (-no-reboot).
(sleep 5; echo b >/proc/sysrq-trigger) &
exec /bin/busybox poweroff -n -f

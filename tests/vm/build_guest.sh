#!/usr/bin/env bash
# Builds the guest of the tests in a virtual machine: a small Debian whose kernel has the real NVMe/TCP initiator
# (nvme-tcp) and target (nvmet), for QEMU without KVM.
#
#   build_guest.sh SUITE DIR EMULATOR   builds what is missing or out of date in two folders (root, Debian host, a minute)
#
# EMULATOR then holds QEMU 10 of Debian 13 with all its libraries, not installed, whatever the host has: Deno starts in
# half the time that it takes with 7.2 of Debian 12.
#
# DIR then holds what guest.ts boots:
#   vmlinux      the kernel of linux-image-amd64, unpacked: QEMU starts an ELF kernel with a PVH note as it is, which
#                saves 2.4 s of decompression under emulation. (The "cloud" kernel has no 9p.)
#   initrd.cpio  busybox and the modules that it takes to mount the root disk
#   rootfs.img   ext4 with a minimal Debian, the packages and modules below, and guest_init.sh as its first process.
#                Each run writes to a throw-away overlay over it.
#   stamp        what it was made of; versions.txt: every package with its version
#
# Packages come from the host's Debian mirror, SUITE from the same mirror when it is not the host's. Nothing is installed
# on the host.
set -euo pipefail
umask 022

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
SUITE=$1
OUT=$2
EMULATOR=$3
EMULATOR_SUITE=trixie
KERNEL_PACKAGE=linux-image-amd64
ROOT_SIZE=2G

# The storage tools that the driver runs, what lets a dynamically linked deno start, and what looks at the outcome.
PACKAGES=mount,util-linux,kmod,udev,dmsetup,fdisk,nvme-cli,e2fsprogs,xfsprogs,btrfs-progs,cryptsetup-bin
PACKAGES+=,iproute2,nftables,procps,psmisc,ca-certificates,libgcc-s1,libstdc++6,busybox-static

MODULES="nvmet nvmet-tcp nvme-tcp nvme nvme-auth tls loop configfs ext4 xfs btrfs overlay
  dm-mod dm-crypt dm-flakey dm-delay xts cbc essiv aesni-intel aes_generic sha256_generic algif_skcipher algif_hash
  crc32c_generic crc32c-intel 9p 9pnet_virtio virtio_pci virtio_blk virtio_console virtio-rng virtio_net
  inet_diag tcp_diag nf_tables nft_ct nft_reject_inet nft_limit nft_log"
BOOT_MODULES="virtio_pci virtio_blk crc32c_generic crc32c-intel ext4"

say() { printf 'guest %s: %s\n' "$SUITE" "$*" >&2; }
die() { say "$*"; exit 1; }

[[ $EUID == 0 ]] || die "root is needed to build it"
mkdir -p "$OUT" "$EMULATOR"
# Two builds at once would spoil each other's work.
exec 9>"$OUT/lock" 8>"$EMULATOR/lock"
flock 9

# shellcheck source=/dev/null
host_suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
host_sources=
for file in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
  if [[ -s $file ]]; then host_sources=$file; break; fi
done
[[ $host_sources ]] || die "no apt sources of Debian on this machine"

# sources_of SUITE DIR: the path of apt's sources of a suite, which may be written to DIR.
sources_of() {
  [[ $1 != "$host_suite" ]] || { echo "$host_sources"; return; }
  local mirror
  mirror=$(sed -nE 's/^(URIs:|deb( \[[^]]*\])?) *(https?:[^ ]+).*/\3/p' "$host_sources" | sed -n 1p)
  [[ $mirror ]] || die "no mirror in $host_sources"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $1 main" >"$2/sources.list"
  echo "$2/sources.list"
}

# ----------------------------------------------------------------------------------------------------------- emulator

unpack_emulator() {
  [[ ! -x $EMULATOR/root/usr/bin/qemu-system-x86_64 ]] || return 0
  say "unpacks the emulator in $EMULATOR"
  rm -rf --one-file-system "$EMULATOR/new" "$EMULATOR/root"
  local sources
  sources=$(sources_of "$EMULATOR_SUITE" "$EMULATOR")
  mmdebstrap --quiet --mode=root --variant=extract --include=qemu-system-x86 "$EMULATOR_SUITE" "$EMULATOR/new" "$sources" >&2
  mv "$EMULATOR/new" "$EMULATOR/root"
}
(flock 8 && unpack_emulator) &
emulator=$!

# -------------------------------------------------------------------------------------------------------------- guest

sources=$(sources_of "$SUITE" "$OUT")
if [[ $sources != "$host_sources" ]]; then
  # apt looks at that suite alone, through a configuration of its own.
  mkdir -p "$OUT/apt/lists/partial"
  printf '%s "%s";\n' Dir::Etc::sourcelist "$sources" Dir::Etc::sourceparts /dev/null \
    Dir::State::lists "$OUT/apt/lists" >"$OUT/apt/apt.conf"
  export APT_CONFIG=$OUT/apt/apt.conf
  apt-get -qq update
fi

kernel=$(apt-cache depends --important "$KERNEL_PACKAGE" | awk '!n && /Depends: linux-image-[0-9]/ { print $2; n = 1 }')
[[ $kernel ]] || die "$KERNEL_PACKAGE is not to be had, does apt-get update work?"
stamp=$({
  cat "${BASH_SOURCE[0]}" "$here/guest_init.sh" "$sources"
  apt-cache policy "$kernel" nvme-cli | grep Candidate
} | sha256sum | cut -d' ' -f1)
if [[ -s $OUT/rootfs.img && -s $OUT/initrd.cpio && -s $OUT/vmlinux && $(cat "$OUT/stamp" 2>/dev/null) == "$stamp" ]]; then
  wait "$emulator" || die "no emulator"
  exit 0
fi

say "builds it in $OUT"
rm -f "$OUT/stamp"
work=$(mktemp -d "$OUT/work.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT

# ------------------------------------------------------------------------------------------------------------- kernel

mkdir "$work/deb" "$work/kernel"
chmod 777 "$work/deb" # apt's sandbox user writes here
(cd "$work/deb" && apt-get -qq download "$kernel" 2>/dev/null) || die "cannot download $kernel"
dpkg -x "$work"/deb/*.deb "$work/kernel"
# Since trixie the modules lie below /usr/lib.
[[ -e $work/kernel/lib ]] || ln -s usr/lib "$work/kernel/lib"
release=$(ls "$work/kernel/lib/modules")

# Documentation/arch/x86/boot.rst: 0x1f1 u8 setup_sects, the protected-mode part begins at (setup_sects + 1) * 512;
# 0x248 u32 payload_offset from there; 0x24c u32 payload_length, whose last 4 bytes are the unpacked size.
image=$work/kernel/boot/vmlinuz-$release
field() { od -An -v -j "$1" -N "$2" -t "u$2" "$image" | tr -d ' '; }
start=$((($(field 0x1f1 1) + 1) * 512 + $(field 0x248 4)))
length=$(($(field 0x24c 4) - 4))
{ tail -c +$((start + 1)) "$image" || true; } | head -c "$length" >"$work/payload"
case $(od -An -v -N4 -t x1 "$work/payload" | tr -d ' ') in
  fd377a58) xz -dc "$work/payload" ;;
  02214c18 | 184c2102) lz4 -dcq "$work/payload" ;;
  28b52ffd) zstd -dcq "$work/payload" ;;
  1f8b*) gzip -dc "$work/payload" ;;
  *) die "unknown compression of $image" ;;
esac >"$work/vmlinux"
[[ $(head -c4 "$work/vmlinux" | tr -d '\177') == ELF ]] || die "no ELF kernel inside $image"
depmod -b "$work/kernel" "$release"

# The files of these modules and of all that they depend on, in load order. A name that this kernel has not is left out:
# releases differ in how they cut their modules.
module_files() {
  for module; do
    modprobe -d "$work/kernel" -S "$release" --show-depends "$module" 2>/dev/null || true
  done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'
}

# -------------------------------------------------------------------------------------------------------- root and boot

root=$work/root
mmdebstrap --quiet --mode=root --variant=essential --include="$PACKAGES" \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
  "$SUITE" "$root" "$sources" >&2
# One host identity for all images would hide that the driver always gives its own.
rm -f "$root/etc/nvme/hostnqn" "$root/etc/nvme/hostid"
# Without systemd these rules would only start failing systemctl commands.
ln -sf /dev/null "$root/etc/udev/rules.d/70-nvmf-autoconnect.rules"
echo guest >"$root/etc/hostname"
printf '127.0.0.1 localhost guest\n' >"$root/etc/hosts"
install -m 755 "$here/guest_init.sh" "$root/sbin/guest-init"
# shellcheck disable=SC2086
module_files $MODULES | while read -r file; do
  install -D -m644 "$file" "$root/lib/modules/$release/${file#"$work/kernel/lib/modules/$release/"}"
done
cp "$work/kernel/lib/modules/$release"/modules.{builtin,builtin.modinfo,order} "$root/lib/modules/$release/"
depmod -b "$root" "$release" 2>/dev/null
for needed in nvmet-tcp nvme-tcp 9pnet_virtio dm-flakey; do
  [[ $(find "$root/lib/modules/" -name "$needed.ko*") ]] || die "$kernel has no module $needed"
done

truncate -s "$ROOT_SIZE" "$work/rootfs.img"
mkfs.ext4 -q -F -L guest -m 0 -O ^has_journal -E lazy_itable_init=1,nodiscard -d "$root" "$work/rootfs.img"

boot=$work/boot
mkdir -p "$boot"/{bin,dev,lib,proc,sys,newroot}
cp "$root/bin/busybox" "$boot/bin/busybox"
# shellcheck disable=SC2086
module_files $BOOT_MODULES | while read -r file; do
  cp "$file" "$boot/lib/"
  echo "/lib/${file##*/}" >>"$boot/modules"
done
cat >"$boot/init" <<'INIT'
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs devtmpfs /dev
while read -r m; do insmod "$m"; done </modules
i=0
until [ -b /dev/vda ] || [ $i -ge 100 ]; do sleep 0.1; i=$((i + 1)); done
mount -t ext4 -o rw,noatime /dev/vda /newroot || { echo "no root disk"; poweroff -f; }
mount -o move /dev /newroot/dev
umount /proc
exec switch_root /newroot /sbin/guest-init
INIT
chmod 755 "$boot/init"
(cd "$boot" && find . -print0 | cpio --null -o -H newc --quiet) >"$work/initrd.cpio"

mv "$work/vmlinux" "$work/rootfs.img" "$work/initrd.cpio" "$OUT/"
{
  echo "kernel $kernel $(dpkg-deb -f "$work"/deb/*.deb Version)"
  chroot "$root" dpkg-query -W
} >"$OUT/versions.txt"
echo "$stamp" >"$OUT/stamp"
wait "$emulator" || die "no emulator"
say "$(head -n 1 "$OUT/versions.txt"), $(grep '^nvme-cli' "$OUT/versions.txt" | tr '\t' ' ')"

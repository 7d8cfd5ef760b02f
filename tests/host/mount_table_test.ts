import assert from "node:assert/strict";
import { mountsElsewhere, parseMountTable } from "../../lib/host/mount_table.ts";

// ------------------------------------------------------------------------------------------------------------- parsers

Deno.test("parseMountTable reads escapes, propagation fields and stacked mounts", () => {
  const text = [
    "22 1 254:0 / / rw,relatime - ext4 /dev/vda1 rw,errors=remount-ro",
    "40 22 259:1 / /var/lib/a\\040b\\011c\\134d\\012e\\043 rw,nosuid shared:1 master:2 propagate_from:3 - ext4 /dev/nvme0n1 rw",
    "41 22 259:1 /sub\\040dir /var/lib/x ro unbindable - xfs /dev/nvme0n1 rw,attr2",
    "42 41 0:5 / /var/lib/x rw - tmpfs none rw",
    "43 22 0:6 /nvme0n1//deleted /block rw - devtmpfs udev rw",
    "",
    "broken line",
  ].join("\n");

  const table = parseMountTable(text);

  assert.deepEqual(table.map((mount) => mount.path), [
    "/",
    "/var/lib/a b\tc\\d\ne#",
    "/var/lib/x",
    "/var/lib/x",
    "/block",
  ]);
  assert.deepEqual(table[1], {
    number: "259:1",
    root: "/",
    path: "/var/lib/a b\tc\\d\ne#",
    place: "254:0 /var/lib/a b\tc\\d\ne#",
    options: ["rw", "nosuid"],
    propagation: ["shared:1", "master:2", "propagate_from:3"],
    fsType: "ext4",
    source: "/dev/nvme0n1",
    superOptions: ["rw"],
  });
  assert.equal(table[2]?.root, "/sub dir");
  assert.equal(table[4]?.root, "/nvme0n1//deleted");
});

Deno.test("mountsElsewhere counts what is visible at two paths as one mount", () => {
  // Kubelet's directory /d/kubelet is bound to itself and to /k; the mounts below it propagated from one to the other.
  const table = parseMountTable([
    "22 1 254:0 / / rw - ext4 /dev/vda1 rw",
    "30 22 254:0 /d/kubelet /d/kubelet rw shared:1 - ext4 /dev/vda1 rw",
    "31 22 254:0 /d/kubelet /k rw shared:1 - ext4 /dev/vda1 rw",
    "40 30 259:1 / /d/kubelet/staging rw shared:2 - ext4 /dev/nvme0n1 rw",
    "41 31 259:1 / /k/staging rw shared:2 - ext4 /dev/nvme0n1 rw",
    "50 30 259:1 / /d/kubelet/pod rw shared:2 - ext4 /dev/nvme0n1 rw",
    "51 31 259:1 / /k/pod rw shared:2 - ext4 /dev/nvme0n1 rw",
    "60 22 259:1 / /pod rw - ext4 /dev/nvme0n1 rw",
  ].join("\n"));
  const mounts = table.filter(({ number }) => number === "259:1");
  const paths = (...given: (string | undefined)[]) => mountsElsewhere(table, mounts, ...given).map(({ path }) => path);

  assert.deepEqual(paths("/k/staging", "/k/pod"), ["/pod"]);
  assert.deepEqual(paths("/d/kubelet/staging", undefined), ["/d/kubelet/pod", "/k/pod", "/pod"]);
  assert.deepEqual(paths("/pod"), mounts.slice(0, 4).map(({ path }) => path));
});

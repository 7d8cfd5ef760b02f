import assert from "node:assert/strict";
import { StatusError } from "../../../lib/error.ts";
import { mountFlags, parseMountFlags } from "../../../lib/host/filesystem/mount_flags.ts";

Deno.test("parseMountFlags splits options, keeps quoted commas, and removes ro", () => {
  const flags = ["noatime,ro", 'context="system_u:object_r:c0,c1"', "defaults", "user_xattr,grpid,data=ordered"];

  assert.deepEqual(parseMountFlags(flags), {
    readOnly: true,
    rest: ["noatime", 'context="system_u:object_r:c0,c1"', "user_xattr", "grpid", "data=ordered"],
  });
});

for (
  const [flags, readOnly, rest] of [
    [["noexec", "exec"], false, ["exec"]],
    [["exec,nosuid", "noexec"], false, ["nosuid", "noexec"]],
    [["ro", "rw"], false, []],
    [["rw,ro"], true, []],
    [["noexec", "defaults"], false, ["noexec"]],
    [["noatime", "relatime"], false, ["relatime"]],
    [["strictatime,noatime"], false, ["noatime"]],
    [["noatime", "atime", "nodev", "dev"], false, ["dev"]],
    [["noatime,norelatime"], false, ["noatime"]],
    [["strictatime,nostrictatime,sync,async,nodiratime,diratime"], false, ["async", "diratime"]],
  ] as const
) {
  Deno.test(`parseMountFlags of ${flags.join(" ")} keeps what counts`, () => {
    assert.deepEqual(parseMountFlags(flags), { readOnly, rest });
  });
}

for (
  const flag of [
    "compress=zstd:3",
    "discard=async",
    "logbsize=256k",
    "data_err=abort",
    "errors=remount-ro",
    "barrier=0",
    "dax",
    "init_itable",
    'fscontext="system_u:object_r:container_file_t:s0:c1,c2"',
    "context=system_u:object_r:container_file_t:s0",
    "prjquota",
    "nouuid",
    "inode64",
    "_netdev",
  ]
) {
  Deno.test(`parseMountFlags takes ${flag}`, () => {
    assert.deepEqual(parseMountFlags([flag]), { readOnly: false, rest: [flag] });
  });
}

Deno.test("docs/configuration.md lists the mount flags that are taken, and no others", async () => {
  const text = await Deno.readTextFile(new URL("../../../docs/configuration.md", import.meta.url));
  const section = /## Mount flags\n(.*?)\n## /s.exec(text)?.[1] ?? "";
  for (const [owner, options] of Object.entries(mountFlags)) {
    const row = new RegExp(`^\\| ${owner} \\| (.*) \\|$`, "m").exec(section)?.[1] ?? "";
    const listed = [...row.matchAll(/`([^`]+)`/g)].map(([, name = ""]) => name.replace(/=.*$/, ""));
    assert.deepEqual(listed, Object.keys(options), owner);
  }
});

for (
  const flag of [
    "errors=panic",
    "fatal_errors=panic",
    "abort",
    "usebackuproot",
    "recovery",
    "degraded",
    "subvol=/x",
    "sb=8193",
    "test_dummy_encryption",
    "noatime=1",
    "errors",
    "errors=",
    "data=writeback,errors=panic",
    'context="a\nb"',
    "context=$(reboot)",
    "bogus",
    "bind",
    "remount",
    "loop",
    "loop=/dev/loop1",
    "X-mount.mkdir",
    "x-systemd.automount",
    "offset=1",
    "noload",
    "rshared",
    "noatime,move",
    "bind=",
    "remount=",
    "rshared=",
    "noload=1",
    "ro=fs",
    "rw=recursive",
    'loop="/dev/loop1"',
    "x-mount.mkdir\n",
  ]
) {
  Deno.test(`parseMountFlags refuses ${flag}`, () => {
    assert.throws(() => parseMountFlags([flag]), (error) => {
      assert(error instanceof StatusError);
      assert.deepEqual([error.code, /this driver does not allow it/.test(error.message)], ["INVALID_ARGUMENT", true]);
      return true;
    });
  });
}

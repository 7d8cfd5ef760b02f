/** Whatever a tool prints around it, an error message has the reason. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { reasonOf } from "../../lib/host/command_reason.ts";
import { mountOptions, withDisk } from "../support/disk.ts";
import { needs } from "../support/needs.ts";
import { rejects } from "../support/node_calls.ts";

const ignore = !needs("root", "loop", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "cryptsetup");

for (
  const [fsType, sizeMib, mkfsOptions, reason] of [
    ["xfs", 200, "", /mkfs.xfs failed with exit 1 \(Filesystem must be larger than 300MB\.\)$/],
    ["xfs", 320, "-b size=123", /\(Invalid value 123 for -b size option\. Value is too small\.\)$/],
    ["xfs", 320, "-l size=1g", /\(log size [^)]* too large[^)]*\)$/],
    ["btrfs", 40, "", /\(ERROR: .* too small to make a usable filesystem.*\)$/],
    ["ext4", 64, "-I 100", /\(mkfs.ext4: invalid inode size 100 \(min 128.max 1024\)\)$/],
  ] as const
) {
  Deno.test({
    name: `mkfs.${fsType} ${mkfsOptions} that refuses ${sizeMib} MiB is quoted with its reason, not with its usage`,
    ignore,
    fn: () =>
      withDisk(sizeMib, async ({ mount }) => {
        await rejects(mount({ ...mountOptions, fsType, mkfsOptions }), "FAILED_PRECONDITION", reason);
      }),
  });
}

for (
  const [args, reason] of [
    [["mkfs.xfs", "-q", "-m", "bogus=1", "FILE"], /^unknown option -m bogus=1$/],
    [["mkfs.btrfs", "--bogus", "FILE"], /^\S*mkfs\.btrfs: unrecognized option '--bogus'$/],
    [["mkfs.ext4", "-Z", "FILE"], /invalid option -- 'Z'/],
    [["e2fsck", "-Z", "FILE"], /^\S*e2fsck: invalid option -- 'Z'$/],
    [["cryptsetup", "open", "--bogus", "FILE"], /^--bogus: unknown option$/],
    [["cryptsetup", "luksFormat"], /^\S*cryptsetup: luksFormat: requires <device> .* as arguments$/],
  ] as const
) {
  Deno.test({
    name: `reasonOf leaves the usage out of what ${args.join(" ")} says`,
    ignore,
    async fn() {
      const directory = await Deno.makeTempDir();
      try {
        const file = join(directory, "file");
        await Deno.writeFile(file, new Uint8Array());
        await Deno.truncate(file, 320 << 20);
        const [program, ...rest] = args.map((arg) => arg === "FILE" ? file : arg);
        const { code, stdout, stderr } = await new Deno.Command(program as string, {
          args: rest,
          env: { LC_ALL: "C" },
        }).output();
        const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);

        assert.match(reasonOf(program as string, { code, stdout: text(stdout), stderr: text(stderr) }), reason);
      } finally {
        await Deno.remove(directory, { recursive: true });
      }
    },
  });
}

Deno.test("reasonOf keeps both ends of a long text, and a usage that is all there is", () => {
  const long = `first reason ${"progress ".repeat(200)} last reason`;
  const reason = reasonOf("/sbin/tool", { code: 1, stdout: "", stderr: long });

  assert.match(reason, /^first reason progress .* … .* last reason$/);
  assert(reason.length < 420);
  assert.equal(reasonOf("tool", { code: 1, stdout: "Usage: tool FILE\n", stderr: "" }), "Usage: tool FILE");
  assert.equal(reasonOf("tool", { code: 1, stdout: "done 5 %\n", stderr: "no space\n" }), "no space; done 5 %");
  assert.equal(reasonOf("tool", { code: 1, stdout: " ", stderr: "\n" }), "it says nothing");
});

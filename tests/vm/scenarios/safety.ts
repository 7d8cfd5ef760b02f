/** Promise 1: whatever a device is like, nothing is formatted that was not proved blank, and no byte on it changes. */
import assert, { rejects } from "node:assert/strict";
import { createHash } from "node:crypto";
import { type Check, scenario as of } from "../scenario.ts";
import { assertCallFails, devicesWith, type GuestTestbed, read, run, tool, until, type Volume } from "../testbed.ts";

const mib = 1 << 20;

/** Shows whether a volume was written to: its file's time, its blocks, and what is at both ends. */
function fingerprint(path: string): string {
  const { mtime, blocks, size } = Deno.statSync(path);
  using file = Deno.openSync(path);
  const hash = createHash("sha256");
  const bytes = new Uint8Array(4 * mib);
  for (const at of [0, size - bytes.length]) {
    file.seekSync(at, Deno.SeekMode.Start);
    hash.update(bytes.subarray(0, file.readSync(bytes) ?? 0));
  }
  return `${mtime?.getTime()} ${blocks} ${size} ${hash.digest("hex")}`;
}

interface Case {
  readonly what: string;
  /** Fills the volume's file before any host has seen it. */
  readonly prepare: (file: string, testbed: GuestTestbed) => Promise<unknown>;
  readonly code: "FAILED_PRECONDITION" | "UNAVAILABLE";
  readonly message: RegExp;
}

const contents: readonly Case[] = [
  {
    what: "another file system",
    prepare: (file) => tool("mkfs.xfs", "-q", file),
    code: "FAILED_PRECONDITION",
    message: /holds xfs, the request wants ext4; it is never formatted again/,
  },
  {
    what: "a partition table",
    async prepare(file) {
      // A GPT lies where the sectors of the disk that it was made for say: the namespace has those of 4 KiB.
      const loop = await tool("losetup", "-f", "--show", "-b", "4096", file);
      await tool("sh", "-c", `echo ,100M | sfdisk -q --label gpt ${loop}`);
      await tool("losetup", "-d", loop);
    },
    code: "FAILED_PRECONDITION",
    message: /holds a partition table \(gpt\), it is left alone/,
  },
  {
    what: "a LUKS header",
    prepare: (file, testbed) => {
      const key = `${testbed.home}/key`;
      Deno.writeTextFileSync(key, "not a secret");
      return tool(
        "cryptsetup",
        ...["luksFormat", "--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"],
        ...["--key-file", key, file],
      );
    },
    code: "FAILED_PRECONDITION",
    message: /holds crypto_LUKS, which is none of ext4, xfs, btrfs; it is left alone/,
  },
  {
    what: "bytes in its last sector only",
    prepare: (file) =>
      tool("sh", "-c", `printf data | dd of=${file} bs=1 seek=${(1 << 30) - 512} conv=notrunc status=none`),
    code: "FAILED_PRECONDITION",
    message: /is not blank and holds no file system: there is data at byte 1073741312/,
  },
];

/** Puts another device behind a namespace, as an array with broken drives would. */
async function behind(testbed: GuestTestbed, volume: Volume, device: string): Promise<void> {
  const directory = testbed.targetOf(volume.uuid);
  await Deno.writeTextFile(`${directory}/enable`, "0");
  await until("the device is away", () => devicesWith(volume.uuid).length === 0);
  await Deno.writeTextFile(`${directory}/device_path`, device);
  await Deno.writeTextFile(`${directory}/enable`, "1");
}

const loopOf = (file: string) => tool("losetup", "-n", "-O", "NAME", "-j", file);

const broken = [
  ["cannot be read anywhere", (sectors: number) => `0 ${sectors} error`],
  [
    "cannot be read in its last MiB",
    (sectors: number, loop: string) => `0 ${sectors - 2048} linear ${loop} 0\n${sectors - 2048} 2048 error`,
  ],
  [
    "cannot be read after its first 8 MiB",
    (sectors: number, loop: string) => `0 16384 linear ${loop} 0\n16384 ${sectors - 16384} error`,
  ],
] as const;

export const scenario = of([
  ...contents.map(({ what, prepare, code, message }): Check => ({
    name: `promise 1: a volume with ${what} is refused, and no byte on it changes`,
    async run(testbed) {
      const volume = await testbed.volume({}, false);
      const file = testbed.contentOf(volume.uuid);
      await prepare(file, testbed);
      const before = fingerprint(file);
      await volume.grant();

      await assertCallFails(() => volume.stage(), code, message);
      await assertCallFails(() => volume.stage(), code, message);

      assert.equal(fingerprint(file), before);
      await volume.end();
      await testbed.nothingLeft();
    },
  })),
  ...broken.map(([what, table]): Check => ({
    name: `promise 1: a volume that ${what} is refused, and not formatted when it can be read again`,
    async run(testbed) {
      const volume = await testbed.volume();
      await testbed.processes.ask("GET", "/settled");
      const file = testbed.contentOf(volume.uuid);
      const loop = await loopOf(file);
      const sectors = (1 << 30) / 512;
      const rows = table(sectors, loop);
      const child = new Deno.Command("dmsetup", { args: ["create", "bad"], stdin: "piped" }).spawn();
      const writer = child.stdin.getWriter();
      await writer.write(new TextEncoder().encode(`${rows}\n`));
      await writer.close();
      assert.equal((await child.status).code, 0);
      const before = fingerprint(file);
      await behind(testbed, volume, "/dev/mapper/bad");

      await assertCallFails(() => volume.stage(), "UNAVAILABLE", /cannot be read at byte|blkid cannot tell/);
      assert.equal(fingerprint(file), before);

      await behind(testbed, volume, loop);
      await tool("dmsetup", "remove", "bad");
      await volume.stage();
      await volume.end();
      await testbed.nothingLeft();
    },
  })),
  {
    name: "promise 1: a volume that has shrunk is refused, and mounts again with its size",
    async run(testbed) {
      const volume = await testbed.volume();
      await volume.stage();
      await Deno.writeTextFile(`${volume.staging}/file`, "there");
      const other = await testbed.volume({ use: "block" });
      await other.stage();
      await volume.unstage();
      const file = testbed.contentOf(volume.uuid);
      const loop = await loopOf(file);
      const resize = async (bytes: number) => {
        await Deno.truncate(file, bytes);
        await tool("losetup", "-c", loop);
        await Deno.writeTextFile(`${testbed.targetOf(volume.uuid)}/revalidate_size`, "1");
        await until(
          "the host sees the size",
          () => read(`/sys/class/block/${volume.device.slice(5)}/size`) === String(bytes / 512),
        );
      };
      await resize(512 * mib);
      const before = fingerprint(file);

      await assertCallFails(
        () => volume.stage(),
        "FAILED_PRECONDITION",
        /has 1073741824 bytes, but the device only 536870912: it has shrunk/,
      );

      assert.equal(fingerprint(file), before);
      await resize(1 << 30);
      await run("e2fsck", "-fy", volume.device);
      await volume.stage();
      await volume.end();
      await other.end();
    },
  },
  {
    name: "promise 1: a namespace that is disabled, or has no size, is waited for and then named, not formatted",
    async run(testbed) {
      const other = await testbed.volume({ use: "block" });
      await other.stage();
      const volume = await testbed.volume();
      await testbed.processes.ask("GET", "/settled");
      const directory = testbed.targetOf(volume.uuid);
      await Deno.writeTextFile(`${directory}/enable`, "0");
      await until("the device is away", () => devicesWith(volume.uuid).length === 0);

      // What the node says at the deadline may come too late for the caller on a busy machine; its log has it.
      const said = () =>
        testbed.logOf("node").split("\n").filter((line) =>
          line.includes(volume.uuid) && /Cannot find a block device .* is live/.test(line)
        );
      await rejects(volume.stage(6));
      await until("the node has said why", () => said().length === 1);
      const empty = `${testbed.home}/empty`;
      Deno.writeTextFileSync(empty, "");
      const loop = await tool("losetup", "-f", "--show", empty);
      await Deno.writeTextFile(`${directory}/device_path`, loop);
      await Deno.writeTextFile(`${directory}/enable`, "1").catch(() => {});
      await rejects(volume.stage(6));
      await until("the node has said why", () => said().length === 2);

      await tool("sh", "-c", `echo 0 > ${directory}/enable`);
      await tool("losetup", "-d", loop);
      await Deno.writeTextFile(`${directory}/device_path`, await loopOf(testbed.contentOf(volume.uuid)));
      await Deno.writeTextFile(`${directory}/enable`, "1");
      await volume.stage();
      await volume.end();
      await other.end();
      await testbed.nothingLeft();
    },
  },
]);

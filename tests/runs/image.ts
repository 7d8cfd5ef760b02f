/**
 * `deno task test:image`: makes the root file systems of both images and looks at what is in them and what is not, runs
 * every tool in them, and takes volumes through their lives with the program in them. Needs root, Debian's apt and loop
 * devices. It works in a mount namespace of its own, so nothing stays mounted.
 *
 *   --debs DIRECTORY   keep the packages there, or take those that are
 *   --keep             leave the directory
 *
 * Exit status: 0 all passed, 1 some failed, 2 something is missing.
 */
import assert from "node:assert/strict";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import { controllerPermissions } from "../../k8s/image/permissions.ts";
import { type ImageKind, imageKinds, makeRoot, nodeTools, unpackPackages } from "../../k8s/image/root.ts";
import { ServiceProcess } from "../../lib/demo/process.ts";
import { Testbed } from "../../lib/demo/testbed.ts";
import { Channel } from "../../lib/grpc/client.ts";
import { Controller, Identity, Node, VolumeCapability_AccessMode_Mode as Mode } from "../../proto/gen/csi_pb.ts";
import { enter, type Entered } from "../support/image_root.ts";
import { needs } from "../support/needs.ts";

const { values: options } = parseArgs({
  args: Deno.args,
  options: { debs: { type: "string" }, keep: { type: "boolean", default: false } },
});
if (!needs("root", "loop", "apt-get", "dpkg-deb", "unshare")) Deno.exit(2);
const repository = fileURLToPath(new URL("../../", import.meta.url));
const gib = 1n << 30n;

interface Finished {
  readonly code: number;
  readonly said: string;
}

async function run(words: readonly string[]): Promise<Finished> {
  const [program = "", ...args] = words;
  const { code, stdout, stderr } = await new Deno.Command(program, {
    args,
    // What containers are given.
    env: { PATH: "/usr/sbin:/usr/bin:/sbin:/bin", LC_ALL: "C" },
  }).output();
  return { code, said: new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr) };
}

async function must(...words: readonly string[]): Promise<string> {
  const { code, said } = await run(words);
  assert.equal(code, 0, `${words.join(" ")}: exit ${code}\n${said}`);
  return said;
}

/** Every file below a directory, as it is seen from there. */
function filesBelow(root: string, path = "/"): readonly string[] {
  return [...Deno.readDirSync(join(root, path))].flatMap(({ name, isDirectory }) =>
    isDirectory ? filesBelow(root, join(path, name)) : [join(path, name)]
  );
}

function isElf(path: string): boolean {
  using file = Deno.openSync(path);
  const magic = new Uint8Array(4);
  file.readSync(magic);
  return new TextDecoder().decode(magic) === "\x7fELF";
}

let passed = 0;
let failed = 0;
async function check(name: string, body: () => Promise<void>): Promise<void> {
  const started = performance.now();
  try {
    await body();
    passed++;
    console.log(`ok ${name} (${((performance.now() - started) / 1000).toFixed(1)} s)`);
  } catch (error) {
    failed++;
    console.log(`FAILED ${name}\n${error instanceof Error ? error.stack : error}`);
  }
}

/** How each tool tells that it has started, and its exit status then. */
const versionOf: Readonly<Record<string, readonly [args: readonly string[], code?: number]>> = {
  "nvme": [["version"]],
  "mkfs.ext4": [["-V"]],
  "e2fsck": [["-V"]],
  // It has no option for that.
  "resize2fs": [[], 1],
  "mkfs.xfs": [["-V"]],
  "xfs_growfs": [["-V"]],
  "xfs_logprint": [["-V"]],
};

async function lookAt(kind: ImageKind, image: string, entered: Entered): Promise<void> {
  const all = filesBelow(image);
  const programs = all.filter((path) => /^\/usr\/s?bin\//.test(path));

  await check(`${kind}: only the tools of the list are programs, none a shell or an interpreter`, () => {
    const expected = kind === "node" ? [...Object.values(nodeTools).flat(), "mke2fs"] : [];
    assert.deepEqual(programs.map((path) => path.replace(/.*\//, "")).toSorted(), expected.toSorted());
    const scripts = all.filter((path) => {
      const { isFile, mode } = Deno.lstatSync(join(image, path));
      return isFile && ((mode ?? 0) & 0o111) !== 0 && !isElf(join(image, path));
    });
    assert.deepEqual(scripts, []);
    return Promise.resolve();
  });

  await check(`${kind}: nothing is setuid, setgid or writable by every user, except /tmp`, async () => {
    const found = await must("find", image, "-perm", "/7002", "!", "-type", "l");
    assert.deepEqual(found.trim().split("\n"), [join(image, "tmp")]);
  });

  await check(`${kind}: every library that a program or library needs is there`, async () => {
    const elves = all.filter((path) => Deno.lstatSync(join(image, path)).isFile && isElf(join(image, path)));
    const loader = elves.find((path) => /\/ld-linux[^/]*$/.test(path)) ?? "";
    assert(elves.length > 6);
    for (const path of elves.filter((path) => path !== loader)) {
      assert.doesNotMatch(await must(...entered.words, loader, "--list", path), /not found/, path);
    }
    // What the executable itself is linked with; this Deno stands for it.
    assert.doesNotMatch(await must(...entered.words, loader, "--list", "/deno/deno"), /not found/);
  });

  await check(`${kind}: each package is recorded with its licence`, () => {
    const names = all.filter((path) => path.startsWith("/var/lib/dpkg/status.d/")).map((path) =>
      path.replace(/.*\//, "")
    );
    assert(names.includes("libc6"));
    for (const name of names) assert(all.includes(`/usr/share/doc/${name}/copyright`), name);
    return Promise.resolve();
  });
}

async function runTools(entered: Entered, home: string): Promise<void> {
  const { words } = entered;
  for (const name of Object.values(nodeTools).flat()) {
    await check(`node: ${name} runs`, async () => {
      const [args, code = 0] = versionOf[name] ?? [["--version"]];
      const result = await run([...words, name, ...args]);
      assert.equal(result.code, code, result.said);
      assert.match(result.said, /\d+\.\d+/);
    });
  }

  await check("node: the tools make file systems that this machine's tools know", async () => {
    for (const [index, fs] of ["ext4", "xfs", "btrfs"].entries()) {
      const file = join(home, `${fs}.img`);
      await Deno.writeFile(file, new Uint8Array());
      await Deno.truncate(file, Number(gib));
      await must(...words, `mkfs.${fs}`, file);
      assert.equal((await must("blkid", "-p", "-s", "TYPE", "-o", "value", file)).trim(), fs, `${index}`);
    }
  });

  await check("node: new ext4 has no feature that Linux 4.18 cannot mount", async () => {
    const listed = await must(...words, "e2fsck", "-f", "-n", join(home, "ext4.img"));
    assert.match(listed, /Pass 5/);
    const features = await must("dumpe2fs", "-h", join(home, "ext4.img"));
    assert.doesNotMatch(features, /orphan_file|metadata_csum_seed/);
  });

  await check("node: cryptsetup's argon2 has the library that its threads load by themselves", async () => {
    const [file, key] = [join(home, "luks.img"), join(home, "key")];
    await Deno.writeFile(file, new Uint8Array());
    await Deno.truncate(file, 64 << 20);
    await Deno.writeTextFile(key, "passphrase");
    const pbkdf = ["--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "32768"];
    await must(...words, "cryptsetup", "luksFormat", "-q", "--type", "luks2", ...pbkdf, "--key-file", key, file);
    await must(...words, "cryptsetup", "open", "--test-passphrase", "--key-file", key, file);
  });

  await check("node: names resolve, from /etc/hosts and by the library alone", async () => {
    assert.match(await must(...words, "getent", "ahosts", "127.0.0.1"), /^127\.0\.0\.1/);
  });
}

/** Volumes with every file system, on loop devices, with controller and node in the image. */
async function liveIn(entered: Entered, home: string, program: readonly string[]): Promise<void> {
  const testbed = new Testbed(home, [...entered.words, ...program], {
    simulator: [Deno.execPath(), "run", "-A", join(home, "js/main.js")],
  });
  const signal = AbortSignal.timeout(120_000);
  const call = async <I extends DescMessage, O extends DescMessage>(
    channel: Channel,
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
  ): Promise<MessageShape<O>> => await channel.call(method, request, { signal });
  try {
    await check("node: controller and node start in the image", async () => {
      await testbed.startSimulator("loop", signal);
      await Promise.all([testbed.startController(signal), testbed.startNode("image.node", signal)]);
    });
    for (const fsType of ["ext4", "xfs", "btrfs"]) {
      await check(
        `node: a volume with ${fsType} is staged, published, grown and taken away by the image's tools`,
        async () => {
          const volumeCapability = {
            accessType: { case: "mount" as const, value: { fsType } },
            accessMode: { mode: Mode.SINGLE_NODE_WRITER },
          };
          const { secrets, controller, node } = testbed;
          const { volume } = await call(controller, Controller.method.createVolume, {
            name: `pvc-${fsType}`,
            capacityRange: { requiredBytes: gib },
            volumeCapabilities: [volumeCapability],
            parameters: testbed.parameters,
            secrets,
          });
          const volumeId = volume?.volumeId ?? "";
          const nodeId = "image.node";
          const publish = { volumeId, nodeId, volumeCapability, secrets };
          const { publishContext } = await call(controller, Controller.method.controllerPublishVolume, publish);
          const [stagingTargetPath, targetPath] = [join(home, `staging-${fsType}`), join(home, `target-${fsType}`)];
          await Deno.mkdir(stagingTargetPath);
          const request = { volumeId, publishContext, stagingTargetPath, volumeCapability };
          for (let time = 0; time < 2; time++) {
            await call(node, Node.method.nodeStageVolume, request);
            await call(node, Node.method.nodePublishVolume, { ...request, targetPath });
          }
          // Seen from outside of the image.
          await Deno.writeTextFile(join(targetPath, "file"), fsType);
          const capacityRange = { requiredBytes: 2n * gib };
          const grow = async () =>
            await call(controller, Controller.method.controllerExpandVolume, { volumeId, capacityRange, secrets });
          if (fsType !== "ext4") {
            await grow();
            const expand = { volumeId, volumePath: targetPath, capacityRange, volumeCapability };
            assert.equal((await call(node, Node.method.nodeExpandVolume, expand)).capacityBytes, 2n * gib);
          }
          await call(node, Node.method.nodeUnpublishVolume, { volumeId, targetPath });
          await call(node, Node.method.nodeUnstageVolume, { volumeId, stagingTargetPath });
          // Mounted, ext4 grows with CAP_SYS_RESOURCE only, which this machine may not have.
          if (fsType === "ext4") await grow();
          await call(node, Node.method.nodeStageVolume, request);
          assert.equal(await Deno.readTextFile(join(stagingTargetPath, "file")), fsType);
          const { usage } = await call(node, Node.method.nodeGetVolumeStats, {
            volumeId,
            volumePath: stagingTargetPath,
          });
          assert(Number(usage[0]?.total) > 1.8 * Number(gib), String(usage[0]?.total));
          await call(node, Node.method.nodeUnstageVolume, { volumeId, stagingTargetPath });
          await call(controller, Controller.method.controllerUnpublishVolume, { volumeId, nodeId, secrets });
          await call(controller, Controller.method.deleteVolume, { volumeId, secrets });
        },
      );
    }
    await check("node: nothing is left, and all end with status 0", async () => {
      assert.deepEqual(Object.values(await testbed.clusterWhenIdle(signal)).flat(), []);
      assert.deepEqual((await testbed.stopAll()).map(({ exit }) => exit), ["exit 0", "exit 0", "exit 0"]);
    });
  } finally {
    for (const { done, what } of await testbed.cleanUp(true)) console.log(`${done ? "had to" : "could not"}: ${what}`);
  }
}

/** The controller with the user, the permissions and the paths of its image. */
async function controlIn(entered: Entered, home: string): Promise<void> {
  await check("controller: serves CSI as user 65532 with a read-only root and its own permissions", async () => {
    const command = ["/deno/deno", "run", "--no-code-cache", ...controllerPermissions, "/js/main.js", "controller"];
    const log = join(home, "in-its-image.log");
    // The volume of the pod, which belongs to the pod's group.
    const sockets = join(home, "pluginproxy");
    await Deno.mkdir(sockets);
    await Deno.chown(sockets, 65532, 65532);
    await must("mount", "--bind", sockets, join(entered.root, "var/lib/csi/sockets"));
    const socket = join(sockets, "csi.sock");
    const env = { CSI_ENDPOINT: "unix:///var/lib/csi/sockets/csi.sock", DENO_DIR: "/run/deno" };
    const running = new ServiceProcess("controller", [...entered.words, ...command], log, { env });
    try {
      const signal = AbortSignal.timeout(60_000);
      await running.until("its start", signal, async () => {
        const text = await Deno.readTextFile(log).catch(() => "");
        return text.includes('"event":"serves"') ? true : undefined;
      });
      using channel = new Channel({ address: `unix://${socket}` });
      const { name } = await channel.call(Identity.method.getPluginInfo, {}, { signal });
      assert.equal(name, "csi.lightbitslabs.com");
      const { capabilities } = await channel.call(Controller.method.controllerGetCapabilities, {}, { signal });
      assert(capabilities.length > 3);
      assert.match(await Deno.readTextFile(`/proc/${running.pid}/status`), /^Uid:\t65532\t65532\t65532\t65532$/m);
      assert.equal((await Deno.stat(socket)).uid, 65532);
    } finally {
      assert.equal(await running.end("SIGTERM", 10_000), "exit 0", await Deno.readTextFile(log));
    }
  });
}

if (!Deno.env.has("LBCSI_UNSHARED")) {
  const { code } = await new Deno.Command("unshare", {
    args: ["--mount", Deno.execPath(), "run", "-A", fileURLToPath(import.meta.url), ...Deno.args],
    env: { LBCSI_UNSHARED: "yes" },
  }).spawn().status;
  Deno.exit(code);
}
const started = performance.now();
const directory = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-image-" }));
try {
  const home = join(directory, "home");
  const debs = options.debs ?? join(directory, "debs");
  for (const path of [home, debs]) await Deno.mkdir(path, { recursive: true });
  const build = ["run", "-A", join(repository, "k8s/image/build.ts"), "--js", join(home, "js"), "--commit", "test"];
  await must(Deno.execPath(), ...build);
  await using tree = await unpackPackages(debs);
  for (const kind of imageKinds) {
    const image = join(directory, kind);
    const packages = await makeRoot(kind, image, tree);
    const kib = (await must("du", "-sk", image)).split("\t")[0];
    console.log(`${kind}: ${packages.length} packages, ${kib} KiB without the executable`);
    const places = { [dirname(Deno.execPath())]: "/deno", [join(home, "js")]: "/js" };
    const user = kind === "controller" ? "65532:65532" : undefined;
    const entered = await enter(image, join(directory, `${kind}-entered`), kind === "node" ? [home] : [], places, user);
    await lookAt(kind, image, entered);
    if (kind === "controller") {
      await controlIn(entered, home);
      continue;
    }
    await runTools(entered, home);
    await liveIn(entered, home, ["/deno/deno", "run", "-A", "--no-code-cache", "/js/main.js"]);
  }
} finally {
  if (options.keep) console.log(`left: ${directory}`);
  else {
    // Mounts keep what is below them; this namespace has only ours.
    await run(["umount", "-R", "-l", join(directory, "node-entered/root"), join(directory, "controller-entered/root")]);
    await run(["umount", "-R", "-l", join(directory, "home")]);
    for (const kind of imageKinds) await run(["umount", join(directory, `${kind}-entered/memory`)]);
    await Deno.remove(directory, { recursive: true });
  }
}
console.log(`${Math.round((performance.now() - started) / 1000)} s\n${passed} passed, ${failed} failed`);
Deno.exit(failed === 0 ? 0 : 1);

/**
 * csi-sanity, the CSI project's own test suite, against a controller and a node that are separate processes, with the
 * simulator's loop data plane behind them: once for file systems, once for raw block volumes, and again.
 *
 * usage: deno task test:sanity [--backend lightos|poseidon] [--repeat COUNT] [--keep]
 * With LB_CSI_1_13=true and LB_CSI_SNAPSHOT_METADATA=true it tests what these announce too.
 *
 * Needs root, loop devices and `go` (it installs csi-sanity into a directory of its own). Exit status 1 when a test fails,
 * or is skipped although its capability is announced.
 */
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { type Backend, Testbed } from "../../lib/demo/testbed.ts";
import { Controller, ControllerServiceCapability_RPC_Type as Rpc, Identity } from "../../proto/gen/csi_pb.ts";
import { fetching } from "../support/go.ts";
import { needs } from "../support/needs.ts";

const sanityPackage = "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@v5.6.0";
const gib = 1n << 30n;
const mutablePolicy = "sanity-policy";
const { values: settings } = parseArgs({
  options: {
    backend: { type: "string", default: "lightos" },
    repeat: { type: "string", default: "2" },
    keep: { type: "boolean", default: false },
  },
});
const backends: readonly Backend[] = ["lightos", "poseidon"];

interface Outcome {
  readonly passed: number;
  readonly failed: readonly string[];
  /** Names of skipped tests by the reason that csi-sanity gives. */
  readonly skipped: ReadonlyMap<string, number>;
}

if (!needs("root", "loop", "go", "mkfs.xfs")) Deno.exit(1);
const home = await Deno.makeTempDir({ prefix: "lbcsi-sanity-" });
const backend = backends.find((name) => name === settings.backend);
if (backend === undefined) throw new Error(`--backend ${settings.backend}: is not one of ${backends.join(", ")}`);
const program = [Deno.execPath(), "run", "-A", fileURLToPath(new URL("../../main.ts", import.meta.url))];
const testbed = new Testbed(home, program, { backend });
let failures = 0;
try {
  const sanity = await fetching(install);
  const patience = AbortSignal.timeout(60_000);
  await testbed.startSimulator("loop", patience);
  // The kernel lets a mounted ext4 grow for holders of CAP_SYS_RESOURCE only; xfs grows for any root.
  const fsType = await mayGrowMountedExt4() ? "ext4" : "xfs";
  await startController(fsType, patience);
  await testbed.startNode("sanity.node", patience, { LB_CSI_DEFAULT_FS: fsType });
  console.log(`announced: ${(await announced()).join(", ")}`);

  for (let run = 1; run <= Number(settings.repeat); run++) {
    for (const accessType of ["mount", "block"] as const) {
      const started = performance.now();
      const { passed, failed, skipped } = await runSanity(sanity, accessType, run);
      failures += failed.length;
      const seconds = Math.round((performance.now() - started) / 100) / 10;
      const skips = [...skipped.values()].reduce((sum, count) => sum + count, 0);
      console.log(
        `run ${run}, ${accessType === "mount" ? fsType : "block"}: ${passed} passed, ${failed.length} failed, ` +
          `${skips} skipped, ${seconds} s`,
      );
      for (const name of failed) console.log(`  failed: ${name}`);
      if (run === 1) { for (const [reason, count] of skipped) console.log(`  skipped ${count}: ${reason}`); }
    }
  }
  const left = await testbed.clusterWhenIdle(AbortSignal.timeout(20_000));
  for (const [what, found] of Object.entries(left)) {
    if (found.length === 0) continue;
    failures++;
    console.log(`left over, ${what}: ${found.join(", ")}`);
  }
} finally {
  for (const { what } of await testbed.cleanUp(settings.keep)) console.log(`cleaned up: ${what}`);
}
console.log(failures === 0 ? "csi-sanity: 0 failed" : `csi-sanity: ${failures} failed`);
Deno.exit(failures === 0 ? 0 : 1);

/** With all that makes it announce the most. */
async function startController(fsType: string, patience: AbortSignal): Promise<void> {
  const configPath = join(home, "clusters.yaml");
  const options = ["--config", configPath, "--default-fs", fsType];
  const { dagent, arrays, grpc, jwt, adminJwt } = testbed.addresses;
  if (backend === "poseidon") {
    const system = { name: "simulated", endpoint: dagent, arrays };
    await Deno.writeTextFile(configPath, JSON.stringify({ systems: [system] }));
    await testbed.startService("controller", options, patience);
    return;
  }
  const jwtPath = join(home, "jwt");
  await Deno.writeTextFile(jwtPath, jwt, { mode: 0o600 });
  // The cluster reports free space only to tokens that may see the whole cluster.
  const adminPath = join(home, "admin-jwt");
  await Deno.writeTextFile(adminPath, adminJwt, { mode: 0o600 });
  const cluster = { name: "simulated", scheme: "grpc", jwt: adminPath, projects: ["default"], endpoints: grpc };
  await Deno.writeTextFile(configPath, JSON.stringify({ clusters: [cluster] }));
  await testbed.ask("POST", "/policies", { name: mutablePolicy, kind: "iops", read: 2560, write: 2560 });
  await testbed.startService("controller", [...options, "--jwt-path", jwtPath], patience);
}

async function install(): Promise<string> {
  const { code, stderr } = await new Deno.Command("go", {
    args: ["install", sanityPackage],
    env: { GOBIN: home, GOFLAGS: "-mod=mod" },
    stdout: "null",
    stderr: "piped",
  }).output();
  if (code !== 0) throw new Error(`go install ${sanityPackage} failed: ${new TextDecoder().decode(stderr)}`);
  return join(home, "csi-sanity");
}

async function mayGrowMountedExt4(): Promise<boolean> {
  const status = await Deno.readTextFile("/proc/self/status");
  const effective = BigInt(`0x${/^CapEff:\s*([0-9a-f]+)$/m.exec(status)?.[1] ?? "0"}`);
  return (effective & (1n << 24n)) !== 0n;
}

async function announced(): Promise<readonly string[]> {
  const signal = AbortSignal.timeout(10_000);
  const { capabilities } = await testbed.controller.call(Controller.method.controllerGetCapabilities, {}, { signal });
  const plugin = await testbed.controller.call(Identity.method.getPluginCapabilities, {}, { signal });
  const kinds = plugin.capabilities.map(({ type }) =>
    type.case === "volumeExpansion" ? "growing online" : `service ${type.value?.type}`
  );
  return [...capabilities.map(({ type }) => type.case === "rpc" ? Rpc[type.value.type] : "unknown"), ...kinds];
}

async function runSanity(sanity: string, accessType: "mount" | "block", run: number): Promise<Outcome> {
  const place = join(home, `${accessType}-${run}`);
  await Deno.mkdir(place);
  const secretFile = join(place, "secrets.yaml");
  const parameterFile = join(place, "parameters.yaml");
  const junit = join(place, "junit.xml");
  const calls = [
    ...["CreateVolume", "DeleteVolume", "ControllerPublishVolume", "ControllerUnpublishVolume"],
    ...["ControllerValidateVolumeCapabilities", "NodeStageVolume", "NodePublishVolume", "CreateSnapshot"],
    ...["DeleteSnapshot", "ControllerExpandVolume", "ControllerModifyVolume", "ListSnapshots", "GetSnapshot"],
  ];
  await Deno.writeTextFile(
    secretFile,
    calls.map((call) => `${call}Secret:\n  jwt: ${testbed.addresses.jwt}\n`).join(""),
    { mode: 0o600 },
  );
  const parameters = backend === "poseidon" ? testbed.parameters : {
    "mgmt-endpoint": testbed.addresses.grpc.join(","),
    "mgmt-scheme": "grpc",
    "replica-count": "1",
    "project-name": "default",
  };
  await Deno.writeTextFile(
    parameterFile,
    Object.entries(parameters).map(([key, value]) => `${key}: "${value}"\n`).join(""),
  );
  const mutableFile = join(place, "mutable.yaml");
  await Deno.writeTextFile(
    mutableFile,
    backend === "poseidon" ? 'maxiops: "100"\nmaxbw: "200"\n' : `qos-policy-name: ${mutablePolicy}\n`,
  );
  const log = await Deno.open(join(place, "log"), { create: true, write: true });
  const child = new Deno.Command(sanity, {
    args: [
      `--csi.endpoint=unix://${join(home, "node.sock")}`,
      `--csi.controllerendpoint=unix://${join(home, "controller.sock")}`,
      `--csi.testvolumeparameters=${parameterFile}`,
      `--csi.testvolumemutableparameters=${mutableFile}`,
      `--csi.secrets=${secretFile}`,
      `--csi.testvolumeaccesstype=${accessType}`,
      `--csi.testvolumesize=${gib}`,
      `--csi.testvolumeexpandsize=${2n * gib}`,
      `--csi.mountdir=${join(place, "mount")}`,
      `--csi.stagingdir=${join(place, "staging")}`,
      `--csi.junitfile=${junit}`,
      "--ginkgo.no-color",
    ],
    stdin: "null",
    stdout: "piped",
    stderr: "null",
  }).spawn();
  await child.stdout.pipeTo(log.writable);
  const { code } = await child.status;
  const outcome = readJunit(await Deno.readTextFile(junit));
  if (code !== 0 && outcome.failed.length === 0) throw new Error(`csi-sanity exits ${code}, see ${place}/log`);
  return outcome;
}

/** What ginkgo's JUnit report says; a test is one `testcase` element, with its status and the reason for a skip. */
function readJunit(xml: string): Outcome {
  let passed = 0;
  const failed: string[] = [];
  const skipped = new Map<string, number>();
  for (const [, attributes = "", body = ""] of xml.matchAll(/<testcase ([^>]*?)(?:\/>|>([\s\S]*?)<\/testcase>)/g)) {
    const name = unescapeXml(/name="([^"]*)"/.exec(attributes)?.[1] ?? "");
    const status = /status="([^"]*)"/.exec(attributes)?.[1];
    if (status === "passed") {
      if (name.startsWith("[It]")) passed++;
    } else if (status === "skipped" || status === "pending") {
      const reason = unescapeXml(/<skipped message="([^"]*)"/.exec(body)?.[1] ?? status).replace(/^skipped - /, "");
      skipped.set(reason, (skipped.get(reason) ?? 0) + 1);
    } else {
      failed.push(name);
    }
  }
  return { passed, failed, skipped };
}

function unescapeXml(text: string): string {
  const entities: Readonly<Record<string, string>> = { quot: '"', apos: "'", lt: "<", gt: ">", amp: "&" };
  return text.replace(
    /&(?:#(\d+)|(\w+));/g,
    (whole, code, name) => code === undefined ? entities[name] ?? whole : String.fromCodePoint(Number(code)),
  );
}

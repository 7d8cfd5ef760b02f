import assert from "node:assert/strict";
import { join } from "node:path";
import { describeCheck, findMissing } from "../../lib/cli/readiness.ts";
import type { Host } from "../../lib/host/host.ts";
import { createLinuxHost } from "../../lib/host/linux_host.ts";
import { createLogger } from "../../lib/log.ts";

/** This machine without NVMe/TCP, for a process without rights. */
async function freshHost() {
  const proc = await Deno.makeTempDir({ prefix: "lbcsi-proc-" });
  await Deno.mkdir(join(proc, "self"));
  await Deno.writeTextFile(join(proc, "self/status"), "Name:\tlbcsi\nCapEff:\t0000000000000000\n");
  const linux = createLinuxHost({ log: createLogger("error"), procRoot: proc });
  return {
    ...linux,
    kindOf: (path: string) => /nvme/.test(path) ? Promise.resolve("absent" as const) : linux.kindOf(path),
    [Symbol.asyncDispose]: () => Deno.remove(proc, { recursive: true }),
  };
}

const notLoaded =
  "NVMe/TCP: the kernel module nvme_tcp is not loaded, and /dev/nvme-fabrics is missing -> modprobe nvme_tcp " +
  "on the host, and a file in /etc/modules-load.d so that it is loaded at each start";

Deno.test("promise 21: findMissing reports everything that a fresh machine lacks, in the words of the doctor, and runs nothing", async () => {
  await using host = await freshHost();
  const calm: Host = { ...host, run: () => Promise.reject(new Error("a program was run")) };
  const needs = { rights: true, nvme: true, programs: { "xfs tools": ["sh", "mkfs.nowhere"], "mount tools": ["sh"] } };

  assert.deepEqual((await findMissing(calm, needs)).map(describeCheck), [
    "rights: CAP_SYS_ADMIN, CAP_DAC_OVERRIDE, CAP_SYS_RESOURCE missing -> run it as root; in Kubernetes in a privileged " +
    "container",
    notLoaded,
    "xfs tools: mkfs.nowhere: it is not installed",
  ]);
  assert.deepEqual(await findMissing(host, { rights: false, nvme: false, programs: {} }), []);
});

Deno.test("findMissing does not expect kernel modules of a simulated machine", async () => {
  await using host = await freshHost();
  const simulated = { ...host, roots: { ...host.roots, sysfs: "/tmp/sys", dev: "/tmp/dev" } };

  assert.deepEqual(await findMissing(simulated, { rights: false, nvme: true, programs: {} }), []);
});

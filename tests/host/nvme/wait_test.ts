import assert from "node:assert/strict";
import { join } from "node:path";
import { StatusError } from "../../../lib/error.ts";
import { waitForDevice } from "../../../lib/host/nvme/wait.ts";
import { FakeHost } from "../../support/fake_host.ts";
import { needs } from "../../support/needs.ts";
import { callContext, rejects } from "../../support/node_calls.ts";
import { blockAttributes, controllerAttributes, nqn, uuid, withSysfs, writeSysfs } from "../../support/sysfs_tree.ts";

const hint = "see that the daemon runs";

Deno.test({
  name: "promise 14: waitForDevice notices the device within milliseconds of its arrival, not at the next poll",
  ignore: !needs("root"),
  fn: () =>
    withSysfs({}, async (host, directory) => {
      // A look every 10 minutes: only the watch can tell in time.
      const waiting = waitForDevice(host, callContext(), uuid, { subsystemNqn: nqn, hint, pollMs: 600_000 });
      await new Promise((resolve) => setTimeout(resolve, 50));
      for (const [path, text] of Object.entries(blockAttributes("nvme0n1", { dev: "7:200" }))) {
        await writeSysfs(directory, path, text);
      }
      const arrived = performance.now();
      await new Deno.Command("mknod", { args: [join(host.roots.dev, "nvme0n1"), "b", "7", "200"] }).output();

      const device = await waiting;

      assert.equal(device.name, "nvme0n1");
      const ms = performance.now() - arrived;
      assert(ms < 1000, `noticed after ${ms} ms`);
    }),
});

Deno.test({
  name: "waitForDevice polls where nothing can be watched",
  ignore: !needs("root"),
  fn: () =>
    withSysfs({}, async (host, directory) => {
      const deaf = { ...host, watch: () => ({ [Symbol.dispose]: () => {} }) };
      const waiting = waitForDevice(deaf, callContext(), uuid, { subsystemNqn: nqn, hint, pollMs: 10 });
      for (const [path, text] of Object.entries(blockAttributes("nvme0n1", { dev: "7:200" }))) {
        await writeSysfs(directory, path, text);
      }
      await new Deno.Command("mknod", { args: [join(host.roots.dev, "nvme0n1"), "b", "7", "200"] }).output();

      assert.equal((await waiting).name, "nvme0n1");
    }),
});

const absences: readonly [string, Record<string, string>, RegExp][] = [
  [
    "NVMe is not there at all",
    {},
    /has no NVMe controllers at all, the kernel module nvme_tcp is needed; see that the daemon/,
  ],
  [
    "nothing is connected",
    { "class/nvme/nvme9/state": "live" },
    /no connection to nqn.*cluster:1; see that the daemon runs/,
  ],
  [
    "the connections show no such namespace",
    { ...controllerAttributes("nvme1", "live"), ...controllerAttributes("nvme2", "connecting") },
    /nvme1 to 192.0.2.1:4420 is live, nvme2 to 192.0.2.2:4420 is connecting, but it shows no such namespace to this host/,
  ],
  [
    "its node is missing",
    blockAttributes("nvme0n1"),
    /sysfs has nvme0n1 as device 259:1, but the node .*nvme0n1 is missing/,
  ],
  ["its size is zero", blockAttributes("nvme0n1", { size: "0" }), /sysfs has nvme0n1, but its size is zero/],
  [
    "it is in another subsystem",
    blockAttributes("nvme0n1", { "device/subsysnqn": "nqn.x" }),
    /belongs to another subsystem than nqn.*:1/,
  ],
];

for (const [what, files, message] of absences) {
  Deno.test(`promise 20: waitForDevice says at the deadline that ${what}`, async () => {
    await withSysfs(files, async (host) => {
      const caller = new AbortController();
      const waiting = waitForDevice(host, callContext(caller.signal), uuid, { subsystemNqn: nqn, hint });
      setTimeout(() => caller.abort(new StatusError("DEADLINE_EXCEEDED", "too late")), 20);

      await rejects(waiting, "UNAVAILABLE", message);
    });
  });
}

Deno.test("waitForDevice throws the reason when the caller has given up", async () => {
  await withSysfs({}, async (host) => {
    const gone = AbortSignal.abort(new StatusError("CANCELLED", "given up by its caller"));

    await rejects(waitForDevice(host, callContext(gone), uuid, { hint }), "CANCELLED", /given up by its caller/);
  });
});

Deno.test("promise 14: waitForDevice rescans every live controller, because a single one may show the namespace", async () => {
  const host = new FakeHost();
  host.connect(nqn, "nqn.host", "192.0.2.1");
  host.connect(nqn, "nqn.host", "192.0.2.2");
  host.addNamespace(uuid, nqn);
  host.hidden.set(`nvme0 ${uuid}`, "withdrawn");
  host.hidden.set(`nvme1 ${uuid}`, "lost");

  const device = await waitForDevice(host, callContext(), uuid, { subsystemNqn: nqn, hint });

  assert.equal(device.uuid, uuid);
  assert.deepEqual(host.commands, ["nvme ns-rescan /dev/nvme0", "nvme ns-rescan /dev/nvme1"]);
});

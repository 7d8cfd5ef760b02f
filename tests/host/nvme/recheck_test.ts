import assert from "node:assert/strict";
import { findDevice } from "../../../lib/host/nvme/devices.ts";
import { recheckDevice } from "../../../lib/host/nvme/recheck.ts";
import { connectedHost } from "../../support/fake_disk.ts";
import { callContext, rejects } from "../../support/node_calls.ts";
import { other, uuid } from "../../support/sysfs_tree.ts";

Deno.test("promise 3: recheckDevice names both identities when the name has changed hands", async () => {
  const host = connectedHost();
  const device = await findDevice(host, uuid);
  assert(device);
  assert.deepEqual(await recheckDevice(host, callContext().doing("grow it"), device), device);

  await rejects(
    recheckDevice(host, callContext().doing("grow it"), { ...device, uuid: other }),
    "UNAVAILABLE",
    /Cannot grow it: \/dev\/nvme0n1 is nvme0n1 \(namespace 0f2c6a5e.*\) now, namespace 1b7e2c44.* has to be found again/,
  );
  await rejects(
    recheckDevice(host, callContext().doing("grow it"), { ...device, number: "259:7" }),
    "UNAVAILABLE",
    /has become device 259:1/,
  );
  host.devices.length = 0;
  await rejects(recheckDevice(host, callContext().doing("grow it"), device), "UNAVAILABLE", /\/dev\/nvme0n1 is gone/);
});

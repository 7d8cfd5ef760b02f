/** The CSI identity service. */
import { deepStrictEqual, strictEqual } from "node:assert/strict";
import { Identity } from "../../proto/gen/csi_pb.ts";
import { startControlledCluster } from "../support/controller_service.ts";

Deno.test("Identity answers name, version, capabilities and Probe without calling the cluster", async () => {
  await using env = await startControlledCluster();

  const info = await env.call(Identity.method.getPluginInfo, {});
  const { capabilities } = await env.call(Identity.method.getPluginCapabilities, {});
  const probe = await env.call(Identity.method.probe, {});

  strictEqual(info.name, "csi.lightbitslabs.com");
  strictEqual(info.vendorVersion, "1.2.3");
  deepStrictEqual(capabilities.map(({ type }) => type.case), ["service", "volumeExpansion"]);
  strictEqual(probe.ready, true);
  strictEqual(env.simulator.control.callsInAll(), 0);
});

/** What `lbcsi doctor` says of PoseidonOS. */
import { deepStrictEqual, match, ok, strictEqual } from "node:assert/strict";
import { Secrets } from "../../../lib/secrets.ts";
import { poseidonBackend } from "../../../lib/storage/poseidon/backend.ts";
import { poseidonReports } from "../../../lib/storage/poseidon/checks.ts";
import { checkNamed } from "../../support/checks.ts";
import { ownHostNqn } from "../../support/doctor_machine.ts";
import { endpointsOf, lightosOptions } from "../../support/lightos_report.ts";
import { callContext } from "../../support/node_calls.ts";
import { poseidonParameters, startPoseidon } from "../../support/poseidon.ts";

Deno.test("doctor checks PoseidonOS: DAgent, transport, arrays, and how full they are", async () => {
  await using simulator = await startPoseidon();
  const { dagent, arrays } = simulator.addresses;
  const [endpoint] = endpointsOf([dagent]);
  ok(endpoint);
  const systems = {
    all: () => [{ name: "rack1", endpoint, formerEndpoints: [], idEndpoint: endpoint, arrays: [...arrays, "none"] }],
    owning: () => undefined,
  };

  const [report] = await poseidonReports(callContext(), systems, undefined);

  const checks = report?.checks ?? [];
  strictEqual(report?.name, "system rack1");
  match(checkNamed(checks, `DAgent ${dagent}`).found, /^answers after \d+ ms, PoseidonOS v1/);
  strictEqual(checkNamed(checks, "TCP transport").verdict, "ok");
  strictEqual(checkNamed(checks, `array ${arrays[0]}`).found, `0 of 256 volumes, ${16n << 30n} bytes left`);
  deepStrictEqual([checkNamed(checks, "array none").verdict, checkNamed(checks, "management API").verdict], [
    "problem",
    "warning",
  ]);
});

Deno.test("doctor knows where PoseidonOS shows volumes now", async () => {
  await using simulator = await startPoseidon();
  const { dagent, targetAddress, transportServiceId } = simulator.addresses;
  const [endpoint] = endpointsOf([dagent]);
  await using backend = poseidonBackend({ log: lightosOptions.log });
  const none = new Secrets({});
  const volumeRequest = {
    name: "pvc-1",
    requiredBytes: 1n << 20n,
    limitBytes: 0n,
    parameters: poseidonParameters(simulator),
  };
  const { id, context } = await backend.createVolume(callContext(), none, volumeRequest);
  await backend.grantAccess(callContext(), none, id, {
    hostNqn: ownHostNqn,
    shared: false,
    ...(context === undefined ? {} : { volumeContext: context }),
  });

  const [report] = await poseidonReports(callContext(), undefined, endpoint);

  deepStrictEqual(report?.addresses, [{ traddr: targetAddress, trsvcid: transportServiceId }]);
});

Deno.test("doctor says that no DAgent answers", async () => {
  const [endpoint] = endpointsOf(["127.0.0.1:1"]);

  const [report] = await poseidonReports(callContext(), undefined, endpoint);

  const check = checkNamed(report?.checks ?? [], "DAgent 127.0.0.1:1");
  strictEqual(check.verdict, "problem");
  match(check.found, /^the DAgent at 127\.0\.0\.1:1 cannot be reached/);
});

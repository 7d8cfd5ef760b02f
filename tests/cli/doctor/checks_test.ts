/** What `lbcsi doctor` says of a machine and a cluster together. */
import { deepStrictEqual, match, ok, strictEqual } from "node:assert/strict";
import { runChecks } from "../../../lib/cli/doctor/checks.ts";
import { poseidonReports } from "../../../lib/storage/poseidon/checks.ts";
import { ClusterInfo_AuthenticationMode as AuthenticationMode } from "../../../proto/gen/lightos_pb.ts";
import { checkNamed } from "../../support/checks.ts";
import { createMachine, fabricsOptions, ownHostNqn } from "../../support/doctor_machine.ts";
import { endpointsOf, reportOf, serveOddLightos } from "../../support/lightos_report.ts";
import { callContext } from "../../support/node_calls.ts";
import { startPoseidon } from "../../support/poseidon.ts";
import { startSimulator } from "../../support/simulator.ts";

Deno.test("promise 21: doctor finds another machine that is connected as this node", async () => {
  await using here = await createMachine();
  await using lightos = await serveOddLightos({ host: { iPAddress: "192.0.2.77", hostname: "worker-9" } });

  const sections = await runChecks(callContext(), here.options, lightos.report().then((report) => [report]));

  const check = checkNamed(sections[1]?.checks ?? [], "connected as this node");
  strictEqual(check.verdict, "problem");
  strictEqual(
    check.found,
    `another machine is connected as ${ownHostNqn}: 192.0.2.77 (worker-9) is not one of this machine's addresses`,
  );
});

Deno.test("doctor knows this machine when it is the one that is connected", async () => {
  await using here = await createMachine();
  await using lightos = await serveOddLightos({ host: { iPAddress: "127.0.0.1", hostname: "me" } });

  const sections = await runChecks(callContext(), here.options, lightos.report().then((report) => [report]));

  const check = checkNamed(sections[1]?.checks ?? [], "connected as this node");
  deepStrictEqual([check.verdict, check.found], ["ok", "this machine, from 127.0.0.1 (me)"]);
});

Deno.test("doctor says that the cluster demands an authentication that this machine cannot do", async () => {
  await using here = await createMachine({ files: { "dev/nvme-fabrics": fabricsOptions.replace(/,dhchap.*/, "") } });
  await using lightos = await serveOddLightos({ mode: AuthenticationMode.Enabled });

  const sections = await runChecks(callContext(), here.options, lightos.report().then((report) => [report]));

  const check = checkNamed(sections[1]?.checks ?? [], "authentication of this node");
  strictEqual(check.verdict, "problem");
  match(check.found, /^the cluster demands DH-HMAC-CHAP, and the kernel cannot authenticate NVMe connections \(/);
});

Deno.test("doctor connects to data addresses, and names those that do not answer", async () => {
  await using here = await createMachine({ options: { attach: "direct" } });
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const good = `127.0.0.1:${listener.addr.port}`;
  await using some = await serveOddLightos({ addresses: [good, "127.0.0.1:1"] });
  await using none = await serveOddLightos({ addresses: ["127.0.0.1:1"] });
  await using all = await serveOddLightos({ addresses: [good] });

  const checkOf = async (lightos: typeof some) =>
    checkNamed(
      (await runChecks(callContext(), here.options, lightos.report().then((report) => [report])))[1]?.checks ?? [],
      "data addresses",
    );

  const { verdict, found } = await checkOf(some);
  deepStrictEqual([verdict, found], ["warning", "1 of 2 reached; 127.0.0.1:1: ECONNREFUSED"]);
  strictEqual((await checkOf(none)).verdict, "problem");
  deepStrictEqual([(await checkOf(all)).verdict, (await checkOf(all)).found], ["ok", `${good} reached`]);
});

Deno.test("doctor knows a simulator, and does not try data addresses that nothing listens at", async () => {
  await using here = await createMachine({ options: { attach: "direct" } });
  await using lightos = await startSimulator();
  await using poseidon = await startPoseidon();
  const { grpcs, ca = "", adminJwt } = lightos.addresses;
  const [endpoint] = endpointsOf([poseidon.addresses.dagent]);
  const [ofPoseidon] = await poseidonReports(callContext(), undefined, endpoint);
  const reports = [await reportOf(grpcs, { "jwt": adminJwt, "mgmt-ca.crt": ca }), ofPoseidon];
  ok(ofPoseidon !== undefined);

  const sections = await runChecks(
    callContext(),
    here.options,
    Promise.resolve(reports.filter((one) => one !== undefined)),
  );

  for (const { checks } of sections.slice(1)) {
    const { verdict, found } = checkNamed(checks, "simulator");
    strictEqual(verdict, "warning");
    match(found, /^this storage system is simulated \(lbcsi simulate\), and nothing listens at its data addresses/);
    deepStrictEqual(checks.filter(({ name, verdict }) => name === "data addresses" || verdict === "problem"), []);
  }
  strictEqual(sections.length, 3);
});

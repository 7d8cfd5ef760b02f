/** What `lbcsi doctor` says of LightOS clusters. */
import { deepStrictEqual, match, ok, strictEqual } from "node:assert/strict";
import { Secrets } from "../../../lib/secrets.ts";
import { lightosReports } from "../../../lib/storage/lightos/checks.ts";
import { knownClusters } from "../../../lib/storage/lightos/cluster_file.ts";
import { ClusterHealth_State as Health } from "../../../proto/gen/lightos_pb.ts";
import { checkNamed } from "../../support/checks.ts";
import { ownHostNqn } from "../../support/doctor_machine.ts";
import {
  createToken,
  endpointsOf,
  lightosOptions,
  reportOf,
  secondsFromNow,
  serveOddLightos,
} from "../../support/lightos_report.ts";
import { callContext } from "../../support/node_calls.ts";
import { startSimulator } from "../../support/simulator.ts";

Deno.test("doctor checks each cluster of the cluster file, with the settings of the file", async () => {
  await using one = await startSimulator();
  await using other = await startSimulator();
  const files = new Map([
    ["/ca", one.addresses.ca ?? ""],
    ["/jwt", one.addresses.jwt],
    [
      "/clusters",
      JSON.stringify({
        clusters: [
          { name: "rack1", endpoints: one.addresses.grpcs, formerEndpoints: "192.0.2.9:443", ca: "/ca", jwt: "/jwt" },
          { name: "rack2", endpoints: other.addresses.grpcs, ca: "/none" },
        ],
      }),
    ],
  ]);
  const clusters = knownClusters("/clusters", {
    stamp: () => "unchanged",
    read(path) {
      const text = files.get(path);
      if (text === undefined) throw new Error("no such file");
      return text;
    },
  }, lightosOptions.log);

  const reports = await lightosReports(
    callContext(),
    { ...lightosOptions, clusters },
    { target: undefined, secrets: new Secrets({}), hostNqn: ownHostNqn },
  );
  const former = { endpoints: endpointsOf(["192.0.2.9:443"]), scheme: "grpcs" as const };
  const [byFormer] = await lightosReports(
    callContext(),
    { ...lightosOptions, clusters },
    { target: former, secrets: new Secrets({}), hostNqn: ownHostNqn },
  );

  deepStrictEqual(reports.map(({ name }) => name), ["cluster rack1", "cluster rack2"]);
  deepStrictEqual(reports[0]?.checks.filter(({ verdict }) => verdict === "problem"), []);
  strictEqual(checkNamed(reports[0]?.checks ?? [], "token").found.split(":")[0], '/jwt of cluster "rack1"');
  deepStrictEqual(reports[1]?.checks, [
    { name: "trust", verdict: "problem", found: "its ca /none cannot be read (no such file)" },
  ]);
  strictEqual(byFormer?.name, "cluster rack1");
  deepStrictEqual(
    byFormer.checks.filter(({ name }) => name.startsWith("endpoint ")).map(({ name }) => name.slice(9)).sort(),
    [...one.addresses.grpcs].sort(),
  );
});

Deno.test("doctor finds nothing wrong with a cluster that is well, at each of its endpoints", async () => {
  await using simulator = await startSimulator();
  const { grpcs, ca = "", adminJwt } = simulator.addresses;

  const { checks, addresses, discovery, inBandAuth, connected } = await reportOf(grpcs, {
    "jwt": adminJwt,
    "mgmt-ca.crt": ca,
  });

  deepStrictEqual(checks.filter(({ verdict }) => verdict !== "ok").map(({ name }) => name), ["simulator"]);
  strictEqual(checks.filter(({ name }) => name.startsWith("endpoint ")).length, 3);
  strictEqual(checks.filter(({ name }) => name.startsWith("certificate of ")).length, 3);
  match(checkNamed(checks, `endpoint ${grpcs[0]}`).found, /^answers after \d+ ms, its certificate verified$/);
  match(checkNamed(checks, "token").found, /^key "jwt" of the call's secrets: accepted, valid until 20/);
  strictEqual(checkNamed(checks, "cluster health").found, "OK");
  deepStrictEqual([addresses.length, discovery.length, inBandAuth, connected], [3, 3, false, undefined]);
  ok(!JSON.stringify(checks).includes(adminJwt));
});

Deno.test("promise 11: doctor says plainly that a certificate is not verified, or that nothing is encrypted", async () => {
  await using simulator = await startSimulator();
  const { grpc, grpcs, jwt } = simulator.addresses;

  const unverified = await reportOf(grpcs, { jwt }, "grpcs", { verifyTls: false });
  const clear = await reportOf(grpc, { jwt }, "grpc");

  const first = checkNamed(unverified.checks, `endpoint ${grpcs[0]}`);
  strictEqual(first.verdict, "warning");
  match(first.found, /its certificate is NOT verified: anybody in between can read the token$/);
  const second = checkNamed(clear.checks, `endpoint ${grpc[0]}`);
  strictEqual(second.verdict, "warning");
  match(second.found, /in clear text: anybody in between can read the token$/);
});

Deno.test("doctor says that the cluster's CA is missing, once for each endpoint", async () => {
  await using simulator = await startSimulator();
  const { grpcs, jwt } = simulator.addresses;

  const { checks } = await reportOf(grpcs, { jwt });

  const endpoint = checkNamed(checks, `endpoint ${grpcs[0]}`);
  strictEqual(endpoint.verdict, "problem");
  match(endpoint.found, /^self-signed certificate in certificate chain$/);
  match(
    endpoint.advice ?? "",
    /give the cluster's CA: mgmt-ca\.crt in the Secret, ca in the cluster file, or --mgmt-ca/,
  );
  strictEqual(checkNamed(checks, "token").verdict, "not checked");
});

Deno.test("promise 12: doctor names the endpoint that is dead, as a warning while others answer", async () => {
  await using simulator = await startSimulator();
  const { grpc, jwt } = simulator.addresses;
  const dead = "127.0.0.1:1";

  const one = await reportOf([...grpc, dead], { jwt }, "grpc");
  const all = await reportOf([dead], { jwt }, "grpc");

  match(checkNamed(one.checks, `endpoint ${dead}`).found, /ECONNREFUSED/);
  strictEqual(checkNamed(one.checks, `endpoint ${dead}`).verdict, "warning");
  strictEqual(checkNamed(all.checks, `endpoint ${dead}`).verdict, "problem");
});

Deno.test("doctor does not wait for an endpoint that never answers", async () => {
  using silent = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const connections: Deno.Conn[] = [];
  const accepting = (async () => {
    for await (const connection of silent) connections.push(connection);
  })();
  const started = performance.now();

  const { checks } = await reportOf([`127.0.0.1:${silent.addr.port}`], { jwt: "x" });

  const took = performance.now() - started;
  silent.close();
  await accepting;
  for (const connection of connections) connection.close();
  strictEqual(checkNamed(checks, `endpoint 127.0.0.1:${silent.addr.port}`).verdict, "problem");
  ok(took < 20_000, `${took}`);
});

for (
  const [what, jwt, verdict, found] of [
    [
      "none",
      undefined,
      "problem",
      /^none was given: no key "jwt" in the secrets, and none that can be read in \/etc\/lb-csi\/jwt$/,
    ],
    [
      "one that expired",
      createToken({ exp: secondsFromNow(-1) }),
      "problem",
      /^key "jwt" of the call's secrets: expired 20\S+Z$/,
    ],
    [
      "one of the future, or a clock that is behind",
      createToken({ iat: secondsFromNow(1), exp: secondsFromNow(2) }),
      "problem",
      /counts from 20\S+Z on, and it is 20\S+Z here$/,
    ],
    [
      "one that the cluster does not take",
      createToken({ exp: secondsFromNow(9) }),
      "problem",
      /: LightOS at \S+ answered .*UNAUTH/,
    ],
    ["something else", "hello", "problem", /, which is no JSON Web Token: LightOS at \S+ answered/],
  ] as const
) {
  Deno.test(`promise 10: doctor says what is wrong with a token (${what}), and shows nothing of it`, async () => {
    await using simulator = await startSimulator();

    const { checks } = await reportOf(simulator.addresses.grpc, jwt === undefined ? {} : { jwt }, "grpc");

    const check = checkNamed(checks, "token");
    strictEqual(check.verdict, verdict, check.found);
    match(check.found, found);
    if (jwt !== undefined) ok(!JSON.stringify(checks).includes(jwt));
    deepStrictEqual(
      checks.filter(({ name, verdict }) => verdict === "problem" && name !== "token"),
      [],
      "the token is not the endpoint's problem",
    );
  });
}

for (
  const [days, verdict, found] of [
    [10, "warning", /valid until 20\S+Z \((9|10) days\)$/],
    [-0.5, "problem", /CN=lbcsi simulator, issued by CN=lbcsi simulator CA, expired 20/],
  ] as const
) {
  Deno.test(`doctor reports a certificate that expires in ${days} days`, async () => {
    await using lightos = await serveOddLightos({ certificateDays: days });

    const { checks } = await lightos.report();

    const check = checkNamed(checks, `certificate of ${lightos.address}`);
    strictEqual(check.verdict, verdict);
    match(check.found, found);
  });
}

for (const [health, verdict] of [[Health.Warning, "warning"], [Health.Error, "problem"]] as const) {
  Deno.test(`doctor passes on that the cluster's health is ${Health[health]}`, async () => {
    await using lightos = await serveOddLightos({ health });

    const check = checkNamed((await lightos.report()).checks, "cluster health");

    strictEqual(check.verdict, verdict);
    strictEqual(check.found, `${Health[health]}, 1 inactive nodes`);
  });
}

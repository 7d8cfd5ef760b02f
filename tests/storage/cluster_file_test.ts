import { deepStrictEqual, match, ok, rejects, strictEqual, throws } from "node:assert/strict";
import { X509Certificate } from "node:crypto";
import { createLogger, type RequestContext, requestContext, Secrets } from "../../lib/context.ts";
import { type StatusCode, StatusError } from "../../lib/error.ts";
import { formatEndpoints } from "../../lib/volume_id.ts";
import { hostNqn } from "../../lib/namespace.ts";
import type { VolumeRequest } from "../../lib/storage/backend.ts";
import { lightosBackend } from "../../lib/storage/lightos/backend.ts";
import type { ConfigFiles } from "../../lib/storage/cluster_file.ts";
import { selfSigned } from "../../lib/simulator/certificate.ts";
import { knownClusters, parseConfig } from "../../lib/storage/lightos/cluster_file.ts";
import type { LightosOptions } from "../../lib/storage/lightos/cluster.ts";
import { startSimulator, type TestSimulator } from "../support/simulator.ts";

const gib = 1n << 30n;
const quiet = createLogger("error", "json", () => {});
const none = new Secrets();

function failsWith(code: StatusCode, ...messages: RegExp[]) {
  return (error: unknown) => {
    ok(error instanceof StatusError, String(error));
    strictEqual(error.code, code, error.message);
    for (const message of messages) match(error.message, message);
    return true;
  };
}

function within(ms: number): RequestContext {
  const aborted = new AbortController();
  const timer = setTimeout(() => aborted.abort(new StatusError("DEADLINE_EXCEEDED", "too slow")), ms);
  Deno.unrefTimer(timer);
  return requestContext(aborted.signal, new Date(Date.now() + ms), quiet);
}

// ------------------------------------------------------------------------------------------------------------- content

const whole = `
clusters:
  - name: rack1
    endpoints: 192.0.2.2:443,192.0.2.1:443
    formerEndpoints:
      - 198.51.100.1:443
      - "[2001:db8::1]:443"
    idEndpoints: 198.51.100.1:443
    scheme: grpcs
    projects: [default, team-a]
    ca: /etc/lbcsi/ca.pem
    jwt: /etc/lbcsi/jwt
    serverName: lightos.example
    tlsPin: ["sha256//AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="]
    tlsVerify: true
    ephemeral: {projects: "default,scratch", maxSize: 100Gi}
  - name: rack2
    endpoints: [rack2.example:80]
    scheme: grpc
`;

Deno.test("parseConfig reads every key of YAML, and sorts endpoints as volume IDs do", () => {
  const [first, second] = parseConfig("/etc/lbcsi/config.yaml", whole);

  ok(first !== undefined && second !== undefined);
  const { endpoints, formerEndpoints, idEndpoints, idForms, ...rest } = first;
  strictEqual(formatEndpoints(endpoints), "192.0.2.1:443,192.0.2.2:443");
  strictEqual(formatEndpoints(formerEndpoints), "198.51.100.1:443,[2001:db8::1]:443");
  strictEqual(formatEndpoints(idEndpoints), "198.51.100.1:443");
  deepStrictEqual(idForms.map(formatEndpoints), [
    "198.51.100.1:443",
    "198.51.100.1:443,[2001:db8::1]:443",
    "[2001:db8::1]:443",
  ]);
  deepStrictEqual(rest, {
    name: "rack1",
    scheme: "grpcs",
    projects: ["default", "team-a"],
    caPath: "/etc/lbcsi/ca.pem",
    jwtPath: "/etc/lbcsi/jwt",
    trust: {
      serverName: "lightos.example",
      pins: ["sha256//AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="],
      verify: true,
    },
    inline: { projects: ["default", "scratch"], maxSizeBytes: 100n << 30n },
  });
  deepStrictEqual(second, {
    name: "rack2",
    endpoints: [{ host: "rack2.example", port: 80 }],
    formerEndpoints: [],
    idEndpoints: [{ host: "rack2.example", port: 80 }],
    idForms: [[{ host: "rack2.example", port: 80 }]],
    scheme: "grpc",
    projects: [],
    caPath: undefined,
    jwtPath: undefined,
    trust: { serverName: undefined, pins: undefined, verify: undefined },
    inline: undefined,
  });
});

Deno.test("parseConfig reads JSON, with TLS as the default scheme", () => {
  const text = JSON.stringify({ clusters: [{ name: "a", endpoints: "192.0.2.1:443", projects: "p1,p2" }] });

  const [cluster] = parseConfig("/c.json", text);

  strictEqual(cluster?.scheme, "grpcs");
  deepStrictEqual(cluster.projects, ["p1", "p2"]);
});

for (
  const [what, more, forms] of [
    ["nothing else", "", ["192.0.2.1:443"]],
    [
      "one former list in one text",
      `formerEndpoints: "b:1,a:1"`,
      ["192.0.2.1:443", "a:1,b:1"],
    ],
    ["former endpoints one by one", "formerEndpoints: ['b:1', 'a:1']", ["192.0.2.1:443", "a:1,b:1", "b:1", "a:1"]],
    ["former lists", "formerEndpoints: ['b:1,a:1', 'c:1']", ["192.0.2.1:443", "a:1,b:1", "c:1"]],
    ["several ID lists", "idEndpoints: ['b:1,a:1', 'c:1']", ["a:1,b:1", "c:1"]],
    ["ID endpoints one by one", "idEndpoints: ['b:1', 'a:1']", ["a:1,b:1"]],
    ["the same twice", "idEndpoints: 'b:1', formerEndpoints: 'b:1'", ["b:1"]],
  ] as [string, string, readonly string[]][]
) {
  Deno.test(`parseConfig knows which lists of endpoints volume IDs may have, of ${what}`, () => {
    const [cluster] = parseConfig("/c", one(more));

    deepStrictEqual(cluster?.idForms.map(formatEndpoints), forms);
  });
}

Deno.test("parseConfig refuses endpoints whose volume IDs no call would take", () => {
  const many = Array.from({ length: 60 }, (_, at) => `management-${at}.example:443`).join(",");

  throws(
    () => parseConfig("/c", one(`idEndpoints: "${many}"`)),
    failsWith(
      "INVALID_ARGUMENT",
      /cluster "a" makes volume IDs of up to \d{4} bytes, 1024 are allowed; name fewer endpoints/,
    ),
  );
  strictEqual(parseConfig("/c", one(`formerEndpoints: "a:1"`)).length, 1);
});

const one = (more: string) => `clusters: [{name: a, endpoints: "192.0.2.1:443"${more === "" ? "" : `, ${more}`}}]`;
for (
  const [what, text, message] of [
    ["nothing", "", /is not a map with the key clusters/],
    ["a text", "clusters", /"clusters" is not a map with the key clusters/],
    ["a flow that does not end", "clusters: [", /at line 1, column 12$/],
    ["a key twice", one("name: b"), /Map keys must be unique at line 1/],
    [
      "another key at the top",
      `${one("")}\ncluster: 1`,
      /"cluster" \(did you mean "clusters"\?\) unknown \(known: clusters\)/,
    ],
    ["no clusters", "clusters: []", /clusters is empty/],
    ["clusters without a list", "clusters: {a: 1}", /clusters is missing, give a list of clusters/],
    ["a cluster that is a number", "clusters: [7]", /clusters\[0\] "7" is not a map of keys/],
    ["no name", `clusters: [{endpoints: "a:1"}]`, /clusters\[0\]\.name is missing/],
    ["a name with a blank", `clusters: [{name: a b, endpoints: "a:1"}]`, /clusters\[0\]\.name "a b" is not a name/],
    [
      "a name that YAML reads as a number",
      `clusters: [{name: 5, endpoints: "a:1"}]`,
      /clusters\[0\]\.name "5" is not a text, quotes make it one/,
    ],
    ["no endpoints", "clusters: [{name: a}]", /clusters\[0\]\.endpoints is missing/],
    ["an empty list of endpoints", "clusters: [{name: a, endpoints: []}]", /clusters\[0\]\.endpoints is empty/],
    ["an endpoint without a port", `clusters: [{name: a, endpoints: "a"}]`, /endpoints "a" is not host:port/],
    ["a URL as endpoint", `clusters: [{name: a, endpoints: "https://a:1"}]`, /"https:\/\/a:1" is not host:port/],
    ["a bad former endpoint", one("formerEndpoints: [a]"), /clusters\[0\]\.formerEndpoints "a" is not host:port/],
    ["a scheme of the web", one("scheme: https"), /clusters\[0\]\.scheme "https" is not one of grpc, grpcs/],
    ["a project in capitals", one("projects: [p1, Team]"), /clusters\[0\]\.projects\[1\] "Team" is not a project name/],
    ["a relative path", one("ca: ca.pem"), /clusters\[0\]\.ca "ca\.pem" is not an absolute path/],
    ["a token instead of its file", one("jwt: eyJhbGciOi"), /clusters\[0\]\.jwt is not an absolute path/],
    ["inline volumes without a token", one("ephemeral: {projects: p1, maxSize: 1Gi}"), /ephemeral needs jwt beside it/],
    ["inline volumes with a switch", one("jwt: /j, ephemeral: true"), /ephemeral is not a map with the keys projects/],
    ["inline volumes nowhere", one("jwt: /j, ephemeral: {maxSize: 1Gi}"), /ephemeral\.projects is missing/],
    [
      "inline volumes in no project",
      one("jwt: /j, ephemeral: {projects: [], maxSize: 1}"),
      /ephemeral\.projects is empty/,
    ],
    ["inline volumes of any size", one("jwt: /j, ephemeral: {projects: p1}"), /ephemeral\.maxSize is missing/],
    [
      "inline volumes of no size",
      one("jwt: /j, ephemeral: {projects: p1, maxSize: 100 GB}"),
      /ephemeral\.maxSize "100 GB" is not a size such as 100Gi/,
    ],
    [
      "a misspelt key of inline volumes",
      one("jwt: /j, ephemeral: {projects: p1, maxSize: 1Gi, max: 2}"),
      /clusters\[0\]\.ephemeral "max" unknown \(known: projects, maxSize\)/,
    ],
    [
      "a misspelt key",
      one("schme: grpc"),
      /clusters\[0\] "schme" \(did you mean "scheme"\?\) unknown \(known: name, endpoints, formerEndpoints,/,
    ],
    [
      "one name twice",
      `clusters: [{name: a, endpoints: "a:1"}, {name: a, endpoints: "b:1"}]`,
      /two clusters have the name "a"/,
    ],
    [
      "one endpoint in two clusters",
      `clusters: [{name: a, endpoints: "a:1"}, {name: b, endpoints: "b:1", formerEndpoints: "a:1"}]`,
      /endpoint a:1 belongs to both "a" and "b"/,
    ],
  ] as const
) {
  Deno.test(`parseConfig refuses ${what} with INVALID_ARGUMENT and names the file`, () => {
    throws(
      () => parseConfig("/etc/lbcsi/config.yaml", text),
      failsWith("INVALID_ARGUMENT", /^Cannot use cluster file \/etc\/lbcsi\/config\.yaml: /, message),
    );
  });
}

// -------------------------------------------------------------------------------------------------------------- reload

/** Files in memory, each with a stamp that changes when it is written. */
function memoryFiles(initial: Record<string, string>) {
  const files = new Map(Object.entries(initial).map(([path, text]) => [path, { text, version: 0 }]));
  const find = (path: string) => {
    const file = files.get(path);
    if (file === undefined) throw new Error(`ENOENT: ${path}`);
    return file;
  };
  const reads: string[] = [];
  return {
    reads,
    write: (path: string, text: string) => files.set(path, { text, version: (files.get(path)?.version ?? 0) + 1 }),
    remove: (path: string) => files.delete(path),
    stamp: (path: string) => String(find(path).version),
    read: (path: string) => {
      reads.push(path);
      return find(path).text;
    },
  } satisfies ConfigFiles & Record<string, unknown>;
}

const named = (name: string) => one("").replace("name: a", `name: ${name}`);

Deno.test("knownClusters reads the file again when it has changed, and only then", () => {
  const files = memoryFiles({ "/c": named("before") });
  const clusters = knownClusters("/c", files, quiet);
  const names = () => clusters.all().map(({ name }) => name);

  deepStrictEqual([names(), names()], [["before"], ["before"]]);
  strictEqual(files.reads.length, 1);
  files.write("/c", named("after"));

  deepStrictEqual([names(), names()], [["after"], ["after"]]);
  strictEqual(files.reads.length, 2);
});

Deno.test("knownClusters keeps the last good file while the new one is broken or gone, and logs each once", () => {
  const lines: string[] = [];
  const files = memoryFiles({ "/c": named("good") });
  const clusters = knownClusters("/c", files, createLogger("error", "json", (line) => lines.push(line)));
  const look = () => strictEqual(clusters.all()[0]?.name, "good");

  files.write("/c", "clusters: []");
  look();
  look();
  strictEqual(files.reads.length, 2, "a file that is known to be broken is not read again");
  files.remove("/c");
  look();
  look();

  deepStrictEqual(lines.map((line) => JSON.parse(line).error), [
    "Cannot use cluster file /c: clusters is empty",
    "ENOENT: /c",
  ]);
  files.write("/c", named("better"));
  strictEqual(clusters.all()[0]?.name, "better");
});

Deno.test("knownClusters refuses to begin with a file that is missing", () => {
  throws(
    () => knownClusters("/c", memoryFiles({}), quiet),
    failsWith("INVALID_ARGUMENT", /^Cannot use cluster file \/c: ENOENT/),
  );
});

Deno.test("a known cluster's ca is read at each use and answers UNAVAILABLE when it is missing or no certificate", async () => {
  const files = memoryFiles({ "/c": one("ca: /ca") });
  const [cluster] = knownClusters("/c", files, quiet).all();

  throws(
    () => cluster?.ca(),
    failsWith("UNAVAILABLE", /^Cannot trust cluster "a": its ca \/ca cannot be read \(ENOENT/),
  );
  files.write("/ca", "token");
  throws(() => cluster?.ca(), failsWith("UNAVAILABLE", /its ca \/ca holds no PEM certificate/));
  const { ca } = await selfSigned([]);
  files.write("/ca", `${ca}-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n`);
  throws(() => cluster?.ca(), failsWith("INVALID_ARGUMENT", /its ca \/ca has a bad block: certificate 2 is empty/));
  files.write("/ca", ca);
  deepStrictEqual(new X509Certificate(cluster?.ca() ?? "").raw, new X509Certificate(ca).raw);
});

// ----------------------------------------------------------------------------------------------------------- promise 13

function openBackend(changes: Partial<LightosOptions>) {
  return lightosBackend({
    log: quiet,
    globalJwt: () => undefined,
    globalJwtPath: "/etc/lb-csi/jwt",
    globalJwtFor: "any endpoint",
    ca: undefined,
    verifyTls: true,
    userAgent: "lbcsi/test",
    ...changes,
  });
}

function request(simulator: TestSimulator, scheme: "grpc" | "grpcs" = "grpc"): VolumeRequest {
  return {
    name: "pvc-1",
    requiredBytes: gib,
    limitBytes: 0n,
    parameters: {
      "mgmt-endpoint": simulator.addresses[scheme].join(","),
      "mgmt-scheme": scheme,
      "replica-count": "1",
      "project-name": "default",
    },
  };
}

/** A cluster that was moved: what it was made with, and a simulator that serves it on other ports. */
async function movedCluster(scheme: "grpc" | "grpcs") {
  const stack = new AsyncDisposableStack();
  const stateDir = await Deno.makeTempDir({ prefix: "lbcsi-moved-" });
  stack.defer(() => Deno.remove(stateDir, { recursive: true }));
  const before = await startSimulator({ stateDir });
  const { jwt, ca = "" } = before.addresses;
  const secrets = new Secrets({ jwt, "mgmt-ca.crt": ca });
  await using backend = openBackend({});
  const volume = await backend.createVolume(within(10_000), secrets, request(before, scheme));
  const endpoints = before.addresses[scheme].join(",");
  await before.stop();
  // Without its ports remembered, the same cluster comes up on free ones; the old ones are held so that they stay dead.
  const identity = JSON.parse(await Deno.readTextFile(`${stateDir}/identity.json`));
  await Deno.writeTextFile(`${stateDir}/identity.json`, JSON.stringify({ ...identity, ports: {} }));
  for (const address of endpoints.split(",")) {
    const port = Number(address.slice(address.lastIndexOf(":") + 1));
    const listener = Deno.listen({ hostname: "127.0.0.1", port });
    stack.defer(() => listener.close());
    void (async () => {
      for await (const connection of listener) connection.close();
    })();
  }
  const after = stack.use(await startSimulator({ stateDir }));
  return {
    volume,
    formerEndpoints: endpoints,
    endpoints: after.addresses[scheme].join(","),
    simulator: after,
    secrets,
    jwt,
    ca,
    [Symbol.asyncDispose]: () => stack.disposeAsync(),
  };
}

for (const scheme of ["grpc", "grpcs"] as const) {
  Deno.test(`promise 13: a volume ID (${scheme}) from before the cluster moved works through the cluster file`, async () => {
    await using moved = await movedCluster(scheme);
    const files = memoryFiles({
      "/c": JSON.stringify({
        clusters: [{
          name: "moved",
          endpoints: moved.endpoints,
          formerEndpoints: moved.formerEndpoints,
          scheme,
          ...(scheme === "grpcs" ? { ca: "/ca" } : {}),
          jwt: "/jwt",
        }],
      }),
      "/ca": moved.ca,
      "/jwt": `${moved.jwt}\n`,
    });
    await using backend = openBackend({ clusters: knownClusters("/c", files, quiet) });
    const { id } = moved.volume;

    const found = await backend.getVolume(within(10_000), none, id);
    const namespace = await backend.grantAccess(within(10_000), none, id, {
      hostNqn: hostNqn("a.node"),
      shared: false,
    });
    await backend.revokeAccess(within(10_000), none, id, undefined);
    await backend.deleteVolume(within(10_000), none, id);

    strictEqual(found.id, id);
    strictEqual(namespace.uuid, moved.volume.uuid);
    const { volumes } = moved.simulator.control.leftovers();
    deepStrictEqual(volumes.filter((volume) => !volume.endsWith("Deleting")), []);
  });
}

Deno.test("promise 13: a StorageClass with former endpoints goes on making and finding volumes under the same ID", async () => {
  await using moved = await movedCluster("grpc");
  const text = JSON.stringify({
    clusters: [{
      name: "moved",
      endpoints: moved.endpoints,
      formerEndpoints: moved.formerEndpoints,
      scheme: "grpc",
      jwt: "/jwt",
    }],
  });
  await using backend = openBackend({
    clusters: knownClusters("/c", memoryFiles({ "/c": text, "/jwt": moved.jwt }), quiet),
  });
  const again = { ...request(moved.simulator), parameters: {} as Record<string, string> };
  Object.assign(again.parameters, request(moved.simulator).parameters, { "mgmt-endpoint": moved.formerEndpoints });

  const volume = await backend.createVolume(within(10_000), none, again);

  strictEqual(volume.id, moved.volume.id);
});

Deno.test("promise 13: a volume from before the cluster changed its scheme can be cloned, and taken a snapshot of", async () => {
  await using simulator = await startSimulator();
  const { grpc, grpcs, jwt, ca = "" } = simulator.addresses;
  const secrets = new Secrets({ jwt });
  await using before = openBackend({});
  const source = await before.createVolume(within(10_000), secrets, request(simulator));
  const snapshot = await before.snapshots?.createSnapshot(within(10_000), secrets, {
    name: "snapshot-1",
    sourceVolumeId: source.id,
  });
  const text = JSON.stringify({
    clusters: [{ name: "moved", endpoints: grpcs, formerEndpoints: grpc, scheme: "grpcs", ca: "/ca", jwt: "/jwt" }],
  });
  const files = memoryFiles({ "/c": text, "/ca": ca, "/jwt": jwt });
  await using backend = openBackend({ clusters: knownClusters("/c", files, quiet) });
  const today = request(simulator, "grpcs");

  for (const [type, id] of [["volume", source.id], ["snapshot", snapshot?.id ?? ""]] as const) {
    const copy = await backend.createVolume(within(10_000), none, {
      ...today,
      name: `copy-${type}`,
      source: { type, id },
    });

    strictEqual(copy.id.includes("scheme:grpcs"), true);
  }
});

Deno.test("a moved cluster that no file names answers UNAVAILABLE with each endpoint's reason", async () => {
  await using moved = await movedCluster("grpc");
  await using backend = openBackend({});

  await rejects(
    backend.getVolume(within(5000), moved.secrets, moved.volume.id),
    failsWith("UNAVAILABLE", /no LightOS management endpoint answers \((127\.0\.0\.1:\d+(, |: )){3}/),
  );
});

Deno.test("promise 13: without a cluster file a volume ID works as long as one of its endpoints lives", async () => {
  await using simulator = await startSimulator();
  const secrets = new Secrets({ jwt: simulator.addresses.jwt });
  await using backend = openBackend({});
  const volume = await backend.createVolume(within(10_000), secrets, request(simulator));
  await using anew = openBackend({});
  await simulator.control.stopEndpoints({ scheme: "grpc", server: 0 });
  await simulator.control.stopEndpoints({ scheme: "grpc", server: 1 });

  await anew.grantAccess(within(10_000), secrets, volume.id, { hostNqn: hostNqn("a.node"), shared: false });
  await anew.revokeAccess(within(10_000), secrets, volume.id, undefined);
  await anew.deleteVolume(within(10_000), secrets, volume.id);

  deepStrictEqual(simulator.control.visible(hostNqn("a.node")), []);
});

Deno.test("promise 13: endpoints that the cluster named itself serve when those of the volume ID are gone", async () => {
  await using simulator = await startSimulator();
  const secrets = new Secrets({ jwt: simulator.addresses.jwt });
  const [first = ""] = simulator.addresses.grpc;
  await using backend = openBackend({});
  const one = { ...request(simulator), parameters: { ...request(simulator).parameters, "mgmt-endpoint": first } };
  const volume = await backend.createVolume(within(10_000), secrets, one);
  await backend.grantAccess(within(10_000), secrets, volume.id, { hostNqn: hostNqn("a.node"), shared: false });
  await simulator.control.stopEndpoints({ address: first });

  const found = await backend.getVolume(within(10_000), secrets, volume.id);

  deepStrictEqual(found.hosts, [hostNqn("a.node")]);
});

Deno.test("a token in the secrets wins over the cluster's, and a bad one of the cluster is blamed by its file", async () => {
  await using simulator = await startSimulator();
  const text = JSON.stringify({
    clusters: [{ name: "a", endpoints: simulator.addresses.grpc, scheme: "grpc", jwt: "/jwt" }],
  });
  const files = memoryFiles({ "/c": text, "/jwt": "stale" });
  await using backend = openBackend({ clusters: knownClusters("/c", files, quiet) });
  const secrets = new Secrets({ jwt: simulator.addresses.jwt });
  const volume = await backend.createVolume(within(10_000), secrets, request(simulator));

  await rejects(
    backend.getVolume(within(5000), none, volume.id),
    failsWith("UNAUTHENTICATED", /JWT: \/jwt of cluster "a", which is not a JSON Web Token$/),
  );
  files.remove("/jwt");
  await rejects(
    backend.getVolume(within(5000), none, volume.id),
    failsWith(
      "UNAUTHENTICATED",
      /JWT: none was given: no key "jwt" in the secrets, and none that can be read in \/jwt of cluster "a"$/,
    ),
  );
});

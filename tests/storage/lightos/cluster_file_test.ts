/** The cluster file of LightOS: its keys, and what is wrong with bad ones. */
import { deepStrictEqual, ok, strictEqual, throws } from "node:assert/strict";
import { X509Certificate } from "node:crypto";
import { formatEndpoints } from "../../../lib/volume_id.ts";
import { selfSigned } from "../../../lib/simulator/certificate.ts";
import { knownClusters, parseConfig } from "../../../lib/storage/lightos/cluster_file.ts";
import { failsWith, memoryFiles, quiet } from "../../support/backends.ts";

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

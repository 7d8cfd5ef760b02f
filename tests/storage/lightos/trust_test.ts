/** How a management API proves who it is: names, pins, the sources of these options, and the log of unverified connections. */
import { deepStrictEqual, ok, rejects, strictEqual, throws } from "node:assert/strict";
import tls from "node:tls";
import { publicKeyPin } from "../../../lib/grpc/tls.ts";
import { createLogger } from "../../../lib/log.ts";
import { Secrets } from "../../../lib/secrets.ts";
import { selfSigned } from "../../../lib/simulator/certificate.ts";
import type { VolumeRequest } from "../../../lib/storage/backend.ts";
import { lightosBackend } from "../../../lib/storage/lightos/backend.ts";
import { knownClusters } from "../../../lib/storage/lightos/cluster_file.ts";
import { resolveTrust } from "../../../lib/storage/lightos/trust.ts";
import { failsWith, gib, lightosOptions, within } from "../../support/backends.ts";
import { startSimulator, type TestSimulator } from "../../support/simulator.ts";

const otherPin = "sha256//AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

/** A cluster over TLS, and a controller's backend that has no CA but the one that a call or the cluster file brings. */
async function start(cluster: Readonly<Record<string, unknown>> | undefined = undefined, verifyTls = true) {
  await using stack = new AsyncDisposableStack();
  const simulator = stack.use(await startSimulator());
  const { jwt, ca = "" } = simulator.addresses;
  const lines: string[] = [];
  const log = createLogger("debug", "json", (line) => lines.push(line));
  const text = JSON.stringify({
    clusters: [{ name: "a", endpoints: simulator.addresses.grpcs, ca: "/ca", jwt: "/jwt", ...cluster }],
  });
  const files = new Map([["/c", text], ["/ca", ca], ["/jwt", jwt]]);
  const backend = stack.use(lightosBackend({
    ...lightosOptions,
    log,
    verifyTls,
    clusters: cluster === undefined ? undefined : knownClusters("/c", {
      stamp: () => "unchanged",
      read: (path) => files.get(path) ?? "",
    }, log),
  }));
  const parts = stack.move();
  return {
    backend,
    lines,
    simulator,
    pin: await pinOf(simulator),
    create: (secrets: Record<string, string> = {}, parameters: Record<string, string> = {}) =>
      backend.createVolume(
        within(5000),
        new Secrets({ jwt, "mgmt-ca.crt": ca, ...secrets }),
        request(simulator, parameters),
      ),
    [Symbol.asyncDispose]: () => parts.disposeAsync(),
  };
}

function request(simulator: TestSimulator, parameters: Record<string, string>): VolumeRequest {
  return {
    name: "pvc-1",
    requiredBytes: gib,
    limitBytes: 0n,
    parameters: {
      "mgmt-endpoint": simulator.addresses.grpcs.join(","),
      "replica-count": "1",
      "project-name": "default",
      ...parameters,
    },
  };
}

/** What an operator gets with openssl. */
async function pinOf(simulator: TestSimulator): Promise<string> {
  const { hostname, port } = new URL(`https://${simulator.addresses.grpcs[0]}`);
  const socket = tls.connect({ host: hostname, port: Number(port), rejectUnauthorized: false, ALPNProtocols: ["h2"] });
  try {
    await new Promise<void>((resolve, reject) => socket.once("secureConnect", resolve).once("error", reject));
    return publicKeyPin(socket.getPeerCertificate(true).raw);
  } finally {
    socket.destroy();
  }
}

Deno.test("promise 11: publicKeyPin is what openssl computes, of PEM and DER", async () => {
  const { cert } = await selfSigned([]);
  const openssl = async (args: string[], input: BufferSource) => {
    const child = new Deno.Command("openssl", { args, stdin: "piped", stdout: "piped", stderr: "null" }).spawn();
    const writer = child.stdin.getWriter();
    await writer.write(new Uint8Array(input as ArrayBuffer));
    await writer.close();
    return (await child.output()).stdout;
  };
  const pem = new TextEncoder().encode(cert);
  const publicKey = await openssl(["x509", "-pubkey", "-noout"], pem);
  const der = await openssl(["pkey", "-pubin", "-outform", "der"], publicKey);
  const expected = `sha256//${(await openssl(["dgst", "-sha256", "-binary"], der)).toBase64()}`;

  strictEqual(publicKeyPin(cert), expected);
  strictEqual(publicKeyPin(await openssl(["x509", "-outform", "der"], pem)), expected);
});

Deno.test("secrets about the certificate of a cluster may have newlines, blanks and capitals", async () => {
  await using env = await start();

  await env.create({ "mgmt-server-name": "localhost\n", "mgmt-tls-verify": "True\n", "mgmt-tls-pin": `${env.pin}\n` });
  await env.create({ "mgmt-tls-verify": "False\n", "mgmt-ca.crt": `${env.simulator.addresses.ca}\n\n` });
  await env.create({ "mgmt-tls-pin": `${otherPin}, ${env.pin}\n` });
});

Deno.test("promise 11: a server name in the secrets is what the certificate must be for, instead of the address", async () => {
  await using env = await start();

  await env.create({ "mgmt-server-name": "localhost" });
  await rejects(
    env.create({ "mgmt-server-name": "other.example" }),
    failsWith(
      "UNAVAILABLE",
      /no LightOS management endpoint answers \(127\.0\.0\.1:\d+(, 127\.0\.0\.1:\d+)*: .*other\.example.*\); give the name that the certificate is for/,
    ),
  );
});

Deno.test("promise 11: a pinned public key is demanded besides the CA's signature", async () => {
  await using env = await start();

  await env.create({ "mgmt-tls-pin": `${otherPin},${env.pin}` });
  await rejects(
    env.create({ "mgmt-tls-pin": otherPin }),
    failsWith("UNAVAILABLE", /the server's public key is sha256\/\/\S+=, which is not pinned/),
  );
  const other = await selfSigned([]);
  await rejects(
    env.create({ "mgmt-tls-pin": env.pin, "mgmt-ca.crt": other.ca }),
    failsWith("UNAVAILABLE", /certificate/),
  );
});

Deno.test("promise 11: what one call may skip, another one with other secrets may not", async () => {
  await using env = await start();
  const { ca } = await selfSigned([]);
  const unverified = { "mgmt-ca.crt": ca, "mgmt-tls-verify": "false" };

  const { id } = await env.create(unverified);
  await rejects(env.create({ "mgmt-ca.crt": ca }), failsWith("UNAVAILABLE", /certificate/));
  await rejects(env.create({ "mgmt-tls-pin": otherPin }), failsWith("UNAVAILABLE", /is not pinned/));

  strictEqual((await env.create()).id, id);
});

Deno.test("promise 11: every connection without verification is logged, and none with it", async () => {
  await using env = await start();
  const warnings = () =>
    env.lines.filter((line) => /"level":"warning".*without verifying the management API's certificate/.test(line))
      .length;

  await env.create();
  strictEqual(warnings(), 0);
  await env.create({ "mgmt-tls-verify": "false" });
  await env.create({ "mgmt-tls-verify": "false" });

  strictEqual(warnings(), 1);
});

Deno.test("promise 11: the cluster file has name, pin and verification, and the secrets take precedence", async () => {
  const calls: [Record<string, unknown>, Record<string, string>, RegExp | undefined][] = [
    [{ serverName: "localhost" }, {}, undefined],
    [{ serverName: "other.example" }, {}, /other\.example/],
    [{ serverName: "other.example" }, { "mgmt-server-name": "localhost" }, undefined],
    [{ tlsPin: otherPin }, {}, /is not pinned/],
    [{ serverName: "other.example", tlsVerify: false }, {}, undefined],
    [{ serverName: "other.example", tlsVerify: false }, { "mgmt-tls-verify": "true" }, /other\.example/],
  ];
  for (const [cluster, secrets, problem] of calls) {
    await using env = await start(cluster);
    const made = env.create(secrets);
    if (problem === undefined) await made;
    else await rejects(made, failsWith("UNAVAILABLE", problem));
  }
});

Deno.test("promise 11: the secrets can turn verification on in a process that verifies nothing", async () => {
  await using env = await start(undefined, false);
  const { ca } = await selfSigned([]);

  await rejects(env.create({ "mgmt-ca.crt": ca, "mgmt-tls-verify": "true" }), failsWith("UNAVAILABLE", /certificate/));
  await env.create({ "mgmt-ca.crt": ca });
});

for (
  const [key, value, shown] of [
    ["mgmt-server-name", "localhost", "localhost"],
    ["mgmt-tls-pin", otherPin, otherPin],
    ["mgmt-tls-verify", "false", "false"],
  ] as const
) {
  Deno.test(`StorageClass parameter ${key} must be what the other calls will know too`, async () => {
    await using env = await start();

    await rejects(
      env.create({}, { [key]: value }),
      (error: Error) => {
        failsWith("INVALID_ARGUMENT", /is not what the secrets, the cluster file or the controller's options say/)(
          error,
        );
        ok(error.message.includes(`StorageClass parameter "${key}" "${shown}"`), error.message);
        ok(error.message.endsWith(`so put "${key}" into its Secret too`), error.message);
        return true;
      },
    );
    deepStrictEqual(env.simulator.control.leftovers().volumes, []);
  });
}

Deno.test("StorageClass parameters that agree with the secrets are taken", async () => {
  await using env = await start();
  const agreed = { "mgmt-server-name": "localhost", "mgmt-tls-pin": env.pin, "mgmt-tls-verify": "true" };

  await env.create(agreed, agreed);
  await env.create({ "mgmt-tls-verify": "false" }, { "mgmt-tls-verify": "false" });
});

Deno.test("StorageClass parameters of TLS are refused with clear text", async () => {
  await using env = await start();
  const clear = { "mgmt-endpoint": env.simulator.addresses.grpc.join(","), "mgmt-scheme": "grpc" };

  await rejects(
    env.create({}, { ...clear, "mgmt-server-name": "localhost" }),
    failsWith("INVALID_ARGUMENT", /"mgmt-server-name" is given, but "mgmt-scheme" is "grpc", which is clear text$/),
  );
});

for (
  const [secrets, problem] of [
    [{ "mgmt-server-name": "a b" }, /mgmt-server-name: is not a host name or IP address/],
    [{ "mgmt-server-name": "" }, /mgmt-server-name: is not a host name/],
    [{ "mgmt-tls-pin": "" }, /mgmt-tls-pin.*: is not "sha256\/\/"/],
    [{ "mgmt-tls-pin": "sha256//short=" }, /mgmt-tls-pin.*: is not "sha256\/\/"/],
    [{ "mgmt-tls-pin": `${otherPin},` }, /mgmt-tls-pin.*: is not "sha256\/\/"/],
    [{ "mgmt-tls-verify": "no" }, /mgmt-tls-verify: is not "true" or "false"/],
    [
      { "mgmt-tls-verify": "false", "mgmt-tls-pin": otherPin },
      /a public key is pinned, but its certificate is not to be/,
    ],
  ] as const
) {
  Deno.test(`secrets with ${JSON.stringify(secrets)} are refused`, async () => {
    await using env = await start();

    await rejects(env.create(secrets), failsWith("INVALID_ARGUMENT", problem));
  });
}

Deno.test("resolveTrust takes each part from the first source that has it", () => {
  deepStrictEqual(
    resolveTrust("ca", {}, { serverName: "b" }, { serverName: "c", pins: ["z", "a"] }, { verify: true }),
    {
      ca: "ca",
      serverName: "b",
      pins: ["a", "z"],
      verify: true,
    },
  );
  deepStrictEqual(resolveTrust(undefined), { verify: true });
  throws(() => resolveTrust(undefined, { pins: ["a"] }, { verify: false }), failsWith("INVALID_ARGUMENT", /pinned/));
});

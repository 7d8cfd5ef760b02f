/** Which management endpoints receive the token of --jwt-path: a controller process, and servers that note what they receive. */
import { deepStrictEqual, ok, strictEqual } from "node:assert/strict";
import { join } from "node:path";
import { Testbed } from "../../lib/demo/testbed.ts";
import { StatusError } from "../../lib/error.ts";
import { CallError } from "../../lib/grpc/client.ts";
import { serve, service } from "../../lib/grpc/server.ts";
import { createLogger } from "../../lib/log.ts";
import { selfSigned } from "../../lib/simulator/certificate.ts";
import { Controller, VolumeCapability_AccessMode_Mode as Mode } from "../../proto/gen/csi_pb.ts";
import { DurosAPI } from "../../proto/gen/lightos_pb.ts";
import { mainPath } from "../support/lbcsi.ts";

const token = "the-controllers.own.token";
const signed = selfSigned([]);

/** A server that records the token of each call and rejects it. */
async function startListener(isTls: boolean) {
  const tokens: string[] = [];
  const { key, cert } = await signed;
  const note = (_request: unknown, { header }: { readonly header: (name: string) => string | undefined }) => {
    tokens.push(header("authorization")?.replace(/^Bearer /, "") ?? "none");
    return Promise.reject(new StatusError("UNAUTHENTICATED", "Cannot let you in: no token, or a bad one"));
  };
  const server = await serve({
    listen: { host: "127.0.0.1", port: 0, ...(isTls ? { tls: { key, cert } } : {}) },
    log: createLogger("error", "json", () => {}),
    services: [service(DurosAPI, { getVersion: note, createVolume: note, getVolume: note, deleteVolume: note })],
  });
  const address = `127.0.0.1:${server.port}`;
  return { tokens, address, [Symbol.asyncDispose]: () => server.stop(1000) };
}

interface Case {
  readonly name: string;
  readonly scheme: "grpc" | "grpcs";
  /** `CA` stands for the path of the CA's file. */
  readonly options: readonly string[];
  /** Of the cluster file; undefined: the endpoint is in none. */
  readonly cluster?: Readonly<Record<string, unknown>>;
  /** `CA` stands for the text of the CA. */
  readonly secrets?: Readonly<Record<string, string>>;
  /** What the error says of why the token was withheld; undefined: the server receives it. */
  readonly withheld?: RegExp;
  /** What arrives when it is not the token of --jwt-path. */
  readonly arrives?: string;
}

const cases: readonly Case[] = [
  {
    name: "a StorageClass names over clear text",
    scheme: "grpc",
    options: ["--mgmt-ca", "CA"],
    withheld: /clear text would show it/,
  },
  {
    name: "a StorageClass names over clear text, with --jwt-for-any-endpoint",
    scheme: "grpc",
    options: ["--jwt-for-any-endpoint"],
  },
  {
    name: "a StorageClass names and --mgmt-ca verifies",
    scheme: "grpcs",
    options: ["--mgmt-ca", "CA"],
  },
  {
    name: "a StorageClass names and the CA of its Secret verifies",
    scheme: "grpcs",
    options: [],
    secrets: { "mgmt-ca.crt": "CA" },
    withheld: /the endpoint is not in the cluster file, and there is no --mgmt-ca/,
  },
  {
    name: "a StorageClass names and the CA of its Secret verifies instead of --mgmt-ca",
    scheme: "grpcs",
    options: ["--mgmt-ca", "CA"],
    secrets: { "mgmt-ca.crt": "CA" },
    withheld: /the certificate to trust is the call's and not that of --mgmt-ca/,
  },
  {
    name: "a StorageClass names and whose Secret turns verification off",
    scheme: "grpcs",
    options: ["--mgmt-ca", "CA"],
    secrets: { "mgmt-tls-verify": "false" },
    withheld: /the server's certificate is not verified/,
  },
  {
    name: "a StorageClass names without verification",
    scheme: "grpcs",
    options: ["--mgmt-ca", "CA", "--mgmt-tls-verify", "false"],
    withheld: /the server's certificate is not verified/,
  },
  {
    name: "the cluster file names over TLS",
    scheme: "grpcs",
    options: [],
    cluster: { ca: "CA" },
  },
  {
    name: "the cluster file names over TLS and the operator does not verify",
    scheme: "grpcs",
    options: [],
    cluster: { tlsVerify: false },
  },
  {
    name: "the cluster file names and whose Secret turns verification off",
    scheme: "grpcs",
    options: [],
    cluster: { ca: "CA" },
    secrets: { "mgmt-tls-verify": "false" },
    withheld: /the call's Secret turns verification off/,
  },
  {
    name: "the cluster file names over clear text",
    scheme: "grpc",
    options: [],
    cluster: { scheme: "grpc" },
    withheld: /clear text would show it/,
  },
  {
    name: "the cluster file names over clear text, with a jwt of its own",
    scheme: "grpc",
    options: [],
    cluster: { scheme: "grpc", jwt: "JWT" },
    arrives: "token.of.cluster",
  },
  {
    name: "a StorageClass names over clear text, with a token in its Secret",
    scheme: "grpc",
    options: [],
    secrets: { jwt: "token.of.secret" },
    arrives: "token.of.secret",
  },
];

for (const { name, scheme, options, cluster, secrets = {}, withheld, arrives } of cases) {
  const outcome = withheld === undefined
    ? `receives ${arrives === undefined ? "the token" : "that token"}`
    : "gets no token";
  Deno.test(`promise 11: with --jwt-path, an endpoint that ${name} ${outcome}`, async () => {
    const home = await Deno.makeTempDir({ prefix: "lbcsi-token-" });
    const testbed = new Testbed(home, [
      Deno.execPath(),
      "run",
      "-A",
      mainPath,
    ]);
    const patience = AbortSignal.timeout(60_000);
    await using server = await startListener(scheme === "grpcs");
    try {
      const { ca: caText } = await signed;
      const [ca, jwt, own, config] = ["ca.pem", "jwt", "own", "clusters.json"].map((file) => join(home, file)) as [
        string,
        string,
        string,
        string,
      ];
      await Deno.writeTextFile(ca, caText);
      await Deno.writeTextFile(jwt, token);
      await Deno.writeTextFile(own, "token.of.cluster");
      const words = options.map((word) => word === "CA" ? ca : word);
      if (cluster !== undefined) {
        const paths: Readonly<Record<string, string>> = { CA: ca, JWT: own };
        const entry = Object.entries(cluster).map(([key, value]) => [key, paths[String(value)] ?? value]);
        const text = { clusters: [{ name: "a", endpoints: server.address, ...Object.fromEntries(entry) }] };
        await Deno.writeTextFile(config, JSON.stringify(text));
        words.push("--config", config);
      }
      const { log } = await testbed.startService("controller", ["--jwt-path", jwt, ...words], patience);

      const within = () => ({ signal: patience, deadline: new Date(Date.now() + 15_000) });
      const given = Object.fromEntries(
        Object.entries(secrets).map(([key, value]) => [key, value === "CA" ? caText : value]),
      );
      const errors = await Promise.all([
        failure(testbed.controller.call(Controller.method.createVolume, {
          name: "pvc-1",
          capacityRange: { requiredBytes: 1n << 30n },
          volumeCapabilities: [{
            accessType: { case: "block", value: {} },
            accessMode: { mode: Mode.SINGLE_NODE_WRITER },
          }],
          parameters: { "mgmt-endpoint": server.address, "mgmt-scheme": scheme, "replica-count": "1" },
          secrets: given,
        }, within())),
        failure(testbed.controller.call(Controller.method.deleteVolume, {
          volumeId: `mgmt:${server.address}|nguid:6bb32fb5-99aa-4a4c-a4e7-30b7787bbd66|scheme:${scheme}`,
          secrets: given,
        }, within())),
      ]);

      deepStrictEqual([...new Set(server.tokens)], [withheld === undefined ? arrives ?? token : "none"]);
      for (const { code, message } of errors) {
        strictEqual(code, "UNAUTHENTICATED", message);
        if (withheld !== undefined) {
          ok(withheld.test(message), message);
          ok(message.includes(`and that of ${jwt} is not sent here: `), message);
          ok(
            /put "jwt" into the Secret .* or start the controller with --jwt-for-any-endpoint$/.test(message),
            message,
          );
        }
        strictEqual(message.includes(token), false, message);
      }
      strictEqual((await Deno.readTextFile(log)).includes(token), false);
    } finally {
      await testbed.stopAll();
      await testbed.cleanUp(false);
    }
  });
}

async function failure(call: Promise<unknown>): Promise<CallError> {
  try {
    await call;
  } catch (error) {
    if (error instanceof CallError) return error;
    throw error;
  }
  throw new Error("the call did not fail");
}

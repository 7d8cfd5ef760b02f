/**
 * Hostile input at every door: whatever comes in, the driver goes on, says what is wrong with the right code (never
 * INTERNAL, which is for faults of ours), touches nothing but what it was given, and runs no command with an argument that
 * the caller wrote as an option.
 *
 * Each door is tried for a fixed time from a fixed seed, so a run is repeated exactly on the same machine as far as it
 * gets: a second in the test suite, as long as requested with `deno task test:fuzz --seconds 60 [--seed N]`.
 */
import assert from "node:assert/strict";
import { parseArgs } from "node:util";
import { type DescMessage, type DescMethodUnary, fromBinary, type Message } from "@bufbuild/protobuf";
import grpc from "@grpc/grpc-js";
import fc from "fast-check";
import { type RequestContext, requestContext } from "../lib/context.ts";
import { controllerHandlers } from "../lib/csi/controller/service.ts";
import { identityHandlers } from "../lib/csi/identity.ts";
import { nodeHandlers } from "../lib/csi/node/service.ts";
import { describeRequest, redactRequest } from "../lib/csi/request.ts";
import { StatusError } from "../lib/error.ts";
import { CallError, Channel } from "../lib/grpc/client.ts";
import { serve, service } from "../lib/grpc/server.ts";
import { createDirectAttacher } from "../lib/host/attach/direct.ts";
import { createDiscoveryClientAttacher } from "../lib/host/attach/discovery_client.ts";
import { probeContent } from "../lib/host/filesystem/content.ts";
import { parseMountTable } from "../lib/host/mount_table.ts";
import { controllersOf } from "../lib/host/nvme/controllers.ts";
import { findDevice } from "../lib/host/nvme/devices.ts";
import { KeyedLock } from "../lib/lock.ts";
import { createLogger } from "../lib/log.ts";
import { fromPublishContext, parseAddress } from "../lib/namespace.ts";
import { Secrets } from "../lib/secrets.ts";
import { serveHttp } from "../lib/simulator/http.ts";
import { lightosBackend } from "../lib/storage/lightos/backend.ts";
import { parseConfig } from "../lib/storage/lightos/cluster_file.ts";
import { poseidonBackend } from "../lib/storage/poseidon/backend.ts";
import { parseSystems } from "../lib/storage/poseidon/cluster_file.ts";
import { parsePoseidonId, parseVolumeId } from "../lib/volume_id.ts";
import { Controller, Identity, Node, VolumeCapability_AccessMode_Mode as Mode } from "../proto/gen/csi_pb.ts";
import { DurosAPI } from "../proto/gen/lightos_pb.ts";
import { FakeHost } from "./support/fake_host.ts";
import { publishContext, volumeId } from "./support/node_calls.ts";
import { injected, randomMessage, spoiledMessage } from "./support/random_message.ts";
import { startSimulator } from "./support/simulator.ts";

const { values: options } = parseArgs({
  args: Deno.args,
  options: { seconds: { type: "string", default: "1" }, seed: { type: "string", default: "20261121" } },
});
const limitMs = Number(options.seconds) * 1000;
const seed = Number(options.seed);

const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
const nqn = "nqn.2019-09.com.example:cluster:1";
const quiet = createLogger("error", "json", () => {});

/** Tries `property` with values of `arbitrary` until the time is over, and says how many there were. */
async function fuzz<T>(
  door: string,
  arbitrary: fc.Arbitrary<T>,
  property: (value: T) => void | Promise<void>,
): Promise<void> {
  let tried = 0;
  await fc.assert(
    fc.asyncProperty(arbitrary, async (value) => {
      tried++;
      await property(value);
    }),
    { seed, numRuns: 1e8, interruptAfterTimeLimit: limitMs, markInterruptAsFailure: false, endOnFailure: true },
  );
  assert(tried > 10, `only ${tried} inputs were tried`);
  console.log(`${door}: ${tried} inputs`);
}

/** Fails for every error but one that was foreseen; INTERNAL is for answers of others that make no sense. */
function isForeseen(error: unknown, mayBeInternal: boolean): void {
  assert(error instanceof StatusError, `not foreseen: ${error instanceof Error ? error.stack : error}`);
  if (!mayBeInternal) assert.notEqual(error.code, "INTERNAL", error.message);
  assert.match(error.message, /^Cannot /);
}

function orForeseen(act: () => unknown): void {
  try {
    act();
  } catch (error) {
    isForeseen(error, false);
  }
}

const anyText = (...pieces: readonly string[]) =>
  fc.oneof(
    fc.array(fc.oneof(fc.constantFrom(...pieces), fc.string({ unit: "binary", maxLength: 8 })), { maxLength: 20 })
      .map((parts) => parts.join("")),
    fc.string({ unit: "binary", maxLength: 200 }),
  );

Deno.test("fuzz: volume and snapshot IDs", async () => {
  const pieces = ["mgmt:", "192.0.2.1:443", "[2001:db8::1]:443", ",", "|nguid:", uuid, "|proj:", "default", "|scheme:"];
  await fuzz("IDs", anyText(...pieces, "grpcs", "|hostcrypto:luks2", "|", "\0", "pos:", "vol:"), (text) => {
    orForeseen(() => parseVolumeId(text));
    orForeseen(() => parseVolumeId(text, "snapshot"));
  });
  const ofPoseidon = [
    "pos:",
    "192.0.2.1:3000",
    "[2001:db8::1]:3000",
    "|array:",
    "POSArray",
    "|vol:",
    "pvc-1",
    "|uuid:",
    uuid,
  ];
  await fuzz("IDs of PoseidonOS", anyText(...ofPoseidon, "|", ",", "\0", " "), (text) => {
    orForeseen(() => parsePoseidonId(text));
    orForeseen(() => parsePoseidonId(`pos:192.0.2.1:3000|array:${text}|vol:pvc-1|uuid:${uuid}`));
  });
});

Deno.test("fuzz: publish contexts and addresses", async () => {
  const good = publishContext(uuid);
  const value = anyText(uuid, nqn, "192.0.2.1:4420", "[2001:db8::1]:4420", ",", ":", "lbcsi/1", "%eth0");
  const key = fc.constantFrom(...Object.keys(good), "__proto__", "toString");
  await fuzz("publish contexts", fc.tuple(fc.dictionary(key, value), fc.boolean()), ([changes, whole]) => {
    orForeseen(() => fromPublishContext(whole ? { ...good, ...changes } : changes));
    for (const text of Object.values(changes)) parseAddress(text);
  });
});

Deno.test("fuzz: cluster files", async () => {
  const pieces = [
    "clusters:\n",
    "  - name: a\n",
    "    endpoints: 192.0.2.1:443\n",
    "    jwt: /j\n",
    "[",
    "{",
    "&a ",
    "*a",
    "|\n",
  ];
  await fuzz("cluster files", anyText(...pieces, "    ", "- ", ": ", "!!js/function ", "<<: "), (text) => {
    orForeseen(() => parseConfig("/c", text));
  });
});

Deno.test("fuzz: cluster files of PoseidonOS", async () => {
  const pieces = ["systems:\n", "  - name: a\n", "    endpoint: 192.0.2.1:3000\n", "    arrays: [POSArray]\n"];
  await fuzz("cluster files of PoseidonOS", anyText(...pieces, "    idEndpoint: ", "&a *a", "? ", "{", "]"), (text) => {
    orForeseen(() => parseSystems("/c.yaml", text));
  });
});

Deno.test("fuzz: mount tables, sysfs and the output of tools", async () => {
  const pieces = [
    "30 1 259:1 / /staging rw - ext4 /dev/nvme0n1 rw\n",
    " - ",
    "259:1",
    "\\040",
    "/dev/nvme0n1",
    "\n",
    "0:6 ",
  ];
  const output = anyText(
    ...pieces,
    "TYPE=",
    "PTTYPE=",
    "ext4",
    "DEVNAME=/dev/nvme0n1\n",
    "traddr=",
    "uuid.",
    uuid,
    "live",
  );
  await fuzz("tools and sysfs", fc.tuple(output, output, output, fc.nat(255)), async ([first, second, third, code]) => {
    parseMountTable(first);
    const host = new FakeHost();
    host.addNamespace(uuid, nqn).content = { fsType: "ext4", fsBytes: 1n << 30n };
    host.connect(nqn);
    const device = await findDevice(host, uuid);
    assert(device !== undefined);
    host.answers.set("blkid", { code, stdout: first, stderr: second });
    try {
      await probeContent(host, within(5000), device);
    } catch (error) {
      isForeseen(error, false);
    }
    const readText = host.readText.bind(host);
    host.readText = async (path) => /address|wwid|\/uuid|size|state/.test(path) ? third : await readText(path);
    await controllersOf(host, nqn).catch((error) => isForeseen(error, false));
    await findDevice(host, uuid).catch((error) => isForeseen(error, false));
  });
});

function within(ms: number): RequestContext {
  return requestContext(AbortSignal.timeout(ms), new Date(Date.now() + ms), quiet);
}

/** What of `values` a message of this schema has. */
function fieldsOf(schema: DescMessage, values: Readonly<Record<string, unknown>>): Readonly<Record<string, unknown>> {
  const names = new Set(schema.members.map(({ localName }) => localName));
  return Object.fromEntries(Object.entries(values).filter(([name]) => names.has(name)));
}

/** A machine that notes what was changed on it. */
class WatchedHost extends FakeHost {
  readonly touched: string[] = [];

  override makeDirectory(path: string): Promise<void> {
    this.touched.push(path);
    return super.makeDirectory(path);
  }
  override makeFile(path: string): Promise<void> {
    this.touched.push(path);
    return super.makeFile(path);
  }
  override removeEmpty(path: string): Promise<void> {
    this.touched.push(path);
    return super.removeEmpty(path);
  }
  override replaceText(path: string, text: string): Promise<void> {
    this.touched.push(path);
    return super.replaceText(path, text);
  }
  override remove(path: string): Promise<void> {
    this.touched.push(path);
    return super.remove(path);
  }
}

for (const attach of ["discovery-client", "direct"] as const) {
  Deno.test(`fuzz: every call of the node service (${attach})`, async () => {
    const words = [
      ...[volumeId(uuid), "/staging", "/pods/a", "/pods/b", "/pods/../etc", "/etc", "/dev/nvme0n1", "ext4", "xfs"],
      ...[
        "noatime",
        "ro",
        `${injected},rw`,
        "mkfs-options",
        "-m 0",
        `-E ${injected}`,
        "csi.storage.k8s.io/ephemeral",
        "true",
      ],
      ...Object.entries(publishContext(uuid)).flat(),
    ];
    const calls = Node.methods.flatMap((method) => method.methodKind === "unary" ? [method] : []);
    const good = {
      volumeId: volumeId(uuid),
      publishContext: publishContext(uuid),
      stagingTargetPath: "/staging",
      targetPath: "/pods/a",
      volumePath: "/pods/a",
      volumeCapability: {
        accessMode: { mode: Mode.SINGLE_NODE_MULTI_WRITER },
        accessType: { case: "mount", value: { fsType: "ext4" } },
      },
    };
    const request = (method: typeof calls[number]) =>
      fc.oneof(
        { weight: 1, arbitrary: randomMessage(method.input, words) },
        { weight: 3, arbitrary: spoiledMessage(method.input, fieldsOf(method.input, good), words) },
      ).map((request) => ({ method, request }));
    const sequence = fc.array(fc.oneof(...calls.map(request)), { minLength: 1, maxLength: 6 });
    await fuzz(`node service, ${attach}`, sequence, async (steps) => {
      const host = new WatchedHost();
      host.addNamespace(uuid, publishContext(uuid)["subsystem-nqn"] ?? "");
      const locks = new KeyedLock();
      const attacher = attach === "direct"
        ? createDirectAttacher({ host, hostNqn: "nqn.h:n1", hostId: uuid, locks })
        : createDiscoveryClientAttacher({ host, directory: host.discoveryDirectory, hostNqn: "nqn.h:n1" });
      const handlers = nodeHandlers({
        host,
        attacher,
        locks,
        nodeId: "n1.node",
        defaultFsType: "ext4",
        parseId: parseVolumeId,
        canExpand: true,
      });
      for (const { method, request } of steps) {
        // Longer waits are for devices that never come.
        const call = { ...within(20), header: () => undefined };
        const handler = handlers[method.localName as keyof typeof handlers] as
          | ((request: Message, call: RequestContext) => Promise<unknown>)
          | undefined;
        try {
          describeRequest(method, request);
          redactRequest(method, request);
          await handler?.(request, call);
        } catch (error) {
          if (!(error instanceof DOMException)) isForeseen(error, false);
        }
      }
      const given = steps.flatMap(({ request }) => Object.values(request).filter((value) => typeof value === "string"));
      for (const path of host.touched) {
        const isGiven = given.some((text) => text.startsWith("/") && text.replace(/\/+$/, "") === path);
        assert(isGiven || path.startsWith(`${host.discoveryDirectory}/`), `${path} was touched`);
        assert(!path.split("/").includes(".."), path);
      }
      for (const command of host.commands) {
        assert.doesNotMatch(command, /(^| )--injected/, command);
      }
    });
  });
}

Deno.test("fuzz: every call of controller and identity, through the socket", async () => {
  await using simulator = await startSimulator();
  await using backend = lightosBackend({
    log: quiet,
    globalJwt: () => simulator.addresses.jwt,
    globalJwtPath: "/etc/lb-csi/jwt",
    globalJwtFor: "any endpoint",
    ca: undefined,
    verifyTls: true,
    userAgent: "lbcsi/fuzz",
  });
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-fuzz-" });
  const path = `${directory}/csi.sock`;
  const server = await serve({
    listen: { path },
    log: createLogger("debug", "json", () => {}),
    describe: describeRequest,
    redact: redactRequest,
    services: [
      service(
        Controller,
        controllerHandlers({ backend, locks: new KeyedLock(), defaultFsType: "ext4", nodeIdSuffix: ".node" }),
      ),
      service(
        Identity,
        identityHandlers({ name: "fuzz.example", version: "0", expansion: true, snapshotMetadata: false }),
      ),
    ],
  });
  try {
    using channel = new Channel({ address: `unix://${path}` });
    const endpoint = simulator.addresses.grpc.join(",");
    const words = [
      ...[
        "mgmt-endpoint",
        endpoint,
        "mgmt-scheme",
        "grpc",
        "replica-count",
        "1",
        "project-name",
        "default",
        "compression",
      ],
      ...[
        "enabled",
        "qos-policy-name",
        "jwt",
        "pvc-1",
        "snapshot-1",
        "a.node",
        "b.node",
        "ext4",
        "xfs",
        "mkfs-options",
      ],
      ...[injected, "127.0.0.1:1", `mgmt:${endpoint}|nguid:${uuid}|proj:default|scheme:grpc`],
    ];
    const calls = [...Controller.methods, ...Identity.methods].flatMap((method) =>
      method.methodKind === "unary" ? [method] : []
    );
    const creation = (name: string) => ({
      name,
      capacityRange: { requiredBytes: 1n << 30n },
      volumeCapabilities: [{ accessMode: { mode: 1 }, accessType: { case: "block" as const, value: {} } }],
      parameters: { "mgmt-endpoint": endpoint, "mgmt-scheme": "grpc", "replica-count": "1", "project-name": "default" },
    });
    const until = () => ({ signal: AbortSignal.timeout(20_000), deadline: new Date(Date.now() + 1500) });
    const { volume } = await channel.call(Controller.method.createVolume, creation("pvc-1"), until());
    words.push(volume?.volumeId ?? "");
    const good = {
      ...creation("pvc-1"),
      volumeId: volume?.volumeId,
      sourceVolumeId: volume?.volumeId,
      nodeId: "a.node",
      volumeCapability: creation("").volumeCapabilities[0],
      mutableParameters: { compression: "enabled" },
    };
    const request = fc.oneof(
      ...calls.flatMap((method) =>
        [
          randomMessage(method.input, words),
          spoiledMessage(method.input, fieldsOf(method.input, good), words),
        ].map((requests) => requests.map((request) => ({ method, request })))
      ),
    );
    await fuzz("controller and identity", request, async ({ method, request }) => {
      try {
        await channel.call(method as DescMethodUnary, request, until());
      } catch (error) {
        assert(error instanceof CallError, String(error));
        assert(
          !["INTERNAL", "UNKNOWN", "DATA_LOSS"].includes(error.code),
          `${method.name}: ${error.code} ${error.message}`,
        );
        assert.equal(error.origin, "server", error.message);
      }
    });
    // And it still does its work.
    await channel.call(Controller.method.createVolume, creation("pvc-after"), until());
  } finally {
    await server.stop(5000);
    await Deno.remove(directory, { recursive: true });
  }
});

Deno.test("fuzz: bytes that are no message answer INVALID_ARGUMENT", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-fuzz-" });
  const path = `${directory}/csi.sock`;
  const handlers = nodeHandlers({
    host: new FakeHost(),
    attacher: createDiscoveryClientAttacher({ host: new FakeHost(), directory: "/d", hostNqn: "nqn.h:n1" }),
    locks: new KeyedLock(),
    nodeId: "n1.node",
    defaultFsType: "ext4",
    parseId: parseVolumeId,
    canExpand: true,
  });
  const server = await serve({ listen: { path }, log: quiet, services: [service(Node, handlers)] });
  const client = new grpc.Client(`unix://${path}`, grpc.credentials.createInsecure());
  const method = Node.method.nodeStageVolume;
  try {
    await fuzz("bytes", fc.uint8Array({ minLength: 1, maxLength: 200 }), async (bytes) => {
      let isMessage = true;
      try {
        fromBinary(method.input, bytes);
      } catch {
        isMessage = false;
      }
      const error = await new Promise<grpc.ServiceError | null>((resolve) =>
        client.makeUnaryRequest(
          `/${method.parent.typeName}/${method.name}`,
          (bytes: Uint8Array) => Buffer.from(bytes),
          (bytes) => bytes,
          bytes,
          (error) => resolve(error),
        )
      );
      assert(error !== null);
      assert.equal(grpc.status[error.code], "INVALID_ARGUMENT", error.details);
      if (!isMessage) assert.match(error.details, /^Cannot read the request of NodeStageVolume: /);
    });
  } finally {
    client.close();
    await server.stop(5000);
    await Deno.remove(directory, { recursive: true });
  }
});

Deno.test("fuzz: whatever a management API answers, the error is foreseen and says who spoke", async () => {
  let answer: Message | StatusError = new StatusError("UNAVAILABLE", "Cannot do it: not yet");
  const handlers = Object.fromEntries(
    DurosAPI.methods.map((method) => [
      method.localName,
      () => {
        if (method.name === "GetVersion") return Promise.resolve({ apiVersion: "v2.0" });
        if (answer instanceof StatusError) return Promise.reject(answer);
        return Promise.resolve(answer.$typeName === method.output.typeName ? answer : {});
      },
    ]),
  );
  const server = await serve({
    listen: { host: "127.0.0.1", port: 0 },
    log: quiet,
    services: [service(DurosAPI, handlers)],
  });
  const endpoint = `127.0.0.1:${server.port}`;
  await using backend = lightosBackend({
    log: quiet,
    globalJwt: () => "token",
    globalJwtPath: "/etc/lb-csi/jwt",
    globalJwtFor: "any endpoint",
    ca: undefined,
    verifyTls: true,
    userAgent: "lbcsi/fuzz",
  });
  try {
    const id = `mgmt:${endpoint}|nguid:${uuid}|proj:default|scheme:grpc`;
    const words = [
      uuid,
      "default",
      nqn,
      endpoint,
      "ALLOW_NONE",
      "ALLOW_ANY",
      "pvc-1",
      "nqn.host",
      "192.0.2.1:4420",
      "",
    ];
    const used = DurosAPI.methods.filter(({ name }) => /Volume|Snapshot|GetClusterInfo|GetCluster$/.test(name));
    const message = fc.oneof(...used.map((method) => randomMessage(method.output, words)));
    const none = new Secrets();
    const request = {
      name: "pvc-1",
      requiredBytes: 1n << 30n,
      limitBytes: 0n,
      parameters: { "mgmt-endpoint": endpoint, "mgmt-scheme": "grpc", "replica-count": "1", "project-name": "default" },
    };
    const asked = [
      (ctx: RequestContext) => backend.createVolume(ctx, none, request),
      (ctx: RequestContext) => backend.getVolume(ctx, none, id),
      (ctx: RequestContext) => backend.grantAccess(ctx, none, id, { hostNqn: "nqn.host", shared: false }),
      (ctx: RequestContext) => backend.revokeAccess(ctx, none, id, "nqn.host"),
      (ctx: RequestContext) => backend.deleteVolume(ctx, none, id),
      (ctx: RequestContext) =>
        backend.expansion?.expandVolume(ctx, none, id, { requiredBytes: 2n << 30n, limitBytes: 0n }),
      (ctx: RequestContext) => backend.snapshots?.createSnapshot(ctx, none, { name: "s", sourceVolumeId: id }),
      (ctx: RequestContext) => backend.capacity?.getCapacity(ctx, request.parameters),
    ];
    await fuzz("answers of the management API", fc.tuple(message, fc.nat(asked.length - 1)), async ([told, which]) => {
      answer = told;
      const call = asked[which];
      assert(call !== undefined);
      const deadline = AbortSignal.timeout(60);
      const timeout = new AbortController();
      deadline.addEventListener(
        "abort",
        () => timeout.abort(new StatusError("DEADLINE_EXCEEDED", "Cannot wait: too slow")),
      );
      try {
        await call(requestContext(timeout.signal, new Date(Date.now() + 60), quiet));
      } catch (error) {
        isForeseen(error, true);
      }
    });
  } finally {
    await server.stop(5000);
  }
});

Deno.test("fuzz: whatever DAgent answers, the error is foreseen, and nothing harmful is asked for", async () => {
  const name = "POSArray";
  const base = "/api/ibofos/v1";
  let answer: unknown;
  let status = 200;
  const server = await serveHttp("127.0.0.1", 0, ({ method, path }) => {
    assert.match(
      `${method} ${path}`,
      /^(GET|POST|DELETE) \/api\/ibofos\/v1\/(array|volume|subsystem|listener|transports|qos)/,
    );
    assert(!path.includes("reset"));
    // An answer for each route, so that some flows get beyond their first question.
    const data = typeof answer === "object" && answer !== null
      ? Reflect.get(answer, path.slice(base.length))
      : undefined;
    const envelope = { result: { status: { code: 0 }, data } };
    const body = JSON.stringify(data === undefined ? answer : envelope) ?? "";
    return Promise.resolve({ status: data === undefined ? status : 200, headers: {}, body });
  });
  await using backend = poseidonBackend({ log: quiet });
  try {
    const [provisionerIP = "", provisionerPort = ""] = server.address.split(":");
    const parameters = { provisionerIP, provisionerPort, arrayName: name, targetAddress: "192.0.2.9" };
    const id = `pos:${server.address}|array:${name}|vol:pvc-1|uuid:${uuid}`;
    const text = fc.oneof(fc.constantFrom("NORMAL", "Mounted", "Unmounted", "pvc-1", uuid, nqn, "0", ""), fc.string());
    const number = fc.oneof(fc.constantFrom("0", "1048576", 0, 1048576, -1), fc.integer(), fc.double());
    const some = (fields: Record<string, fc.Arbitrary<unknown>>) => fc.record(fields, { requiredKeys: [] });
    const volume = some({ name: text, uuid: text, index: number, total: number, status: text, maxiops: number });
    const subsystem = some({
      nqn: fc.constantFrom(nqn, `nqn.2019-04.pos:lbcsi:${uuid}:a.node`, `nqn.2019-04.pos:lbcsi:${uuid}:b.node`, ""),
      listenAddresses: fc.array(some({ transportType: text, targetAddress: text, transportServiceId: text })),
      namespaces: fc.array(some({ nsid: number, bdevName: text, uuid: text })),
    });
    const replies = some({
      [`/array/${name}`]: some({ state: fc.constant("NORMAL"), situation: text, capacity: number, used: number }),
      [`/volumelist/${name}`]: fc.oneof(some({ volumes: fc.array(volume) }), fc.anything()),
      "/subsystem": fc.oneof(some({ subsystemlist: fc.array(subsystem) }), fc.anything()),
    });
    const refused = fc.integer({ min: 1000, max: 12_000 }).map((code) => ({ result: { status: { code } } }));
    const told = fc.oneof(replies, refused, fc.json().map((json) => JSON.parse(json)), fc.string());
    const none = new Secrets();
    const grant = { hostNqn: "nqn.2019-09.com.lightbitslabs:host:a.node", shared: false, volumeContext: parameters };
    const asked = [
      (ctx: RequestContext) =>
        backend.createVolume(ctx, none, { name: "pvc-1", requiredBytes: 1n << 20n, limitBytes: 0n, parameters }),
      (ctx: RequestContext) => backend.getVolume(ctx, none, id),
      (ctx: RequestContext) => backend.grantAccess(ctx, none, id, grant),
      (ctx: RequestContext) => backend.revokeAccess(ctx, none, id, grant.hostNqn),
      (ctx: RequestContext) => backend.revokeAccess(ctx, none, id, undefined),
      (ctx: RequestContext) => backend.deleteVolume(ctx, none, id),
      (ctx: RequestContext) => backend.modification?.modifyVolume(ctx, none, id, { maxiops: "100" }),
    ];
    const statuses = fc.constantFrom(200, 207, 400, 404, 500, 503);
    await fuzz("answers of DAgent", fc.tuple(told, statuses, fc.nat(asked.length - 1)), async ([body, code, which]) => {
      [answer, status] = [body, code];
      const timeout = new AbortController();
      const timer = setTimeout(() => timeout.abort(new StatusError("DEADLINE_EXCEEDED", "Cannot wait: too slow")), 60);
      try {
        await asked[which]?.(requestContext(timeout.signal, new Date(Date.now() + 60), quiet));
      } catch (error) {
        isForeseen(error, true);
      } finally {
        clearTimeout(timer);
      }
    });
  } finally {
    await server[Symbol.asyncDispose]();
  }
});

/**
 * DAgent's REST API, spoken for a simulated PoseidonOS (facts: docs/reference/poseidonos-api.md sections 5 and 6).
 *
 * Its habits are kept, the bad ones too: one lock around everything that PoseidonOS is asked, HTTP status 400 with code 0
 * for what DAgent itself refuses, fields that vanish when they are zero, and a lock that is never let go of after a request
 * without `param` on some routes. Routes that harm are there and answer nothing good; `harmful` tells who called them.
 */
import * as z from "zod";
import { simulatorMark } from "../../check.ts";
import { type Logger, sleep } from "../../context.ts";
import { messageOf } from "../../error.ts";
import type { Faults } from "../faults.ts";
import { type HttpAnswer, type HttpRequest, type HttpServer, serveHttp } from "../http.ts";
import { events, type PosArray, type PoseidonModel, type PosEvent, PosRefusal, type PosVolume } from "./system.ts";

export interface PoseidonApiOptions {
  readonly model: PoseidonModel;
  readonly faults: Faults;
  readonly host: string;
  /** 0 takes a free one. */
  readonly port: number;
  readonly log: Logger;
}

/** A DAgent that listens. */
export interface PoseidonApi extends HttpServer {
  /** Requests that would have harmed a real system, `GET /api/ibofos/v1/arrays/reset` and the like. */
  readonly harmful: readonly string[];
  /** Lets go of a lock that a bad request has left taken, as a DAgent that is started again. */
  unlock(): void;
}

const base = "/api/ibofos/v1";
const version = { "1.0": "v1.0.0-rc2", "0.11": "v0.11.2" } as const;

/** DAgent refuses the request before PoseidonOS hears of it. */
class BadRequest extends Error {}

/** Waits for ever, as what DAgent's lock does to everybody after a panic. */
const forever = new Promise<never>(() => {});

interface Call {
  readonly argument: string;
  readonly secondArgument: string;
  readonly param: Readonly<Record<string, unknown>> | undefined;
}

interface Route {
  readonly rpc: string;
  readonly method: "GET" | "POST" | "DELETE";
  readonly path: RegExp;
  /** Panics without `param`, and takes the lock with it. */
  readonly wedges?: boolean;
  run(call: Call): Promise<unknown> | unknown;
}

/** Serves until it is disposed. */
export async function servePoseidon({ model, faults, host, port, log }: PoseidonApiOptions): Promise<PoseidonApi> {
  const harmful: string[] = [];
  let lock: Promise<unknown> = Promise.resolve();
  let unlocked = Promise.withResolvers<void>();
  const routes = routesOf(model);

  /** What PoseidonOS is asked, one call after the other. */
  const inTurn = (work: () => Promise<HttpAnswer | undefined>): Promise<HttpAnswer | undefined> => {
    const turn = lock.then(work, work);
    lock = turn.catch(() => {});
    return turn;
  };

  const answer = async (request: HttpRequest): Promise<HttpAnswer | undefined> => {
    const path = request.path.split("?")[0] ?? "";
    const where = `${request.method} ${path}`;
    const requestId = request.headers.get("x-request-id") ?? "";
    const reply = (status: number, body: string, type = "application/json") => ({
      status,
      headers: { "Content-Type": type, "X-request-Id": requestId },
      body,
    });
    if (harms.some((route) => route.test(where))) {
      harmful.push(where);
      log.error("harmful request", { request: where });
      return reply(500, "");
    }
    const found = routes.find((route) => route.method === request.method && route.path.test(path.slice(base.length)));
    if (found === undefined || !path.startsWith(base)) return reply(404, "404 page not found", "text/plain");
    const { rpc } = found;
    faults.count(rpc, server.address);
    const refused = reply(400, JSON.stringify(envelope(model, { code: 0, event: "", cause: "" })));
    if (!isUuidText(requestId)) return refused;
    const param = request.method === "GET" ? {} : paramOf(request.body);
    if (param === "not JSON") return refused;
    const [, first = "", second = ""] = found.path.exec(path.slice(base.length)) ?? [];
    const call: Call = { argument: decodeURIComponent(first), secondArgument: decodeURIComponent(second), param };
    const subject = call.secondArgument || call.argument || String(param?.["name"] ?? "");
    return await inTurn(async () => {
      const rule = faults.take(rpc, server.address);
      const status = (event: PosEvent, cause: string) =>
        reply(400, JSON.stringify(envelope(model, { ...codeOf(model, event), cause })));
      /** What the rule does at this point; "go on" unless it has the last word. */
      const strike = async (when: "before" | "after"): Promise<HttpAnswer | undefined | "go on"> => {
        if (rule?.when !== when) return "go on";
        if (rule.hold === true) {
          const held = faults.hold({ rpc, endpoint: server.address, when }, request.signal);
          const isGone = await held.then(() => false, () => true);
          // As if it had been lost on its way here.
          if (isGone && when === "before") return undefined;
        }
        if (rule.drop === true) return undefined;
        if (rule.event === undefined) return "go on";
        if (rule.event === "panic") return reply(500, "");
        return status(isEvent(rule.event) ? rule.event : "POS_UNREACHABLE", rule.message ?? "told to fail");
      };
      faults.report({ phase: "begin", rpc, subject });
      try {
        const delayMs = (rule?.delayMs ?? 0) + model.behaviour.callMs;
        // A caller that is gone changes nothing for PoseidonOS.
        if (delayMs > 0) await sleep(delayMs, new AbortController().signal);
        if (model.behaviour.dead) return status("POS_UNREACHABLE", "cannot dial the server");
        if (found.wedges === true && param === undefined) {
          harmful.push(`${where} without param`);
          await Promise.race([unlocked.promise, forever]);
          return reply(500, "");
        }
        const before = await strike("before");
        if (before !== "go on") return before;
        const data = await found.run(call);
        const after = await strike("after");
        if (after !== "go on") return after;
        return reply(200, JSON.stringify(envelope(model, { code: 0, event: "SUCCESS", cause: "" }, data), bigints));
      } catch (error) {
        if (error instanceof BadRequest || error instanceof z.ZodError) return refused;
        if (error instanceof PosRefusal) return status(error.event, error.message);
        log.error("DAgent failed", { request: where, error: messageOf(error) });
        return reply(500, "");
      } finally {
        faults.report({ phase: "end", rpc, subject });
      }
    });
  };
  const server = await serveHttp(host, port, answer);
  return {
    get address() {
      return server.address;
    },
    get state() {
      return server.state;
    },
    harmful,
    unlock: () => {
      unlocked.resolve();
      unlocked = Promise.withResolvers();
    },
    stop: () => server.stop(),
    start: () => server.start(),
    hang: () => server.hang(),
    dropConnections: () => server.dropConnections(),
    async [Symbol.asyncDispose]() {
      unlocked.resolve();
      await server[Symbol.asyncDispose]();
    },
  };
}

const harms = [
  /^GET .*\/arrays\/reset$/,
  /^DELETE \/api\/dagent\/v1\/(ibofos|dagent)$/,
  /^DELETE \/api\/ibofos\/v1\/system$/,
];

function isUuidText(text: string): boolean {
  return /^(urn:uuid:)?\{?[0-9a-fA-F]{8}-?([0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}\}?$/.test(text);
}

/** `param` of a body, its keys in lower case; undefined when there is none. */
function paramOf(body: string): Readonly<Record<string, unknown>> | undefined | "not JSON" {
  if (body.trim() === "") return undefined;
  try {
    const parsed = z.object({ param: z.record(z.string(), z.unknown()).optional() }).parse(JSON.parse(body));
    if (parsed.param === undefined) return undefined;
    return Object.fromEntries(Object.entries(parsed.param).map(([key, value]) => [key.toLowerCase(), value]));
  } catch {
    return "not JSON";
  }
}

function isEvent(text: string): text is PosEvent {
  return Object.hasOwn(events, text);
}

function codeOf({ behaviour }: PoseidonModel, event: PosEvent): { readonly code: number; readonly event: string } {
  const isOld = behaviour.generation === "0.11";
  return { code: events[event][isOld ? 1 : 0], event: isOld || event === "POS_UNREACHABLE" ? "" : event };
}

function envelope(
  { behaviour, dataPlane }: PoseidonModel,
  { code, event, cause }: { readonly code: number; readonly event: string; readonly cause: string },
  data?: unknown,
) {
  return {
    rid: crypto.randomUUID(),
    lastSuccessTime: 0,
    result: {
      status: {
        module: "",
        code,
        ...(behaviour.generation === "0.11" ? {} : { eventName: event, cause }),
        description: cause,
        posDescription: "",
      },
      ...(data === undefined ? {} : { data }),
    },
    // What follows the "+" means nothing in a version, so it can tell lbcsi doctor who answers.
    info: { version: `${version[behaviour.generation]}+${simulatorMark}:${dataPlane.kind}` },
  };
}

/** 64-bit numbers are texts, and were numbers in older versions (see `wide`). */
function bigints(_key: string, value: unknown): unknown {
  return typeof value === "bigint" ? value.toString() : value;
}

/** Without the fields that are zero or empty, deep down. */
function pruned(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(pruned);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, entry]) => [key, pruned(entry)] as const).filter(([, entry]) =>
      !(entry === 0 || entry === 0n || entry === "" || entry === "0" || entry === false || entry === undefined ||
        (Array.isArray(entry) && entry.length === 0))
    ),
  );
}

const text = z.string().default("");
const whole = z.number().int().default(0);

function routesOf(model: PoseidonModel): readonly Route[] {
  const wide = (value: bigint) => model.behaviour.generation === "0.11" ? Number(value) : value.toString();
  const read = <T>(schema: z.ZodType<T>, { param }: Call): T => schema.parse(param ?? {});
  const inArray = z.object({ array: text });
  const describeVolume = (volume: PosVolume, subnqn: string, arrayname: string, index: number) => ({
    name: volume.name,
    index,
    total: wide(volume.sizeBytes),
    remain: wide(volume.isMounted ? volume.sizeBytes : 0n),
    status: volume.isMounted ? "Mounted" : "Unmounted",
    maxiops: wide(volume.maxiops),
    maxbw: wide(volume.maxbw),
    miniops: wide(0n),
    minbw: wide(0n),
    subnqn,
    uuid: volume.uuid,
    arrayname,
  });
  const describeArray = (array: PosArray) => ({
    index: array.index,
    name: array.name,
    capacity: wide(array.capacityBytes),
    used: wide(model.usedBytes(array)),
    dataRaid: "RAID5",
  });
  return [
    {
      rpc: "GetSystem",
      method: "GET",
      path: /^\/system$/,
      run: () => ({ version: version[model.behaviour.generation], systemManufacturer: "lbcsi simulator" }),
    },
    {
      rpc: "ListArrays",
      method: "GET",
      path: /^\/arrays$/,
      run() {
        if (model.arrays.length === 0) throw new PosRefusal("CLI_LIST_ARRAY_NO_ARRAY_EXISTS", "no array");
        const mounted = (array: PosArray) => ["NORMAL", "BUSY"].includes(array.state) ? "Mounted" : "Unmounted";
        return {
          arrayList: model.arrays.map((array) => ({
            ...describeArray(array),
            uniqueId: "",
            status: mounted(array),
            state: "",
            situation: "",
            rebuildingProgress: "",
            devicelist: [],
          })),
        };
      },
    },
    {
      rpc: "GetArray",
      method: "GET",
      path: /^\/array\/([^/]+)$/,
      run({ argument }) {
        const array = model.array(argument, "CLI_ARRAY_INFO_ARRAY_NOT_EXIST");
        const { uniqueId, state, situation } = array;
        return pruned({ ...describeArray(array), uniqueId, state, situation });
      },
    },
    {
      rpc: "ListVolumes",
      method: "GET",
      path: /^\/volumelist\/([^/]+)$/,
      run({ argument }) {
        const array = model.array(argument, "LIST_VOL_ARRAY_NAME_DOES_NOT_EXIST");
        if (array.state === "STOP") throw new PosRefusal("CLI_COMMAND_FAILURE_ARRAY_BROKEN", "array is broken");
        const volumes = model.volumesOf(array);
        if (volumes.length === 0) return undefined;
        return { volumes: volumes.map((volume) => describeVolume(volume, "", "", volume.index)) };
      },
    },
    {
      rpc: "GetVolume",
      method: "GET",
      path: /^\/array\/([^/]+)\/volume\/([^/]+)$/,
      run({ argument, secondArgument }) {
        const array = model.array(argument, "VOL_INFO_ARRAY_NAME_DOES_NOT_EXIST");
        const volume = model.volume(array, secondArgument);
        return describeVolume(volume, model.subsystemOf(volume)?.nqn ?? "", array.name, 0);
      },
    },
    {
      rpc: "CreateVolume",
      method: "POST",
      path: /^\/volumes$/,
      async run(call) {
        const param = read(
          z.object({
            array: text,
            name: text,
            uuid: text,
            size: whole,
            maxiops: whole,
            maxbw: whole,
            totalcount: whole,
            iswalvol: z.boolean().default(false),
          }),
          call,
        );
        if (call.param === undefined) throw new Error("a nil pointer");
        if (param.totalcount > 1) throw new BadRequest();
        const { size, maxiops, maxbw } = param;
        await model.createVolume({
          ...param,
          sizeBytes: BigInt(size),
          maxiops: BigInt(maxiops),
          maxbw: BigInt(maxbw),
        });
        return {};
      },
    },
    {
      rpc: "DeleteVolume",
      method: "DELETE",
      path: /^\/volumes\/([^/]+)$/,
      run: (call) => model.deleteVolume(read(inArray, call).array, nameIn(call)),
    },
    {
      rpc: "MountVolume",
      method: "POST",
      path: /^\/volumes\/([^/]+)\/mount$/,
      run(call) {
        const { array, subnqn } = read(z.object({ array: text, subnqn: text, nsid: whole }), call);
        return model.mountVolume(array, nameIn(call), subnqn);
      },
    },
    {
      rpc: "UnmountVolume",
      method: "DELETE",
      path: /^\/volumes\/([^/]+)\/mount$/,
      run: (call) => model.unmountVolume(read(inArray, call).array, nameIn(call)),
    },
    {
      rpc: "ListSubsystems",
      method: "GET",
      path: /^\/subsystem$/,
      run: () => ({
        subsystemlist: [
          { nqn: "nqn.2014-08.org.nvmexpress.discovery", subtype: "Discovery", allowAnyHost: 1 },
          ...model.subsystems.map((subsystem) =>
            pruned({
              nqn: subsystem.nqn,
              subtype: "NVMe",
              allowAnyHost: subsystem.allowAnyHost ? 1 : 0,
              serialNumber: subsystem.serialNumber,
              modelNumber: subsystem.modelNumber,
              maxNamespaces: subsystem.maxNamespaces,
              uuid: subsystem.uuid,
              listenAddresses: subsystem.listeners.map((listener) => ({
                transportType: "TCP",
                addressFamily: "IPv4",
                ...listener,
              })),
              namespaces: subsystem.namespaces.map(({ nsid, array, volumeUuid }) => {
                const volume = model.arrays.flatMap(({ volumes }) => volumes).find(({ uuid }) => uuid === volumeUuid);
                const bdev = `bdev_${volume?.index}_${array}`;
                return model.behaviour.generation === "0.11"
                  ? { nsid, bdev_name: bdev }
                  : { nsid, bdevName: bdev, uuid: volumeUuid };
              }),
            })
          ),
        ],
      }),
    },
    {
      rpc: "CreateSubsystem",
      method: "POST",
      path: /^\/subsystem$/,
      run(call) {
        const wish = read(
          z.object({
            nqn: text,
            serialnumber: text,
            modelnumber: text,
            maxnamespaces: whole,
            allowanyhost: z.boolean().default(false),
            anareporting: z.boolean().default(false),
          }),
          call,
        );
        model.createSubsystem({
          nqn: wish.nqn,
          serialNumber: wish.serialnumber,
          modelNumber: wish.modelnumber,
          maxNamespaces: wish.maxnamespaces,
          allowAnyHost: wish.allowanyhost,
        });
      },
    },
    {
      rpc: "DeleteSubsystem",
      method: "DELETE",
      path: /^\/subsystem$/,
      run(call) {
        const { subnqn, name } = read(z.object({ subnqn: text, name: text }), call);
        model.deleteSubsystem(model.behaviour.generation === "0.11" ? name : subnqn);
      },
    },
    {
      rpc: "AddListener",
      method: "POST",
      path: /^\/listener$/,
      run(call) {
        const wish = read(
          z.object({ subnqn: text, transporttype: text, targetaddress: text, transportserviceid: text }),
          call,
        );
        model.addListener(wish.subnqn, wish.transporttype, wish.targetaddress, wish.transportserviceid);
      },
    },
    {
      rpc: "ListTransports",
      method: "GET",
      path: /^\/transports$/,
      run: () => model.behaviour.tcpTransport ? { transportlist: [{ type: "TCP", maxQueueDepth: 128 }] } : undefined,
    },
    {
      rpc: "CreateTransport",
      method: "POST",
      path: /^\/transport$/,
      wedges: true,
      // DAgent's own failure, with the number of another event.
      run: () => {
        throw new PosRefusal("VOL_REQ_REJECTED_IN_BROKEN_ARRAY", "invalid parameters");
      },
    },
    {
      rpc: "SetQos",
      method: "POST",
      path: /^\/qos$/,
      run(call) {
        const wish = read(
          z.object({
            array: text,
            vol: z.array(z.object({ volumeName: z.string() })).default([]),
            maxiops: whole,
            maxbw: whole,
          }),
          call,
        );
        const limits = { maxiops: BigInt(wish.maxiops), maxbw: BigInt(wish.maxbw) };
        model.setLimits(wish.array, wish.vol.map(({ volumeName }) => volumeName), limits);
      },
    },
  ];
}

/** A name in the body wins over the one in the path (docs/reference/poseidonos-api.md 5.1). */
function nameIn({ argument, param }: Call): string {
  const { name } = param ?? {};
  return typeof name === "string" && name !== "" ? name : argument;
}

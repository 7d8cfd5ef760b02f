/** The routes of DAgent's REST API: what each one reads, asks of the model, and answers (docs/reference/poseidonos-api.md 5). */
import * as z from "zod";
import { type PosArray, type PoseidonModel, PosError, type PosVolume } from "./system.ts";

/** A request that found its route. */
export interface RouteCall {
  /** First and second part of the path that vary. */
  readonly argument: string;
  readonly secondArgument: string;
  /** Undefined when the body has none. */
  readonly param: Readonly<Record<string, unknown>> | undefined;
}

export interface Route {
  readonly rpc: string;
  readonly method: "GET" | "POST" | "DELETE";
  /** The path after the API's base path. */
  readonly path: RegExp;
  /** A request without `param` panics and keeps DAgent's lock for ever. */
  readonly hangsWithoutParam?: boolean;
  /** Resolves with the data of the answer. Throws PosError, DAgentError or ZodError. */
  run(call: RouteCall): Promise<unknown> | unknown;
}

/** DAgent rejects the request before it asks PoseidonOS. */
export class DAgentError extends Error {}

/** Versions that DAgent reports, by generation. */
export const versions = { "1.0": "v1.0.0-rc2", "0.11": "v0.11.2" } as const;

/** All routes over a model. */
export function routesOf(model: PoseidonModel): readonly Route[] {
  return [
    ...arrayRoutes(model),
    ...volumeRoutes(model),
    ...qosRoutes(model),
    ...exportRoutes(model),
    ...subsystemRoutes(model),
    ...transportRoutes(model),
  ];
}

const text = z.string().default("");
const whole = z.number().int().default(0);
const inArray = z.object({ array: text });

/** System and arrays. */
function arrayRoutes(model: PoseidonModel): readonly Route[] {
  return [
    {
      rpc: "GetSystem",
      method: "GET",
      path: /^\/system$/,
      run: () => ({ version: versions[model.behaviour.generation], systemManufacturer: "lbcsi simulator" }),
    },
    {
      rpc: "ListArrays",
      method: "GET",
      path: /^\/arrays$/,
      run() {
        if (model.arrays.length === 0) throw new PosError("CLI_LIST_ARRAY_NO_ARRAY_EXISTS", "no array");
        const mounted = (array: PosArray) => ["NORMAL", "BUSY"].includes(array.state) ? "Mounted" : "Unmounted";
        return {
          arrayList: model.arrays.map((array) => ({
            ...arrayMessage(model, array),
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
        return withoutEmpty({ ...arrayMessage(model, array), uniqueId, state, situation });
      },
    },
  ];
}

/** Volumes. */
function volumeRoutes(model: PoseidonModel): readonly Route[] {
  return [
    {
      rpc: "ListVolumes",
      method: "GET",
      path: /^\/volumelist\/([^/]+)$/,
      run({ argument }) {
        const array = model.array(argument, "LIST_VOL_ARRAY_NAME_DOES_NOT_EXIST");
        if (array.state === "STOP") throw new PosError("CLI_COMMAND_FAILURE_ARRAY_BROKEN", "array is broken");
        const volumes = model.volumesOf(array);
        if (volumes.length === 0) return undefined;
        return {
          volumes: volumes.map((volume) =>
            volumeMessage(model, volume, { subnqn: "", arrayname: "", index: volume.index })
          ),
        };
      },
    },
    {
      rpc: "GetVolume",
      method: "GET",
      path: /^\/array\/([^/]+)\/volume\/([^/]+)$/,
      run({ argument, secondArgument }) {
        const array = model.array(argument, "VOL_INFO_ARRAY_NAME_DOES_NOT_EXIST");
        const volume = model.volume(array, secondArgument);
        return volumeMessage(model, volume, {
          subnqn: model.subsystemOf(volume)?.nqn ?? "",
          arrayname: array.name,
          index: 0,
        });
      },
    },
    {
      rpc: "CreateVolume",
      method: "POST",
      path: /^\/volumes$/,
      async run(call) {
        const param = readParam(
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
        if (param.totalcount > 1) throw new DAgentError();
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
      run: (call) => model.deleteVolume(readParam(inArray, call).array, nameIn(call)),
    },
  ];
}

/** Limits of volumes. */
function qosRoutes(model: PoseidonModel): readonly Route[] {
  return [
    {
      rpc: "SetQos",
      method: "POST",
      path: /^\/qos$/,
      run(call) {
        const request = readParam(
          z.object({
            array: text,
            vol: z.array(z.object({ volumeName: z.string() })).default([]),
            maxiops: whole,
            maxbw: whole,
          }),
          call,
        );
        const limits = { maxiops: BigInt(request.maxiops), maxbw: BigInt(request.maxbw) };
        model.setLimits(request.array, request.vol.map(({ volumeName }) => volumeName), limits);
      },
    },
  ];
}
/** Exports of volumes: PoseidonOS calls it mount. */
function exportRoutes(model: PoseidonModel): readonly Route[] {
  return [
    {
      rpc: "MountVolume",
      method: "POST",
      path: /^\/volumes\/([^/]+)\/mount$/,
      run(call) {
        const { array, subnqn } = readParam(z.object({ array: text, subnqn: text, nsid: whole }), call);
        return model.mountVolume(array, nameIn(call), subnqn);
      },
    },
    {
      rpc: "UnmountVolume",
      method: "DELETE",
      path: /^\/volumes\/([^/]+)\/mount$/,
      run: (call) => model.unmountVolume(readParam(inArray, call).array, nameIn(call)),
    },
  ];
}

/** Subsystems. */
function subsystemRoutes(model: PoseidonModel): readonly Route[] {
  return [
    {
      rpc: "ListSubsystems",
      method: "GET",
      path: /^\/subsystem$/,
      run: () => ({
        subsystemlist: [
          { nqn: "nqn.2014-08.org.nvmexpress.discovery", subtype: "Discovery", allowAnyHost: 1 },
          ...model.subsystems.map((subsystem) =>
            withoutEmpty({
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
        const request = readParam(
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
          nqn: request.nqn,
          serialNumber: request.serialnumber,
          modelNumber: request.modelnumber,
          maxNamespaces: request.maxnamespaces,
          allowAnyHost: request.allowanyhost,
        });
      },
    },
    {
      rpc: "DeleteSubsystem",
      method: "DELETE",
      path: /^\/subsystem$/,
      run(call) {
        const { subnqn, name } = readParam(z.object({ subnqn: text, name: text }), call);
        model.deleteSubsystem(model.behaviour.generation === "0.11" ? name : subnqn);
      },
    },
  ];
}

/** Listeners and transports. */
function transportRoutes(model: PoseidonModel): readonly Route[] {
  return [
    {
      rpc: "AddListener",
      method: "POST",
      path: /^\/listener$/,
      run(call) {
        const request = readParam(
          z.object({ subnqn: text, transporttype: text, targetaddress: text, transportserviceid: text }),
          call,
        );
        model.addListener(request.subnqn, request.transporttype, request.targetaddress, request.transportserviceid);
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
      hangsWithoutParam: true,
      // DAgent fails by itself, and reports the number of an unrelated event.
      run: () => {
        throw new PosError("VOL_REQ_REJECTED_IN_BROKEN_ARRAY", "invalid parameters");
      },
    },
  ];
}

/** Reads `param` of a request; throws ZodError. */
function readParam<T>(schema: z.ZodType<T>, { param }: RouteCall): T {
  return schema.parse(param ?? {});
}

/** A name in the body counts more than the one in the path (docs/reference/poseidonos-api.md 5.1). */
function nameIn({ argument, param }: RouteCall): string {
  const { name } = param ?? {};
  return typeof name === "string" && name !== "" ? name : argument;
}

/** A 64-bit number: text, and in version 0.11 a number. */
function wideNumber({ behaviour }: PoseidonModel, value: bigint): number | string {
  return behaviour.generation === "0.11" ? Number(value) : value.toString();
}

function volumeMessage(
  model: PoseidonModel,
  volume: PosVolume,
  { subnqn, arrayname, index }: { readonly subnqn: string; readonly arrayname: string; readonly index: number },
) {
  const wide = (value: bigint) => wideNumber(model, value);
  return {
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
  };
}

function arrayMessage(model: PoseidonModel, array: PosArray) {
  return {
    index: array.index,
    name: array.name,
    capacity: wideNumber(model, array.capacityBytes),
    used: wideNumber(model, model.usedBytes(array)),
    dataRaid: "RAID5",
  };
}

/** A copy without fields that are zero or empty, at every depth: DAgent leaves them out. */
function withoutEmpty(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(withoutEmpty);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, entry]) => [key, withoutEmpty(entry)] as const).filter(([, entry]) =>
      !(entry === 0 || entry === 0n || entry === "" || entry === "0" || entry === false || entry === undefined ||
        (Array.isArray(entry) && entry.length === 0))
    ),
  );
}

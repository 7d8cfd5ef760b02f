/**
 * The model of a PoseidonOS: arrays, volumes, subsystems, and the requests that it rejects. Free of HTTP: dagent.ts serves it.
 *
 * Facts are from docs/reference/poseidonos-api.md sections 6, 7, 11 and 12. Where those leave open how PoseidonOS behaves,
 * the stricter of two behaviours was taken, so that a driver that works here works there.
 *
 * - Volumes outlive a restart. Subsystems, listeners and exports do not, unless `saveRestore` is on.
 * - An array that is not mounted answers as if it had no volumes.
 * - Hosts see an exported volume when its subsystem listens at an address of this machine's target.
 */
import * as z from "zod";
import { StatusError } from "../../error.ts";
import { readState, stateText, writeState } from "../state_file.ts";
import type { DataPlane } from "../data_plane/data_plane.ts";

/** Names of events with their numbers in POS 0.12 to 1.0 and in 0.11. */
export const events = {
  CLI_SERVER_BUSY: [1224, 1223],
  CLI_LIST_ARRAY_NO_ARRAY_EXISTS: [1225, 1225],
  CLI_ARRAY_INFO_ARRAY_NOT_EXIST: [1234, 1234],
  CLI_COMMAND_FAILURE_ARRAY_BROKEN: [1236, 1236],
  VOL_MGR_NOT_INITIALIZED: [1805, 1805],
  VOL_MGR_BUSY: [1806, 1223],
  VOL_NOT_FOUND: [1807, 2010],
  CREATE_VOL_NAME_TOO_SHORT: [1808, 1808],
  CREATE_VOL_NAME_TOO_LONG: [1809, 1809],
  CREATE_VOL_SAME_VOL_NAME_EXISTS: [1810, 2022],
  CREATE_VOL_NAME_INCLUDES_SPECIAL_CHAR: [1811, 1811],
  CREATE_VOL_NAME_START_OR_END_WITH_SPACE: [1812, 1812],
  CREATE_VOL_SIZE_NOT_ALIGNED: [1813, 2025],
  CREATE_VOL_SIZE_EXCEEDED: [1814, 2026],
  CREATE_VOL_EXCEED_MAX_NUM_OF_VOLS: [1815, 1815],
  CREATE_VOL_CAN_ONLY_BE_WHILE_ONLINE: [1816, 2028],
  CREATE_VOL_ARRAY_NAME_DOES_NOT_EXIST: [1819, 1819],
  DELETE_VOL_MOUNTED_VOL_CANNOT_BE_DELETED: [1821, 2040],
  DELETE_VOL_CAN_ONLY_BE_WHILE_ONLINE: [1823, 1823],
  DELETE_VOL_ARRAY_NAME_DOES_NOT_EXIST: [1824, 1824],
  MOUNT_VOL_ALREADY_MOUNTED: [1843, 2070],
  MOUNT_VOL_UNABLE_TO_ATTACH_TO_NVMF: [1844, 1844],
  MOUNT_VOL_SUBSYSTEM_NOT_FOUND: [1845, 1845],
  MOUNT_VOL_SUBSYSTEM_MISMATCH: [1846, 1846],
  MOUNT_VOL_CAN_ONLY_BE_WHILE_ONLINE: [1849, 1849],
  MOUNT_VOL_ARRAY_NAME_DOES_NOT_EXIST: [1850, 1850],
  UNMOUNT_VOL_ALREADY_UNMOUNTED: [1852, 2080],
  UNMOUNT_VOL_CAN_ONLY_BE_WHILE_ONLINE: [1855, 1855],
  UNMOUNT_VOL_ARRAY_NAME_DOES_NOT_EXIST: [1856, 1856],
  VOL_REQ_QOS_OUT_OF_RANGE: [1858, 1858],
  VOL_REQ_REJECTED_IN_BROKEN_ARRAY: [1859, 1859],
  VOL_REQ_PROCESSED_BUT_ERROR_OCCURED: [1860, 1860],
  LIST_VOL_ARRAY_NAME_DOES_NOT_EXIST: [1878, 1878],
  VOL_INFO_ARRAY_NAME_DOES_NOT_EXIST: [1879, 1879],
  CREATE_SUBSYSTEM_SUBNQN_ALREADY_EXIST: [2200, -1],
  CREATE_SUBSYSTEM_FAILURE: [2201, -1],
  DELETE_SUBSYSTEM_FAILURE_SUBNQN_NAME_NOT_SPECIFIED: [2202, -1],
  DELETE_SUBSYSTEM_FAILURE_NO_SUBNQN: [2203, -1],
  ADD_LISTENER_FAILURE_NO_SUBNQN: [2207, -1],
  ADD_LISTENER_FAILURE_SPDK_FAILURE: [2208, -1],
  ADD_TRANSPORT_FAILURE_SPDK_FAILURE: [2209, -1],
  QOS_CLI_FE_QOS_DISABLED: [4601, 4601],
  // DAgent's own, without a name.
  POS_UNREACHABLE: [11020, 11020],
} as const satisfies Record<string, readonly [number, number]>;
export type PosEvent = keyof typeof events;

/** PoseidonOS rejects a request with an event. */
export class PosError extends Error {
  readonly event: PosEvent;

  constructor(event: PosEvent, cause: string) {
    super(cause);
    this.event = event;
  }
}

const volumeSchema = z.object({
  index: z.number(),
  name: z.string(),
  uuid: z.string(),
  sizeBytes: z.coerce.bigint(),
  maxiops: z.coerce.bigint(),
  maxbw: z.coerce.bigint(),
  isMounted: z.boolean(),
});
export type PosVolume = z.infer<typeof volumeSchema>;

export const arrayStates = ["NORMAL", "BUSY", "OFFLINE", "STOP", "PAUSE"] as const;
export const situations = ["DEFAULT", "NORMAL", "TRY_MOUNT", "DEGRADED", "REBUILDING", "FAULT"] as const;

const arraySchema = z.object({
  name: z.string(),
  index: z.number(),
  uniqueId: z.string(),
  capacityBytes: z.coerce.bigint(),
  state: z.enum(arrayStates),
  situation: z.enum(situations),
  volumes: z.array(volumeSchema),
});
export type PosArray = z.infer<typeof arraySchema>;

const subsystemSchema = z.object({
  nqn: z.string(),
  serialNumber: z.string(),
  modelNumber: z.string(),
  maxNamespaces: z.number(),
  allowAnyHost: z.boolean(),
  uuid: z.string(),
  /** The array whose volumes it holds, while it holds any. */
  array: z.string().optional(),
  listeners: z.array(z.object({ targetAddress: z.string(), transportServiceId: z.string() })),
  namespaces: z.array(z.object({ nsid: z.number(), array: z.string(), volumeUuid: z.string() })),
});
export type PosSubsystem = z.infer<typeof subsystemSchema>;

const modelSchema = z.object({
  format: z.literal(1),
  arrays: z.array(arraySchema),
  subsystems: z.array(subsystemSchema),
});
type Model = z.infer<typeof modelSchema>;

/** How PoseidonOS behaves. The values may be changed while it runs. */
export interface PosBehaviour {
  /** The least time for which each call holds DAgent's lock. */
  callMs: number;
  /** The version whose status codes are used. */
  generation: "1.0" | "0.11";
  /** QoS limits can be set. Otherwise new volumes silently get none. */
  qos: boolean;
  /** The target has a TCP transport. */
  tcpTransport: boolean;
  /** Exports survive a restart. */
  saveRestore: boolean;
  /** How many of the next unmounts fail half done: the volume is Unmounted but its namespace remains. */
  halfUnmounts: number;
  /** PoseidonOS itself is dead: DAgent answers every call so. */
  dead: boolean;
}

export const defaultPosBehaviour: PosBehaviour = {
  callMs: 0,
  generation: "1.0",
  qos: true,
  tcpTransport: true,
  saveRestore: false,
  halfUnmounts: 0,
  dead: false,
};

export interface PoseidonModelOptions {
  readonly arrays: readonly string[];
  readonly capacityBytes: bigint;
  readonly behaviour: PosBehaviour;
  /** Addresses of this machine's target, where hosts can connect. */
  readonly targetAddresses: readonly string[];
  readonly dataPlane: DataPlane;
  /** File that remembers the model; undefined: memory only. */
  readonly file: string | undefined;
}

const mib = 1n << 20n;
const mostVolumes = 256;
const mostSubsystems = 1024;

/** A PoseidonOS. The methods throw PosError as PoseidonOS answers. */
export class PoseidonModel {
  readonly behaviour: PosBehaviour;
  readonly dataPlane: DataPlane;
  readonly #options: PoseidonModelOptions;
  #model: Model;

  /** Opens what `options.file` remembers, or a new one with empty, mounted arrays. */
  static async open(options: PoseidonModelOptions): Promise<PoseidonModel> {
    const { file } = options;
    const found = file === undefined ? undefined : await readState(file, modelSchema, "the PoseidonOS");
    const model = new PoseidonModel(options, found ?? newModel(options));
    // A restart of the simulator is a restart of PoseidonOS.
    model.#forgetExports();
    await options.dataPlane.start();
    model.#save();
    return model;
  }

  private constructor(options: PoseidonModelOptions, model: Model) {
    this.#options = options;
    this.#model = model;
    this.behaviour = { ...options.behaviour };
    this.dataPlane = options.dataPlane;
  }

  get arrays(): readonly PosArray[] {
    return this.#model.arrays;
  }

  get subsystems(): readonly PosSubsystem[] {
    return this.#model.subsystems;
  }

  /** The array of this name; throws PosError with `event` when there is none. */
  array(name: string, event: PosEvent): PosArray {
    const array = this.#model.arrays.find((array) => array.name === name);
    if (array !== undefined) return array;
    throw new PosError(event, `array ${name} does not exist`);
  }

  /** The volumes that an array shows: none while it is not mounted. */
  volumesOf(array: PosArray): readonly PosVolume[] {
    return isMounted(array) ? array.volumes : [];
  }

  volume(array: PosArray, name: string): PosVolume {
    const volume = this.volumesOf(array).find((volume) => volume.name === name);
    if (volume !== undefined) return volume;
    throw new PosError("VOL_NOT_FOUND", `volume ${name} does not exist`);
  }

  usedBytes(array: PosArray): bigint {
    return array.volumes.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0n);
  }

  /** The subsystem that a volume is exported in. */
  subsystemOf(volume: PosVolume): PosSubsystem | undefined {
    return this.#model.subsystems.find(({ namespaces }) =>
      namespaces.some(({ volumeUuid }) => volumeUuid === volume.uuid)
    );
  }

  async createVolume(request: {
    readonly array: string;
    readonly name: string;
    readonly sizeBytes: bigint;
    readonly maxiops: bigint;
    readonly maxbw: bigint;
    readonly uuid: string;
  }): Promise<void> {
    const array = this.array(request.array, "CREATE_VOL_ARRAY_NAME_DOES_NOT_EXIST");
    this.#assertMounted(array, "CREATE_VOL_CAN_ONLY_BE_WHILE_ONLINE");
    const { name, sizeBytes } = request;
    if (name.length < 2) throw new PosError("CREATE_VOL_NAME_TOO_SHORT", `name "${name}" is too short`);
    if (name.length > 255) throw new PosError("CREATE_VOL_NAME_TOO_LONG", `name "${name}" is too long`);
    if (name.trim() !== name) throw new PosError("CREATE_VOL_NAME_START_OR_END_WITH_SPACE", `name "${name}"`);
    if (!/^[A-Za-z0-9_ -]+$/.test(name)) {
      throw new PosError("CREATE_VOL_NAME_INCLUDES_SPECIAL_CHAR", `name "${name}"`);
    }
    if (array.volumes.some((volume) => volume.name === name)) {
      throw new PosError("CREATE_VOL_SAME_VOL_NAME_EXISTS", `name ${name} is in use`);
    }
    if (sizeBytes <= 0n || sizeBytes % mib !== 0n) {
      throw new PosError("CREATE_VOL_SIZE_NOT_ALIGNED", `size ${sizeBytes} is not a multiple of 1 MiB`);
    }
    if (sizeBytes > array.capacityBytes - this.usedBytes(array)) {
      throw new PosError("CREATE_VOL_SIZE_EXCEEDED", `size ${sizeBytes} exceeds what is left`);
    }
    if (array.volumes.length >= mostVolumes) {
      throw new PosError("CREATE_VOL_EXCEED_MAX_NUM_OF_VOLS", `the array has ${mostVolumes} volumes`);
    }
    assertLimits(request);
    // A UUID that is too long overruns a buffer inside PoseidonOS, so the driver must never send one.
    if (request.uuid !== "" && !/^[0-9a-fA-F-]{36}$/.test(request.uuid)) {
      throw new PosError("VOL_REQ_PROCESSED_BUT_ERROR_OCCURED", `uuid "${request.uuid}" cannot be read`);
    }
    const takesUuids = this.behaviour.generation === "1.0";
    const taken = new Set(array.volumes.map(({ index }) => index));
    let index = 0;
    while (taken.has(index)) index++;
    const volume: PosVolume = {
      index,
      name,
      uuid: takesUuids && request.uuid !== "" ? request.uuid.toLowerCase() : crypto.randomUUID(),
      sizeBytes,
      maxiops: this.behaviour.qos ? request.maxiops : 0n,
      maxbw: this.behaviour.qos ? request.maxbw : 0n,
      isMounted: false,
    };
    array.volumes.push(volume);
    this.#save();
    await this.dataPlane.createVolume(volume.uuid, sizeBytes, undefined);
  }

  async deleteVolume(arrayName: string, name: string): Promise<void> {
    const array = this.array(arrayName, "DELETE_VOL_ARRAY_NAME_DOES_NOT_EXIST");
    this.#assertMounted(array, "DELETE_VOL_CAN_ONLY_BE_WHILE_ONLINE");
    const volume = this.volume(array, name);
    if (volume.isMounted) throw new PosError("DELETE_VOL_MOUNTED_VOL_CANNOT_BE_DELETED", `${name} is mounted`);
    array.volumes.splice(array.volumes.indexOf(volume), 1);
    this.#dropNamespace(volume);
    this.#save();
    await this.dataPlane.deleteVolume(volume.uuid);
  }

  /** Exports a volume. Without an NQN, PoseidonOS takes any subsystem of the array that has room. */
  async mountVolume(arrayName: string, name: string, nqn: string): Promise<void> {
    const array = this.array(arrayName, "MOUNT_VOL_ARRAY_NAME_DOES_NOT_EXIST");
    this.#assertMounted(array, "MOUNT_VOL_CAN_ONLY_BE_WHILE_ONLINE");
    const volume = this.volume(array, name);
    if (volume.isMounted) throw new PosError("MOUNT_VOL_ALREADY_MOUNTED", `${name} is mounted`);
    const hasRoom = (subsystem: PosSubsystem) => subsystem.namespaces.length < subsystem.maxNamespaces;
    const subsystem = this.#model.subsystems.find((subsystem) =>
      nqn === "" ? hasRoom(subsystem) && (subsystem.array ?? array.name) === array.name : subsystem.nqn === nqn
    );
    if (subsystem === undefined) throw new PosError("MOUNT_VOL_SUBSYSTEM_NOT_FOUND", `subsystem ${nqn}`);
    if ((subsystem.array ?? array.name) !== array.name) {
      throw new PosError("MOUNT_VOL_SUBSYSTEM_MISMATCH", `${subsystem.nqn} belongs to array ${subsystem.array}`);
    }
    if (!hasRoom(subsystem)) throw new PosError("MOUNT_VOL_UNABLE_TO_ATTACH_TO_NVMF", `${subsystem.nqn} is full`);
    const taken = new Set(subsystem.namespaces.map(({ nsid }) => nsid));
    let nsid = 1;
    while (taken.has(nsid)) nsid++;
    subsystem.namespaces.push({ nsid, array: array.name, volumeUuid: volume.uuid });
    subsystem.array = array.name;
    volume.isMounted = true;
    this.#show(subsystem);
    this.#save();
    await this.dataPlane.waitUntilSettled();
  }

  async unmountVolume(arrayName: string, name: string): Promise<void> {
    const array = this.array(arrayName, "UNMOUNT_VOL_ARRAY_NAME_DOES_NOT_EXIST");
    this.#assertMounted(array, "UNMOUNT_VOL_CAN_ONLY_BE_WHILE_ONLINE");
    const volume = this.volume(array, name);
    if (!volume.isMounted) throw new PosError("UNMOUNT_VOL_ALREADY_UNMOUNTED", `${name} is not mounted`);
    volume.isMounted = false;
    if (this.behaviour.halfUnmounts > 0) {
      this.behaviour.halfUnmounts--;
      this.#save();
      throw new PosError("VOL_REQ_PROCESSED_BUT_ERROR_OCCURED", "the namespace could not be detached within 15 s");
    }
    this.#dropNamespace(volume);
    this.#save();
    await this.dataPlane.waitUntilSettled();
  }

  setLimits(
    arrayName: string,
    names: readonly string[],
    limits: { readonly maxiops: bigint; readonly maxbw: bigint },
  ): void {
    const array = this.array(arrayName, "CLI_ARRAY_INFO_ARRAY_NOT_EXIST");
    if (!this.behaviour.qos) throw new PosError("QOS_CLI_FE_QOS_DISABLED", "FE QoS is disabled");
    const volumes = names.map((name) => this.volume(array, name));
    const keep = (given: bigint, present: bigint) => given === -1n ? present : given;
    for (const volume of volumes) {
      const limited = { maxiops: keep(limits.maxiops, volume.maxiops), maxbw: keep(limits.maxbw, volume.maxbw) };
      assertLimits(limited);
      Object.assign(volume, limited);
    }
    this.#save();
  }

  createSubsystem(
    request: Pick<PosSubsystem, "nqn" | "serialNumber" | "modelNumber" | "maxNamespaces" | "allowAnyHost">,
  ) {
    const { nqn, serialNumber, modelNumber } = request;
    if (this.#model.subsystems.some((subsystem) => subsystem.nqn === nqn)) {
      throw new PosError("CREATE_SUBSYSTEM_SUBNQN_ALREADY_EXIST", `${nqn} exists`);
    }
    const printable = /^[\x20-\x7e]*$/;
    const fits = /^nqn\.\d{4}-\d{2}\.[a-z0-9.-]+:\S+$/.test(nqn) && nqn.length <= 223 && serialNumber.length <= 20 &&
      modelNumber.length <= 40 && printable.test(serialNumber + modelNumber);
    if (!fits || this.#model.subsystems.length >= mostSubsystems) {
      throw new PosError("CREATE_SUBSYSTEM_FAILURE", `the target refuses ${nqn}`);
    }
    const room = request.maxNamespaces > 0 ? request.maxNamespaces : 256;
    const uuid = crypto.randomUUID();
    this.#model.subsystems.push({ ...request, maxNamespaces: room, uuid, listeners: [], namespaces: [] });
    this.#save();
  }

  /** First unmounts every volume of the subsystem. */
  deleteSubsystem(nqn: string): void {
    if (nqn === "") throw new PosError("DELETE_SUBSYSTEM_FAILURE_SUBNQN_NAME_NOT_SPECIFIED", "no subnqn");
    const subsystem = this.#model.subsystems.find((subsystem) => subsystem.nqn === nqn);
    if (subsystem === undefined) throw new PosError("DELETE_SUBSYSTEM_FAILURE_NO_SUBNQN", `no subsystem ${nqn}`);
    for (const { volumeUuid } of subsystem.namespaces) {
      for (const volume of this.#model.arrays.flatMap(({ volumes }) => volumes)) {
        if (volume.uuid === volumeUuid) volume.isMounted = false;
      }
      this.dataPlane.hide(volumeUuid);
    }
    this.#model.subsystems.splice(this.#model.subsystems.indexOf(subsystem), 1);
    this.#save();
  }

  addListener(nqn: string, type: string, targetAddress: string, transportServiceId: string): void {
    const subsystem = this.#model.subsystems.find((subsystem) => subsystem.nqn === nqn);
    if (subsystem === undefined) throw new PosError("ADD_LISTENER_FAILURE_NO_SUBNQN", `no subsystem ${nqn}`);
    const isThere = subsystem.listeners.some((listener) =>
      listener.targetAddress === targetAddress && listener.transportServiceId === transportServiceId
    );
    const isLocal = this.#options.targetAddresses.some((address) => address.startsWith(`${targetAddress}:`));
    if (type.toUpperCase() !== "TCP" || !this.behaviour.tcpTransport || isThere || !isLocal) {
      throw new PosError("ADD_LISTENER_FAILURE_SPDK_FAILURE", "the target refuses the listener");
    }
    subsystem.listeners.push({ targetAddress, transportServiceId });
    this.#show(subsystem);
    this.#save();
  }

  /** Puts an array into a state that it keeps. An array that is not mounted exports nothing. */
  setArray(name: string, to: Partial<Pick<PosArray, "state" | "situation">>): void {
    const array = this.#model.arrays.find((array) => array.name === name);
    if (array === undefined) throw new StatusError("NOT_FOUND", `Cannot set array "${name}": it does not exist`);
    Object.assign(array, to);
    if (!isMounted(array)) {
      for (const volume of array.volumes) {
        volume.isMounted = false;
        this.#dropNamespace(volume);
      }
    }
    this.#save();
  }

  /**
   * Ends and starts PoseidonOS, with its volumes or as a new installation. Connected hosts try to reconnect for minutes while
   * their devices wait, so the devices stay until the volume is exported again.
   */
  async restart(memory: boolean): Promise<void> {
    if (!memory) {
      this.#model = newModel(this.#options);
      await this.dataPlane.clear();
    } else if (!this.behaviour.saveRestore) this.#forgetExports();
    this.#save();
  }

  /** The model as JSON would hold it. */
  dump(): Model {
    return JSON.parse(this.#text());
  }

  #forgetExports(): void {
    this.#model.subsystems = [];
    for (const { volumes } of this.#model.arrays) {
      for (const volume of volumes) volume.isMounted = false;
    }
  }

  #assertMounted(array: PosArray, event: PosEvent): void {
    if (array.state === "STOP") {
      throw new PosError("VOL_REQ_REJECTED_IN_BROKEN_ARRAY", `array ${array.name} is broken`);
    }
    if (!isMounted(array)) throw new PosError(event, `array ${array.name} is ${array.state}`);
  }

  #dropNamespace(volume: PosVolume): void {
    for (const subsystem of this.#model.subsystems) {
      const at = subsystem.namespaces.findIndex(({ volumeUuid }) => volumeUuid === volume.uuid);
      if (at < 0) continue;
      subsystem.namespaces.splice(at, 1);
      if (subsystem.namespaces.length === 0) delete subsystem.array;
    }
    this.dataPlane.hide(volume.uuid);
  }

  /** Exposes the volumes of a subsystem that listens at an address of this machine's target. */
  #show({ nqn, listeners, namespaces, allowAnyHost }: PosSubsystem): void {
    const isReachable = listeners.some(({ targetAddress, transportServiceId }) =>
      this.#options.targetAddresses.includes(`${targetAddress}:${transportServiceId}`)
    );
    for (const { nsid, volumeUuid } of namespaces) {
      const volume = this.#model.arrays.flatMap(({ volumes }) => volumes).find(({ uuid }) => uuid === volumeUuid);
      if (volume === undefined || !isReachable) continue;
      this.dataPlane.expose({
        uuid: volumeUuid,
        subsystemNqn: nqn,
        nsid,
        sizeBytes: volume.sizeBytes,
        sectorSizeBytes: 512,
        acl: [allowAnyHost ? "ALLOW_ANY" : "ALLOW_NONE"],
      });
    }
  }

  #text(): string {
    return stateText(this.#model);
  }

  #save(): void {
    const { file } = this.#options;
    if (file !== undefined) writeState(file, this.#text());
  }
}

function isMounted({ state }: PosArray): boolean {
  return state === "NORMAL" || state === "BUSY";
}

function assertLimits({ maxiops, maxbw }: { readonly maxiops: bigint; readonly maxbw: bigint }): void {
  const fits = (value: bigint, most: bigint) => value === 0n || (value >= 10n && value <= most);
  if (fits(maxiops, 18_446_744_073_709_551n) && fits(maxbw, 17_592_186_044_415n)) return;
  throw new PosError("VOL_REQ_QOS_OUT_OF_RANGE", `maxiops ${maxiops}, maxbw ${maxbw}`);
}

function newModel({ arrays, capacityBytes }: PoseidonModelOptions): Model {
  return {
    format: 1,
    arrays: arrays.map((name, index) => ({
      name,
      index,
      uniqueId: String(1_000_000_000 + Math.floor(Math.random() * 1_000_000_000)),
      capacityBytes,
      state: "NORMAL",
      situation: "NORMAL",
      volumes: [],
    })),
    subsystems: [],
  };
}

/**
 * A data plane over the Linux kernel's own NVMe/TCP target (nvmet, through configfs): volumes are sparse files behind
 * loop devices, each a namespace whose UUID and NGUID are the volume's. What hosts see is real NVMe/TCP.
 *
 * Where nvmet is not LightOS, and what this makes of it:
 * - LightOS has one subsystem, and an access list per namespace. nvmet has an access list per subsystem, and no two
 *   subsystems of one name. So a subsystem is for one host at a time, and shows what that host may see, no more: its
 *   owner is the first host that was granted anything, until nothing is left. Hosts with exactly the owner's grants are
 *   admitted beside it (a volume that two hosts share). A host with other grants is refused meanwhile, which is logged:
 *   nobody ever sees what he may not, but two hosts with different volumes need subsystems of different names, as
 *   PoseidonOS has them, or two simulators.
 * - nvmet lets a host go on that is taken from the access list while it is connected. Here it is cut off: the subsystem is
 *   taken from the ports for a moment, which ends every connection. Others who may come back do so by themselves.
 * - It does not tell who is connected (before 6.11). Hosts that may be are taken for connected while there are any
 *   connections to the ports.
 * - A discovery controller of the kernel names what its own port serves, and LightOS' serve nothing but discovery. So the
 *   ports for discovery serve a subsystem that no host may see, and refer to the I/O ports, whose discovery controllers
 *   name the cluster's subsystem. Whoever asks an I/O port gets an answer too. None asks for keys.
 * - LightOS leaves a host connected whose keys were taken away. Here it is cut off.
 *
 * Measured on 6.1: a new size is announced by `revalidate_size`; removing a namespace waits for its I/O and takes
 * the device from hosts within 0.5 s, mounted or not; a port's socket is open while it has a subsystem.
 *
 * configfs outlives its maker. What a simulator makes there is first written to a file of its own below /run, which it
 * keeps locked: a later one finds the files that nobody locks and takes away what they name, as far as it is marked with
 * the serial number of that file. Nothing else in configfs is touched.
 */
import { createHash } from "node:crypto";
import { basename, join } from "node:path";
import * as z from "zod";
import type { Logger } from "../../context.ts";
import { messageOf, StatusError } from "../../error.ts";
import { parseAddress } from "../../namespace.ts";
import { Contents, exists, removeFile } from "./contents.ts";
import type { ClusterIdentity } from "../lightos/model.ts";
import {
  type AnaState,
  anaStates,
  type DataPlane,
  type ExposedNamespace,
  type HostSecrets,
  mayAccess,
  type PathPort,
  type Paths,
} from "./data_plane.ts";
import { output, readText, run } from "./run_command.ts";

export interface NvmetOptions {
  /** Where the contents live. */
  readonly contentDir: string;
  readonly identity: ClusterIdentity;
  /** Whether hosts will be authenticated: then a kernel that cannot is refused at once. */
  readonly inBandAuth: boolean;
  readonly log: Logger;
}

const root = "/sys/kernel/config/nvmet";
const recordDirectory = "/run/lbcsi-simulator";
/** The model number that hosts see; with the serial number it marks what is ours. */
const model = "lbcsi simulator";

const recordSchema = z.object({
  serial: z.string(),
  contentDir: z.string(),
  ports: z.array(z.string()),
  subsystems: z.array(z.string()),
  hosts: z.array(z.string()),
});
type Record = z.infer<typeof recordSchema>;

interface Port {
  readonly id: string;
  readonly directory: string;
  readonly traddr: string;
  readonly trsvcid: string;
  /** Of the same server, for discovery only; undefined where the I/O port is asked. */
  readonly discovery: string | undefined;
  up: boolean;
}

interface Shown {
  readonly namespace: ExposedNamespace;
  readonly directory: string;
  readonly loop: string;
}

interface Subsystem {
  readonly nqn: string;
  readonly directory: string;
  /** Host NQNs, or `ALLOW_ANY`. */
  owner: string | undefined;
  allowed: ReadonlySet<string>;
}

/**
 * Opens the data plane, after taking away what dead ones have left.
 *
 * @throws StatusError FAILED_PRECONDITION that names what is missing on this machine, or who has one of the addresses
 */
export async function openNvmetPlane(options: NvmetOptions): Promise<DataPlane> {
  await checkMachine();
  const contents = await Contents.open(options.contentDir);
  await Deno.mkdir(recordDirectory, { recursive: true, mode: 0o700 });
  await removeLeftovers(options.log);
  const serial = createHash("sha256").update(contents.directory).digest("hex").slice(0, 20);
  const file = join(recordDirectory, serial);
  const lock = await Deno.open(file, { create: true, read: true, write: true, mode: 0o600 });
  if (!await lock.tryLock(true)) {
    lock.close();
    throw new StatusError("FAILED_PRECONDITION", `Cannot use ${contents.directory}: another simulator does`);
  }
  const plane = new NvmetPlane(options, contents, serial, lock);
  try {
    await plane.open();
  } catch (error) {
    await plane[Symbol.asyncDispose]();
    throw error;
  }
  return plane;
}

class NvmetPlane implements DataPlane {
  readonly kind = "nvmet";
  readonly paths: Paths;
  readonly #options: NvmetOptions;
  readonly #log: Logger;
  readonly #contents: Contents;
  readonly #lock: Deno.FsFile;
  readonly #record: Record;
  readonly #ports: Port[] = [];
  readonly #exposed = new Map<string, ExposedNamespace>();
  readonly #shown = new Map<string, Shown>();
  readonly #subsystems = new Map<string, Subsystem>();
  /** Who may connect with which keys; undefined: everybody, without. */
  #keys: ReadonlyMap<string, HostSecrets> | undefined;
  /** What was written to the entries of hosts; a host without one has none. */
  readonly #written = new Map<string, HostSecrets>();
  /** Hosts that were refused, so that each is told of once. */
  readonly #refused = new Set<string>();
  #queue: Promise<unknown> = Promise.resolve();
  #reconcilePending = false;
  #started = false;

  constructor(options: NvmetOptions, contents: Contents, serial: string, lock: Deno.FsFile) {
    this.#options = options;
    this.#log = options.log;
    this.#contents = contents;
    this.#lock = lock;
    this.#record = { serial, contentDir: contents.directory, ports: [], subsystems: [], hosts: [] };
    const portOf = (server: number) => {
      const port = this.#ports[server];
      if (port !== undefined) return port;
      throw new StatusError("NOT_FOUND", `Cannot change port ${server}: there are ${this.#ports.length}, from 0 on`);
    };
    this.paths = {
      list: () => this.#ports.map((port) => describe(port)),
      take: (server, up) =>
        this.#enqueue(async () => {
          const port = portOf(server);
          port.up = up;
          for (const subsystem of this.#subsystems.values()) await link(port.directory, subsystem.directory, up);
          if (port.discovery !== undefined) await link(port.discovery, this.#anchor, up);
        }),
      setAna: (server, state) =>
        this.#enqueue(() => write(join(portOf(server).directory, "ana_groups/1/ana_state"), state)),
    };
  }

  /** Directory of the subsystem that ports for discovery serve, for the kernel opens no port that serves nothing. */
  get #anchor(): string {
    return join(root, "subsystems", `nqn.2014-08.org.nvmexpress:lbcsi-simulator:${this.#record.serial}`);
  }

  /** Makes the ports, and the cluster's own subsystem, which is there for good. */
  async open(): Promise<void> {
    const { identity } = this.#options;
    // A number from 16 to 48 Ki: small ones are what people take.
    let id = 0x4000 + Number.parseInt(this.#record.serial.slice(0, 8), 16) % 0x8000;
    for (const { nvmeEndpoint, discoveryEndpoint } of identity.servers) {
      const { traddr, trsvcid } = parseAddress(nvmeEndpoint) ?? { traddr: nvmeEndpoint, trsvcid: "4420" };
      const directory = await this.#makePort(id, traddr, trsvcid);
      const at = discoveryEndpoint === nvmeEndpoint ? undefined : parseAddress(discoveryEndpoint);
      const discovery = at === undefined ? undefined : await this.#makePort(id + 1, at.traddr, at.trsvcid);
      this.#ports.push({ id: String(id), directory, traddr, trsvcid, discovery, up: true });
      id += 2;
    }
    await this.#makeSubsystem(identity.subsystemNqn);
    if (this.#options.inBandAuth) await this.#checkKeys();
    const discoveries = this.#ports.flatMap(({ discovery }) => discovery ?? []);
    if (discoveries.length === 0) return;
    await this.#makeDirectory(this.#anchor);
    for (const directory of discoveries) {
      for (const port of this.#ports) {
        const referral = join(directory, "referrals", port.id);
        await Deno.mkdir(referral);
        await writeAddress(referral, port.traddr, port.trsvcid);
        await write(join(referral, "enable"), "1");
      }
      await link(directory, this.#anchor, true);
    }
  }

  /** Throws FAILED_PRECONDITION when this kernel's target knows no keys; only an entry of a host shows that. */
  async #checkKeys(): Promise<void> {
    const trial = `nqn.2014-08.org.nvmexpress:lbcsi-simulator:${this.#record.serial}`;
    const directory = join(root, "hosts", trial);
    this.#record.hosts.push(trial);
    await this.#remember();
    await Deno.mkdir(directory);
    const isThere = exists(join(directory, "dhchap_key"));
    await Deno.remove(directory);
    if (isThere) return;
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot use data plane "nvmet" with in-band authentication: this kernel's target has none, CONFIG_NVME_TARGET_AUTH ` +
        `(Linux 6.0 or later) is needed`,
    );
  }

  /** Makes a port that serves nothing yet, and gives its directory. */
  async #makePort(id: number, traddr: string, trsvcid: string): Promise<string> {
    const directory = join(root, "ports", String(id));
    if (exists(directory)) {
      throw new StatusError(
        "FAILED_PRECONDITION",
        `Cannot use data plane "nvmet": somebody else has made ${directory}`,
      );
    }
    this.#record.ports.push(String(id));
    await this.#remember();
    await Deno.mkdir(directory);
    await writeAddress(directory, traddr, trsvcid);
    return directory;
  }

  // ------------------------------------------------------------------------------------------------------- contents

  createVolume(uuid: string, sizeBytes: bigint, sourceSnapshotUuid: string | undefined): Promise<void> {
    return this.#enqueue(() => this.#contents.createVolume(uuid, sizeBytes, sourceSnapshotUuid));
  }

  resizeVolume(uuid: string, sizeBytes: bigint): Promise<void> {
    return this.#enqueue(() => this.#contents.resizeVolume(uuid, sizeBytes));
  }

  deleteVolume(uuid: string): Promise<void> {
    this.#exposed.delete(uuid);
    return this.#enqueue(async () => {
      await this.#reconcile();
      await this.#contents.deleteVolume(uuid);
    });
  }

  createSnapshot(uuid: string, volumeUuid: string): Promise<void> {
    return this.#enqueue(async () => {
      const shown = this.#shown.get(volumeUuid);
      // What hosts have written is in the pages of the loop device's file, or on their way there.
      if (shown !== undefined) await output("blockdev", "--flushbufs", shown.loop);
      await this.#contents.createSnapshot(uuid, volumeUuid);
    });
  }

  hasSnapshot(uuid: string): Promise<boolean> {
    return Promise.resolve(this.#contents.hasSnapshot(uuid));
  }

  deleteSnapshot(uuid: string): Promise<void> {
    return this.#enqueue(() => this.#contents.deleteSnapshot(uuid));
  }

  rollbackVolume(uuid: string, snapshotUuid: string, sizeBytes: bigint): Promise<void> {
    return this.#enqueue(async () => {
      const shown = this.#shown.get(uuid);
      if (shown !== undefined) await this.#takeAway(shown);
      await this.#contents.rollbackVolume(uuid, snapshotUuid, sizeBytes);
    });
  }

  changedRuns(snapshotUuid: string, baseUuid: string | undefined, blockSizeBytes: number, start: bigint) {
    return this.#contents.changedRuns(snapshotUuid, baseUuid, blockSizeBytes, start);
  }

  // --------------------------------------------------------------------------------------------------------- hosts

  expose(namespace: ExposedNamespace): void {
    this.#exposed.set(namespace.uuid, namespace);
    this.#changed();
  }

  hide(uuid: string): void {
    if (this.#exposed.delete(uuid)) this.#changed();
  }

  authenticate(hosts: ReadonlyMap<string, HostSecrets> | undefined): void {
    this.#keys = hosts;
    this.#changed();
  }

  connectedHosts() {
    const { traddr } = this.#ports.find((port) => isConnected(port)) ?? {};
    if (traddr === undefined) return [];
    const hosts = new Set([...this.#subsystems.values()].flatMap(({ allowed }) => [...allowed]));
    return [...hosts].filter((hostNqn) => hostNqn !== anyHost)
      .map((hostNqn) => ({ hostNqn, address: traddr, hostname: Deno.hostname() }));
  }

  async start(): Promise<void> {
    this.#started = true;
    await this.#enqueue(async () => {
      await this.#reconcile();
      // Again, for an address that somebody else has is a reason not to start, and not one to log and go on.
      for (const subsystem of this.#subsystems.values()) await this.#serve(subsystem);
    });
  }

  async settled(): Promise<void> {
    await this.#queue;
  }

  clear(): Promise<void> {
    this.#exposed.clear();
    return this.#enqueue(async () => {
      await this.#reconcile();
      await this.#contents.clear();
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#enqueue(async () => {
      this.#started = false;
      await takeDown(this.#record, this.#log);
      await removeFile(join(recordDirectory, this.#record.serial));
    });
    this.#lock.close();
  }

  // -------------------------------------------------------------------------------------------------------- inside

  /** Runs `step` after everything that was asked for before. */
  #enqueue<T>(step: () => Promise<T>): Promise<T> {
    const result = this.#queue.then(step);
    this.#queue = result.catch(() => {});
    return result;
  }

  #changed(): void {
    if (this.#reconcilePending || !this.#started) return;
    this.#reconcilePending = true;
    this.#enqueue(async () => {
      this.#reconcilePending = false;
      await this.#reconcile();
    }).catch((error) => this.#log.error("could not show the namespaces", { error: messageOf(error) }));
  }

  /** Makes the target what the access lists say: who may not goes first, who may comes last. */
  async #reconcile(): Promise<void> {
    if (!this.#started) return;
    const nqns = new Set([...this.#exposed.values()].map((namespace) => namespace.subsystemNqn));
    for (const nqn of this.#subsystems.keys()) nqns.add(nqn);
    for (const nqn of nqns) {
      try {
        await this.#reconcileSubsystem(nqn);
      } catch (error) {
        this.#log.error("could not show the namespaces of a subsystem", { subsystem: nqn, error: messageOf(error) });
      }
    }
  }

  async #reconcileSubsystem(nqn: string): Promise<void> {
    const namespaces = [...this.#exposed.values()].filter((namespace) => namespace.subsystemNqn === nqn);
    const keys = this.#keys;
    const granted = new Map([...grantsOf(namespaces)].filter(([host]) => keys === undefined || keys.has(host)));
    const subsystem = this.#subsystems.get(nqn) ?? (granted.size === 0 ? undefined : await this.#makeSubsystem(nqn));
    if (subsystem === undefined) return;
    if (subsystem.owner === undefined || !granted.has(subsystem.owner)) subsystem.owner = [...granted.keys()][0];
    const grants = subsystem.owner === undefined ? "" : granted.get(subsystem.owner) ?? "";
    const allowed = new Set([...granted].filter(([, others]) => others === grants).map(([host]) => host));
    this.#tellRefused(subsystem, granted, allowed);

    const cutOff = [...subsystem.allowed].filter((host) => !allowed.has(host));
    for (const host of cutOff) await this.#deny(subsystem, host);
    if (cutOff.length > 0) await this.#cutConnections(subsystem);
    const wanted = new Map(
      namespaces.filter(({ uuid }) => grants.split(" ").includes(uuid)).map((namespace) => [namespace.uuid, namespace]),
    );
    for (const shown of [...this.#shown.values()]) {
      const { uuid, nsid, subsystemNqn } = shown.namespace;
      if (subsystemNqn === nqn && wanted.get(uuid)?.nsid !== nsid) await this.#takeAway(shown);
    }
    for (const namespace of wanted.values()) {
      const shown = this.#shown.get(namespace.uuid);
      if (shown === undefined) await this.#show(subsystem, namespace);
      else await this.#refresh(shown, namespace);
    }
    for (const host of allowed) {
      if (!subsystem.allowed.has(host) || this.#hasOtherKeys(host)) await this.#allow(subsystem, host);
    }
    subsystem.allowed = allowed;
    if (allowed.size === 0 && nqn !== this.#options.identity.subsystemNqn) await this.#removeSubsystem(subsystem);
    // Served when everybody is let in who may: a host that comes back, and is told that it may not, gives up for good (6.12).
    else await this.#serve(subsystem);
  }

  #tellRefused(subsystem: Subsystem, granted: ReadonlyMap<string, string>, allowed: ReadonlySet<string>): void {
    for (const host of granted.keys()) {
      const key = `${subsystem.nqn} ${host}`;
      if (allowed.has(host)) this.#refused.delete(key);
      else if (!this.#refused.has(key)) {
        this.#refused.add(key);
        this.#log.warning("refuses a host while another one with other volumes has the subsystem", {
          subsystem: subsystem.nqn,
          name: host,
        });
      }
    }
  }

  async #makeSubsystem(nqn: string): Promise<Subsystem> {
    const directory = join(root, "subsystems", nqn);
    await this.#makeDirectory(directory);
    const subsystem: Subsystem = { nqn, directory, owner: undefined, allowed: new Set() };
    this.#subsystems.set(nqn, subsystem);
    return subsystem;
  }

  /** The directory of a subsystem, marked as ours. */
  async #makeDirectory(directory: string): Promise<void> {
    if (exists(directory)) {
      throw new StatusError(
        "FAILED_PRECONDITION",
        `Cannot use data plane "nvmet": somebody else has made ${directory}`,
      );
    }
    this.#record.subsystems.push(basename(directory));
    await this.#remember();
    await Deno.mkdir(directory);
    await write(join(directory, "attr_model"), model);
    await write(join(directory, "attr_serial"), this.#record.serial);
  }

  async #serve(subsystem: Subsystem): Promise<void> {
    for (const port of this.#ports) if (port.up) await link(port.directory, subsystem.directory, true);
  }

  async #removeSubsystem(subsystem: Subsystem): Promise<void> {
    for (const port of this.#ports) await link(port.directory, subsystem.directory, false);
    await Deno.remove(subsystem.directory);
    this.#subsystems.delete(subsystem.nqn);
    this.#record.subsystems = this.#record.subsystems.filter((nqn) => nqn !== subsystem.nqn);
    await this.#remember();
  }

  /** Ends every connection to a subsystem. */
  async #cutConnections(subsystem: Subsystem): Promise<void> {
    for (const port of this.#ports) {
      if (!port.up) continue;
      await link(port.directory, subsystem.directory, false);
      await link(port.directory, subsystem.directory, true);
    }
  }

  async #allow(subsystem: Subsystem, host: string): Promise<void> {
    if (host === anyHost) return await write(join(subsystem.directory, "attr_allow_any_host"), "1");
    const directory = join(root, "hosts", host);
    const entry = join(subsystem.directory, "allowed_hosts", host);
    const keys = this.#keys?.get(host);
    const before = this.#written.get(host);
    if (before !== undefined && (keys === undefined || (keys.target === "" && before.target !== ""))) {
      // The kernel forgets a key with the entry only.
      await removeFile(entry);
      await Deno.remove(directory);
      this.#written.delete(host);
    }
    if (!exists(directory)) {
      this.#record.hosts.push(host);
      await this.#remember();
      await Deno.mkdir(directory);
    }
    if (keys !== undefined) {
      await write(join(directory, "dhchap_key"), keys.host);
      if (keys.target !== "") await write(join(directory, "dhchap_ctrl_key"), keys.target);
      this.#written.set(host, keys);
    }
    if (!exists(entry)) await Deno.symlink(directory, entry);
  }

  #hasOtherKeys(host: string): boolean {
    const wanted = this.#keys?.get(host);
    const written = this.#written.get(host);
    return wanted?.host !== written?.host || wanted?.target !== written?.target;
  }

  async #deny(subsystem: Subsystem, host: string): Promise<void> {
    if (host === anyHost) return await write(join(subsystem.directory, "attr_allow_any_host"), "0");
    await removeFile(join(subsystem.directory, "allowed_hosts", host));
  }

  async #show(subsystem: Subsystem, namespace: ExposedNamespace): Promise<void> {
    const { uuid, nsid, sizeBytes, sectorSizeBytes } = namespace;
    await this.#contents.finishGrowth(uuid, sizeBytes);
    // Files as they are would give 4096-byte blocks to each namespace.
    const loop = await output(
      "losetup",
      "-f",
      "--show",
      "-b",
      String(sectorSizeBytes),
      this.#contents.volumeFile(uuid),
    );
    // The kernel keeps a loop device read-only that an earlier user made so.
    await output("blockdev", "--setrw", loop);
    const directory = join(subsystem.directory, "namespaces", String(nsid));
    this.#shown.set(uuid, { namespace, directory, loop });
    await Deno.mkdir(directory, { recursive: true });
    await write(join(directory, "device_path"), loop);
    await write(join(directory, "device_uuid"), uuid);
    await write(join(directory, "device_nguid"), uuid);
    await write(join(directory, "enable"), "1");
    this.#log.info("showed a namespace", { volume: uuid, device: loop, subsystem: subsystem.nqn });
  }

  async #refresh(shown: Shown, namespace: ExposedNamespace): Promise<void> {
    this.#shown.set(namespace.uuid, { ...shown, namespace });
    if (namespace.sizeBytes === shown.namespace.sizeBytes) return;
    await output("losetup", "-c", shown.loop);
    await write(join(shown.directory, "revalidate_size"), "1");
  }

  async #takeAway({ namespace, directory, loop }: Shown): Promise<void> {
    await removeNamespace(directory);
    await output("losetup", "-d", loop);
    this.#shown.delete(namespace.uuid);
    this.#log.info("took a namespace away", { volume: namespace.uuid, subsystem: namespace.subsystemNqn });
  }

  async #remember(): Promise<void> {
    const bytes = new TextEncoder().encode(JSON.stringify(this.#record));
    await this.#lock.seek(0, Deno.SeekMode.Start);
    await this.#lock.write(bytes);
    await this.#lock.truncate(bytes.length);
  }
}

/** Stands for all hosts in an access list. */
const anyHost = "ALLOW_ANY";

/** What each host may see: UUIDs in order, as one text, so that two of them can be compared. */
function grantsOf(namespaces: readonly ExposedNamespace[]): Map<string, string> {
  const hosts = new Set(namespaces.flatMap(({ acl }) => acl.filter((entry) => entry !== "ALLOW_NONE")));
  const grants = new Map<string, string>();
  for (const host of hosts) {
    const seen = namespaces.filter(({ acl }) => mayAccess(acl, host)).map(({ uuid }) => uuid);
    if (seen.length > 0) grants.set(host, seen.sort().join(" "));
  }
  return grants;
}

function describe({ directory, traddr, trsvcid, up }: Port): PathPort {
  const text = readText(join(directory, "ana_groups/1/ana_state"));
  const ana: AnaState | undefined = anaStates.find((state) => state === text);
  return { address: traddr.includes(":") ? `[${traddr}]:${trsvcid}` : `${traddr}:${trsvcid}`, up, ana };
}

/** Whether anybody has a TCP connection to a port, by proc(5): state 01 is ESTABLISHED. */
function isConnected({ traddr, trsvcid }: Port): boolean {
  const port = Number(trsvcid).toString(16).toUpperCase().padStart(4, "0");
  const table = traddr.includes(":") ? "/proc/net/tcp6" : "/proc/net/tcp";
  return (readText(table) ?? "").split("\n").some((line) => {
    const [, local, , state] = line.trim().split(/\s+/);
    return state === "01" && local?.endsWith(`:${port}`) === true;
  });
}

/**
 * Waits for I/O that is on its way. Disabled first: the kernel goes on showing a namespace whose directory has gone while
 * anybody has one of its files open, which was seen on 6.1 as a namespace that hosts found again at each connect.
 */
async function removeNamespace(directory: string): Promise<void> {
  if (!exists(directory)) return;
  await write(join(directory, "enable"), "0");
  await Deno.remove(directory);
}

async function write(path: string, text: string): Promise<void> {
  try {
    await Deno.writeTextFile(path, text, { create: false });
  } catch (cause) {
    const what = /dhchap_(ctrl_)?key$/.test(path) ? "a key" : `"${text}"`;
    throw new StatusError("INTERNAL", `Cannot write ${what} to ${path}: ${messageOf(cause)}`, { cause });
  }
}

/** Where a port listens, or a referral points to. */
async function writeAddress(directory: string, traddr: string, trsvcid: string): Promise<void> {
  await write(join(directory, "addr_trtype"), "tcp");
  await write(join(directory, "addr_adrfam"), traddr.includes(":") ? "ipv6" : "ipv4");
  await write(join(directory, "addr_traddr"), traddr);
  await write(join(directory, "addr_trsvcid"), trsvcid);
}

/** Lets a port serve a subsystem, or serve it no more. The first one opens the port, the last one closes it. */
async function link(port: string, subsystem: string, linked: boolean): Promise<void> {
  const path = join(port, "subsystems", basename(subsystem));
  if (exists(path) === linked) return;
  if (!linked) return await Deno.remove(path);
  try {
    await Deno.symlink(subsystem, path);
  } catch (cause) {
    const at = (attribute: string) => readText(join(port, `addr_${attribute}`));
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot serve NVMe/TCP on ${at("traddr")}:${at("trsvcid")}: ${messageOf(cause)}; is somebody else there?`,
      { cause },
    );
  }
}

async function checkMachine(): Promise<void> {
  const refuse = (problem: string) =>
    new StatusError("FAILED_PRECONDITION", `Cannot use data plane "nvmet": ${problem}`);
  if (Deno.build.os !== "linux") throw refuse("it is part of Linux");
  if (Deno.uid() !== 0) throw refuse("it needs root, this process has user ID " + Deno.uid());
  if (!exists("/dev/loop-control")) throw refuse("/dev/loop-control is missing, load the module loop");
  if (exists(root)) return;
  await run("modprobe", "-a", "nvmet", "nvmet-tcp");
  if (exists(root)) return;
  throw refuse(`${root} is missing, load the modules nvmet and nvmet-tcp and mount configfs at /sys/kernel/config`);
}

/** Takes away what simulators have left that are not alive any more. */
async function removeLeftovers(log: Logger): Promise<void> {
  for (const { name } of [...Deno.readDirSync(recordDirectory)]) {
    const path = join(recordDirectory, name);
    const file = await Deno.open(path, { read: true, write: true });
    try {
      if (!await file.tryLock(true)) continue;
      const parsed = recordSchema.safeParse(parseJson(await Deno.readTextFile(path)));
      if (parsed.success) {
        log.info("takes away what an earlier simulator has left", { path: parsed.data.contentDir });
        await takeDown(parsed.data, log);
      }
      await removeFile(path);
    } finally {
      file.close();
    }
  }
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    // Killed before it had written, and so before it made anything.
    return undefined;
  }
}

/** Takes away everything in a record that is still there and is marked with its serial number; logs what it cannot. */
async function takeDown(record: Record, log: Logger): Promise<void> {
  const attempt = async (path: string, remove: (path: string) => Promise<void> = Deno.remove) => {
    if (!exists(path)) return;
    try {
      await remove(path);
    } catch (error) {
      log.warning("could not take away", { path, error: messageOf(error) });
    }
  };
  const names = (directory: string) =>
    exists(directory) ? [...Deno.readDirSync(directory)].map(({ name }) => name) : [];
  const ours = record.subsystems.filter((nqn) => {
    const directory = join(root, "subsystems", nqn);
    if (readText(join(directory, "attr_serial")) === record.serial) return true;
    // Killed between making and marking it: nothing is in it yet.
    return exists(directory) && names(join(directory, "namespaces")).length === 0 &&
      names(join(directory, "allowed_hosts")).length === 0;
  });
  for (const id of record.ports) {
    const links = join(root, "ports", id, "subsystems");
    // A port with a foreign subsystem is not ours any more.
    if (names(links).some((nqn) => !ours.includes(nqn))) continue;
    for (const nqn of names(links)) await attempt(join(links, nqn));
    const referrals = join(root, "ports", id, "referrals");
    for (const referral of names(referrals)) await attempt(join(referrals, referral));
    await attempt(join(root, "ports", id));
  }
  for (const nqn of ours) {
    const directory = join(root, "subsystems", nqn);
    for (const nsid of names(join(directory, "namespaces"))) {
      await attempt(join(directory, "namespaces", nsid), removeNamespace);
    }
    for (const host of names(join(directory, "allowed_hosts"))) await attempt(join(directory, "allowed_hosts", host));
    await attempt(directory);
  }
  // Refused by the kernel while another subsystem lets it in.
  for (const host of record.hosts) await attempt(join(root, "hosts", host));
  for (const { name } of Deno.readDirSync("/sys/block")) {
    if (!name.startsWith("loop")) continue;
    const file = readText(`/sys/block/${name}/loop/backing_file`);
    if (file?.startsWith(`${record.contentDir}/`)) await run("losetup", "-d", `/dev/${name}`);
  }
}

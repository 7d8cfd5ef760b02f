/**
 * A data plane over the Linux kernel's own NVMe/TCP target (nvmet, through configfs): volumes are sparse files behind
 * loop devices, each a namespace with the UUID and NGUID of the volume. Hosts see real NVMe/TCP.
 *
 * Where nvmet differs from LightOS:
 * - LightOS has one subsystem, and an ACL per namespace. nvmet has an ACL per subsystem, and no two subsystems of one name.
 *   So a subsystem belongs to one host at a time, and shows exactly what that host may access. Its owner is the first host
 *   that was granted anything, until nothing is left. Hosts with exactly the owner's grants are admitted too (two hosts
 *   share a volume). A host with other grants is rejected meanwhile, which is logged. No host ever sees what it may not
 *   access, but two hosts with different volumes need subsystems of different names, as in PoseidonOS, or two simulators.
 * - A host that is removed from the ACL of nvmet keeps its connections. Here it loses them: the subsystem is removed from
 *   the ports for a moment, which ends every connection. Hosts that are still admitted reconnect by themselves.
 * - nvmet does not report who is connected (before 6.11). Every admitted host counts as connected while the ports have any
 *   connection.
 * - A discovery controller of the kernel lists what its own port serves, and the ports of LightOS' discovery controllers
 *   serve nothing else. So the discovery ports serve a subsystem that no host may access, and refer to the I/O ports, whose
 *   discovery controllers list the cluster's subsystem. I/O ports answer discovery too. Discovery needs no keys.
 * - In LightOS a host whose keys were removed stays connected. Here it loses its connections.
 *
 * Measured on 6.1: `revalidate_size` announces a new size; removing a namespace waits for its I/O and removes the device
 * from hosts within 0.5 s, mounted or not; a port's socket is open while the port has a subsystem.
 *
 * configfs outlives its maker: nvmet_record.ts says how a later simulator finds and removes what an earlier one left.
 */
import { basename, join } from "node:path";
import { messageOf, StatusError } from "../../error.ts";
import type { Logger } from "../../log.ts";
import { parseAddress } from "../../namespace.ts";
import type { ClusterIdentity } from "../lightos/model.ts";
import { Contents, exists, removeFile } from "./contents.ts";
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
import { FilePlane } from "./file_plane.ts";
import { attachWritableLoop } from "./loop_device.ts";
import { nvmetRoot, removeNamespace, setLink, writeAddress, writeAttribute } from "./nvmet_configfs.ts";
import { RecordFile, removeLeftovers, removeRecorded, type TargetRecord } from "./nvmet_record.ts";
import { output, readText, run } from "./run_command.ts";

export interface NvmetOptions {
  /** Where the contents live. */
  readonly contentDir: string;
  readonly identity: ClusterIdentity;
  /** Whether hosts will be authenticated. A kernel that cannot do so is an error at the start. */
  readonly inBandAuth: boolean;
  readonly log: Logger;
}

/** The model number that hosts see. With the serial number it marks what the simulator made. */
const model = "lbcsi simulator";

interface Port {
  readonly id: string;
  readonly directory: string;
  readonly traddr: string;
  readonly trsvcid: string;
  /** Directory of the same server's discovery port; undefined when the I/O port serves discovery. */
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
 * Opens the data plane, after removing what simulators have left that no longer run.
 *
 * @throws StatusError FAILED_PRECONDITION that names what is missing on this machine, or the address that is in use
 */
export async function openNvmetPlane(options: NvmetOptions): Promise<DataPlane> {
  await checkMachine();
  const contents = await Contents.open(options.contentDir);
  await removeLeftovers(options.log);
  const plane = new NvmetPlane(options, contents, await RecordFile.open(contents.directory));
  try {
    await plane.open();
  } catch (error) {
    await plane[Symbol.asyncDispose]();
    throw error;
  }
  return plane;
}

class NvmetPlane extends FilePlane implements DataPlane {
  readonly kind = "nvmet";
  readonly paths: Paths;
  readonly #options: NvmetOptions;
  readonly #recordFile: RecordFile;
  readonly #ports: Port[] = [];
  readonly #shown = new Map<string, Shown>();
  readonly #subsystems = new Map<string, Subsystem>();
  /** Hosts that may connect, with their keys; undefined: all hosts, without keys. */
  #keys: ReadonlyMap<string, HostSecrets> | undefined;
  /** Keys that were written to the entries of hosts. */
  readonly #written = new Map<string, HostSecrets>();
  /** Hosts that were rejected, so that each is logged once. */
  readonly #rejected = new Set<string>();

  constructor(options: NvmetOptions, contents: Contents, recordFile: RecordFile) {
    super(contents, options.log);
    this.#options = options;
    this.#recordFile = recordFile;
    const portOf = (server: number) => {
      const port = this.#ports[server];
      if (port !== undefined) return port;
      throw new StatusError("NOT_FOUND", `Cannot change port ${server}: there are ${this.#ports.length}, from 0 on`);
    };
    this.paths = {
      list: () => this.#ports.map((port) => describe(port)),
      take: (server, up) =>
        this.enqueue(async () => {
          const port = portOf(server);
          port.up = up;
          for (const subsystem of this.#subsystems.values()) await setLink(port.directory, subsystem.directory, up);
          if (port.discovery !== undefined) await setLink(port.discovery, this.#anchor, up);
        }),
      setAna: (server, state) =>
        this.enqueue(() => writeAttribute(join(portOf(server).directory, "ana_groups/1/ana_state"), state)),
    };
  }

  get #record(): TargetRecord {
    return this.#recordFile.record;
  }

  /** Directory of the subsystem that the discovery ports serve, because the kernel opens no port without a subsystem. */
  get #anchor(): string {
    return join(nvmetRoot, "subsystems", `nqn.2014-08.org.nvmexpress:lbcsi-simulator:${this.#record.serial}`);
  }

  /** Makes the ports, and the cluster's own subsystem, which exists until the end. */
  async open(): Promise<void> {
    const { identity } = this.#options;
    // A number from 16 Ki to 48 Ki, because users choose small ones.
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
    await this.#makeSubsystemDirectory(this.#anchor);
    for (const directory of discoveries) {
      for (const port of this.#ports) {
        const referral = join(directory, "referrals", port.id);
        await Deno.mkdir(referral);
        await writeAddress(referral, port.traddr, port.trsvcid);
        await writeAttribute(join(referral, "enable"), "1");
      }
      await setLink(directory, this.#anchor, true);
    }
  }

  /** Throws FAILED_PRECONDITION when this kernel's target does not support keys, which only the entry of a host shows. */
  async #checkKeys(): Promise<void> {
    const trial = `nqn.2014-08.org.nvmexpress:lbcsi-simulator:${this.#record.serial}`;
    const directory = join(nvmetRoot, "hosts", trial);
    this.#record.hosts.push(trial);
    await this.#recordFile.write();
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

  /** Makes a port without subsystems and resolves with its directory. */
  async #makePort(id: number, traddr: string, trsvcid: string): Promise<string> {
    const directory = join(nvmetRoot, "ports", String(id));
    if (exists(directory)) {
      throw new StatusError(
        "FAILED_PRECONDITION",
        `Cannot use data plane "nvmet": somebody else has made ${directory}`,
      );
    }
    this.#record.ports.push(String(id));
    await this.#recordFile.write();
    await Deno.mkdir(directory);
    await writeAddress(directory, traddr, trsvcid);
    return directory;
  }

  // ------------------------------------------------------------------------------------------------------- contents

  deleteVolume(uuid: string): Promise<void> {
    this.exposed.delete(uuid);
    return this.enqueue(async () => {
      await this.reconcile();
      await this.contents.deleteVolume(uuid);
    });
  }

  rollbackVolume(uuid: string, snapshotUuid: string, sizeBytes: bigint): Promise<void> {
    return this.enqueue(async () => {
      const shown = this.#shown.get(uuid);
      if (shown !== undefined) await this.#takeAway(shown);
      await this.contents.rollbackVolume(uuid, snapshotUuid, sizeBytes);
    });
  }

  authenticate(hosts: ReadonlyMap<string, HostSecrets> | undefined): void {
    this.#keys = hosts;
    this.reconcileSoon();
  }

  connectedHosts() {
    const { traddr } = this.#ports.find((port) => isConnected(port)) ?? {};
    if (traddr === undefined) return [];
    const hosts = new Set([...this.#subsystems.values()].flatMap(({ allowed }) => [...allowed]));
    return [...hosts].filter((hostNqn) => hostNqn !== anyHost)
      .map((hostNqn) => ({ hostNqn, address: traddr, hostname: Deno.hostname() }));
  }

  async start(): Promise<void> {
    this.isStarted = true;
    await this.enqueue(async () => {
      await this.reconcile();
      // Again, because an address that is in use must fail the start; `reconcile` only logs it.
      for (const subsystem of this.#subsystems.values()) await this.#serve(subsystem);
    });
  }

  clear(): Promise<void> {
    this.exposed.clear();
    return this.enqueue(async () => {
      await this.reconcile();
      await this.contents.clear();
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.enqueue(async () => {
      this.isStarted = false;
      await removeRecorded(this.#record, this.log);
      await this.#recordFile.remove();
    });
    this.#recordFile.close();
  }

  /** Writes the pages of the loop device, and what is in flight, to the file. */
  protected override async flush(uuid: string): Promise<void> {
    const shown = this.#shown.get(uuid);
    if (shown !== undefined) await output("blockdev", "--flushbufs", shown.loop);
  }

  /** Brings the target in line with the ACLs: first removes hosts, last admits hosts. */
  protected override async reconcile(): Promise<void> {
    if (!this.isStarted) return;
    const nqns = new Set([...this.exposed.values()].map((namespace) => namespace.subsystemNqn));
    for (const nqn of this.#subsystems.keys()) nqns.add(nqn);
    for (const nqn of nqns) {
      try {
        await this.#reconcileSubsystem(nqn);
      } catch (error) {
        this.log.error("could not show the namespaces of a subsystem", { subsystem: nqn, error: messageOf(error) });
      }
    }
  }

  async #reconcileSubsystem(nqn: string): Promise<void> {
    const namespaces = [...this.exposed.values()].filter((namespace) => namespace.subsystemNqn === nqn);
    const keys = this.#keys;
    const granted = new Map([...grantsOf(namespaces)].filter(([host]) => keys === undefined || keys.has(host)));
    const subsystem = this.#subsystems.get(nqn) ?? (granted.size === 0 ? undefined : await this.#makeSubsystem(nqn));
    if (subsystem === undefined) return;
    if (subsystem.owner === undefined || !granted.has(subsystem.owner)) subsystem.owner = [...granted.keys()][0];
    const grants = subsystem.owner === undefined ? "" : granted.get(subsystem.owner) ?? "";
    const allowed = new Set([...granted].filter(([, others]) => others === grants).map(([host]) => host));
    this.#logRejectedHosts(subsystem, granted, allowed);

    const cutOff = [...subsystem.allowed].filter((host) => !allowed.has(host));
    for (const host of cutOff) await this.#deny(subsystem, host);
    if (cutOff.length > 0) await this.#cutConnections(subsystem);
    const visible = new Map(
      namespaces.filter(({ uuid }) => grants.split(" ").includes(uuid)).map((namespace) => [namespace.uuid, namespace]),
    );
    for (const shown of [...this.#shown.values()]) {
      const { uuid, nsid, subsystemNqn } = shown.namespace;
      if (subsystemNqn === nqn && visible.get(uuid)?.nsid !== nsid) await this.#takeAway(shown);
    }
    for (const namespace of visible.values()) {
      const shown = this.#shown.get(namespace.uuid);
      if (shown === undefined) await this.#show(subsystem, namespace);
      else await this.#refresh(shown, namespace);
    }
    for (const host of allowed) {
      if (!subsystem.allowed.has(host) || this.#hasOtherKeys(host)) await this.#allow(subsystem, host);
    }
    subsystem.allowed = allowed;
    if (allowed.size === 0 && nqn !== this.#options.identity.subsystemNqn) await this.#removeSubsystem(subsystem);
    // Served only when all hosts are admitted: a host that reconnects and is rejected gives up for good (6.12).
    else await this.#serve(subsystem);
  }

  #logRejectedHosts(subsystem: Subsystem, granted: ReadonlyMap<string, string>, allowed: ReadonlySet<string>): void {
    for (const host of granted.keys()) {
      const key = `${subsystem.nqn} ${host}`;
      if (allowed.has(host)) this.#rejected.delete(key);
      else if (!this.#rejected.has(key)) {
        this.#rejected.add(key);
        this.log.warning("refuses a host while another one with other volumes has the subsystem", {
          subsystem: subsystem.nqn,
          name: host,
        });
      }
    }
  }

  async #makeSubsystem(nqn: string): Promise<Subsystem> {
    const directory = join(nvmetRoot, "subsystems", nqn);
    await this.#makeSubsystemDirectory(directory);
    const subsystem: Subsystem = { nqn, directory, owner: undefined, allowed: new Set() };
    this.#subsystems.set(nqn, subsystem);
    return subsystem;
  }

  /** Makes the directory of a subsystem and marks it as the simulator's. */
  async #makeSubsystemDirectory(directory: string): Promise<void> {
    if (exists(directory)) {
      throw new StatusError(
        "FAILED_PRECONDITION",
        `Cannot use data plane "nvmet": somebody else has made ${directory}`,
      );
    }
    this.#record.subsystems.push(basename(directory));
    await this.#recordFile.write();
    await Deno.mkdir(directory);
    await writeAttribute(join(directory, "attr_model"), model);
    await writeAttribute(join(directory, "attr_serial"), this.#record.serial);
  }

  async #serve(subsystem: Subsystem): Promise<void> {
    for (const port of this.#ports) if (port.up) await setLink(port.directory, subsystem.directory, true);
  }

  async #removeSubsystem(subsystem: Subsystem): Promise<void> {
    for (const port of this.#ports) await setLink(port.directory, subsystem.directory, false);
    await Deno.remove(subsystem.directory);
    this.#subsystems.delete(subsystem.nqn);
    this.#record.subsystems = this.#record.subsystems.filter((nqn) => nqn !== subsystem.nqn);
    await this.#recordFile.write();
  }

  /** Ends every connection to a subsystem. */
  async #cutConnections(subsystem: Subsystem): Promise<void> {
    for (const port of this.#ports) {
      if (!port.up) continue;
      await setLink(port.directory, subsystem.directory, false);
      await setLink(port.directory, subsystem.directory, true);
    }
  }

  async #allow(subsystem: Subsystem, host: string): Promise<void> {
    if (host === anyHost) return await writeAttribute(join(subsystem.directory, "attr_allow_any_host"), "1");
    const directory = join(nvmetRoot, "hosts", host);
    const entry = join(subsystem.directory, "allowed_hosts", host);
    const keys = this.#keys?.get(host);
    const before = this.#written.get(host);
    if (before !== undefined && (keys === undefined || (keys.target === "" && before.target !== ""))) {
      // The kernel drops a key only together with the entry.
      await removeFile(entry);
      await Deno.remove(directory);
      this.#written.delete(host);
    }
    if (!exists(directory)) {
      this.#record.hosts.push(host);
      await this.#recordFile.write();
      await Deno.mkdir(directory);
    }
    if (keys !== undefined) {
      await writeAttribute(join(directory, "dhchap_key"), keys.host);
      if (keys.target !== "") await writeAttribute(join(directory, "dhchap_ctrl_key"), keys.target);
      this.#written.set(host, keys);
    }
    if (!exists(entry)) await Deno.symlink(directory, entry);
  }

  #hasOtherKeys(host: string): boolean {
    const current = this.#keys?.get(host);
    const written = this.#written.get(host);
    return current?.host !== written?.host || current?.target !== written?.target;
  }

  async #deny(subsystem: Subsystem, host: string): Promise<void> {
    if (host === anyHost) return await writeAttribute(join(subsystem.directory, "attr_allow_any_host"), "0");
    await removeFile(join(subsystem.directory, "allowed_hosts", host));
  }

  async #show(subsystem: Subsystem, namespace: ExposedNamespace): Promise<void> {
    const { uuid, nsid, sizeBytes, sectorSizeBytes } = namespace;
    await this.contents.finishGrowth(uuid, sizeBytes);
    // Without a loop device every namespace on a file would have blocks of 4096 bytes.
    const loop = await attachWritableLoop(this.contents.volumeFile(uuid), sectorSizeBytes);
    const directory = join(subsystem.directory, "namespaces", String(nsid));
    this.#shown.set(uuid, { namespace, directory, loop });
    await Deno.mkdir(directory, { recursive: true });
    await writeAttribute(join(directory, "device_path"), loop);
    await writeAttribute(join(directory, "device_uuid"), uuid);
    await writeAttribute(join(directory, "device_nguid"), uuid);
    await writeAttribute(join(directory, "enable"), "1");
    this.log.info("showed a namespace", { volume: uuid, device: loop, subsystem: subsystem.nqn });
  }

  async #refresh(shown: Shown, namespace: ExposedNamespace): Promise<void> {
    this.#shown.set(namespace.uuid, { ...shown, namespace });
    if (namespace.sizeBytes === shown.namespace.sizeBytes) return;
    await output("losetup", "-c", shown.loop);
    await writeAttribute(join(shown.directory, "revalidate_size"), "1");
  }

  async #takeAway({ namespace, directory, loop }: Shown): Promise<void> {
    await removeNamespace(directory);
    await output("losetup", "-d", loop);
    this.#shown.delete(namespace.uuid);
    this.log.info("took a namespace away", { volume: namespace.uuid, subsystem: namespace.subsystemNqn });
  }
}

/** Means all hosts in an ACL. */
const anyHost = "ALLOW_ANY";

/** What each host may access: sorted UUIDs as one text, so that two hosts can be compared. */
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

/** Whether a TCP connection to a port exists, by proc(5): state 01 is ESTABLISHED. */
function isConnected({ traddr, trsvcid }: Port): boolean {
  const port = Number(trsvcid).toString(16).toUpperCase().padStart(4, "0");
  const table = traddr.includes(":") ? "/proc/net/tcp6" : "/proc/net/tcp";
  return (readText(table) ?? "").split("\n").some((line) => {
    const [, local, , state] = line.trim().split(/\s+/);
    return state === "01" && local?.endsWith(`:${port}`) === true;
  });
}

async function checkMachine(): Promise<void> {
  const machineError = (problem: string) =>
    new StatusError("FAILED_PRECONDITION", `Cannot use data plane "nvmet": ${problem}`);
  if (Deno.build.os !== "linux") throw machineError("it is part of Linux");
  if (Deno.uid() !== 0) throw machineError("it needs root, this process has user ID " + Deno.uid());
  if (!exists("/dev/loop-control")) throw machineError("/dev/loop-control is missing, load the module loop");
  if (exists(nvmetRoot)) return;
  await run("modprobe", "-a", "nvmet", "nvmet-tcp");
  if (exists(nvmetRoot)) return;
  throw machineError(
    `${nvmetRoot} is missing, load the modules nvmet and nvmet-tcp and mount configfs at /sys/kernel/config`,
  );
}

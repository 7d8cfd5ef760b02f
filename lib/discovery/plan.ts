/**
 * What has to be connected, kept and removed, from what the files ask for, what the discovery controllers list and what the
 * kernel has. Pure: it reads no file, no clock and no state of its own.
 */
import { hostIdOf } from "../host/attach/attacher.ts";
import type { DiscoveryLog } from "../host/nvme/discovery_log.ts";
import { addressOf, isAt, isUsable, type NvmeController } from "../host/nvme/controllers.ts";
import { formatAddress, nodeIdOf, parseAddress, type TransportAddress } from "../namespace.ts";
import type { Entry } from "./entries.ts";

/** A subsystem that files ask for, under a host NQN. Its key is `<host NQN> <subsystem NQN>`. */
export interface RequestedSubsystem {
  readonly hostNqn: string;
  readonly subsystemNqn: string;
  readonly hostId: string | undefined;
  readonly controllerLossSeconds: number | undefined;
  readonly entries: readonly Entry[];
}

/** A discovery controller that files or referrals name, under a host NQN. */
export interface DiscoverySource {
  readonly key: string;
  readonly hostNqn: string;
  readonly address: TransportAddress;
  /** Subsystems for which it was named, by NQN. */
  readonly subsystems: Map<string, RequestedSubsystem>;
}

/** The log page of a discovery controller. */
export interface LogPage {
  readonly log: DiscoveryLog;
  /** Name of the connection over which it was read. */
  readonly controller: string;
  readonly readAt: number;
  /** Whether that connection has worked ever since. */
  readonly isFresh: boolean;
}

export interface PlanInput {
  /** What the files ask for, by key: see subsystemsOf. */
  readonly subsystems: ReadonlyMap<string, RequestedSubsystem>;
  /** IP addresses of the entries; absent for an entry whose host name has none now. */
  readonly addresses: ReadonlyMap<Entry, TransportAddress>;
  /** Log pages by the key of their source. */
  readonly pages: ReadonlyMap<string, LogPage>;
  /** All NVMe/TCP controllers of the kernel. */
  readonly controllers: readonly NvmeController[];
  /** Names of controllers that were connected with other keys than the present ones. */
  readonly outdated: ReadonlySet<string>;
  /** Keys of subsystems that were connected for files: they may be disconnected when no file names them. */
  readonly managed: ReadonlySet<string>;
  /** Since when discovery connections have not been live: the `stuckSince` of the previous plan. */
  readonly stuckSince: ReadonlyMap<string, number>;
  readonly nowMs: number;
  /** Age at which a log page is read again. */
  readonly pollMs: number;
}

/** What has to be done for a discovery controller. */
export interface SourcePlan {
  readonly source: DiscoverySource;
  /**
   * `connect`: there is no connection. `replace`: the connection has not been live for too long, another one is made
   * beside it. `read`: the log page is due. `wait`: nothing is due.
   */
  readonly action: "connect" | "replace" | "read" | "wait";
  readonly controller: NvmeController | undefined;
  /** Further connections to the same discovery controller. */
  readonly surplus: readonly NvmeController[];
}

/** An I/O controller that a log page lists for a requested subsystem. */
export interface PathPlan {
  readonly subsystem: RequestedSubsystem;
  readonly address: TransportAddress;
  /** `replace`: the only connections to it have outdated keys. */
  readonly action: "connect" | "replace" | "keep";
  /** The connection to replace. */
  readonly outdated: NvmeController | undefined;
}

/** What one look at the machine leads to. */
export interface ConnectionPlan {
  /** One for each discovery controller that files and referrals name. */
  readonly sources: readonly SourcePlan[];
  readonly paths: readonly PathPlan[];
  /** `<host NQN> <subsystem NQN> <address>` of each path. */
  readonly listed: ReadonlySet<string>;
  /**
   * Connections that do not work, to addresses that no log page lists, while another connection works. They may be dropped
   * unless a namespace needs them.
   */
  readonly unlisted: readonly NvmeController[];
  /** Keys of managed subsystems that no file names. */
  readonly released: readonly string[];
  /** Discovery connections that neither a file nor a referral names. */
  readonly unnamed: readonly NvmeController[];
  /** Keys of sources whose log page may be out of date, because their connection does not work. */
  readonly stale: ReadonlySet<string>;
  /** For the next plan. */
  readonly stuckSince: ReadonlyMap<string, number>;
}

// Log pages that name each other without end must not fill the machine with connections.
const mostReferrals = 64;
/** How long a discovery connection may take to become live again. */
const stuckMs = 120_000;

/** The subsystems that entries ask for, by key. */
export function subsystemsOf(entries: readonly Entry[]): Map<string, RequestedSubsystem> {
  const subsystems = new Map<string, RequestedSubsystem & { readonly entries: Entry[] }>();
  for (const entry of entries) {
    const { hostNqn, subsystemNqn, hostId, controllerLossSeconds } = entry;
    const key = `${hostNqn} ${subsystemNqn}`;
    const subsystem = subsystems.get(key) ?? { hostNqn, subsystemNqn, hostId, controllerLossSeconds, entries: [] };
    subsystem.entries.push(entry);
    subsystems.set(key, subsystem);
  }
  return subsystems;
}

/** The host ID for a host NQN. The kernel knows them in pairs, so one that is in use stays. */
export function hostIdFor(
  hostNqn: string,
  controllers: readonly NvmeController[],
  subsystems: Iterable<RequestedSubsystem>,
): string {
  const used = controllers.find((controller) => controller.hostNqn === hostNqn && controller.hostId !== "")?.hostId;
  if (used !== undefined) return used;
  for (const subsystem of subsystems) {
    if (subsystem.hostNqn === hostNqn && subsystem.hostId !== undefined) return subsystem.hostId;
  }
  return hostIdOf(nodeIdOf(hostNqn));
}

/** Where a controller is connected to: `traddr:trsvcid`, or its address as sysfs shows it. */
export function placeOf(controller: NvmeController): string {
  const address = addressOf(controller);
  return address === undefined ? controller.address : formatAddress(address);
}

/** Plans the next step towards what the entries ask for. It drops nothing that may be needed: see ConnectionPlan. */
export function planConnections(input: PlanInput): ConnectionPlan {
  const { subsystems, controllers, managed, pages } = input;
  const sources = sourcesOf(input);
  const stuckSince = new Map<string, number>();
  const sourcePlans = [...sources.values()].map((source) => planSource(input, source, stuckSince));
  const stale = new Set(
    sourcePlans.filter(({ controller }) => controller?.state !== "live").map(({ source }) => source.key),
  );
  const isUpToDate = ({ key }: DiscoverySource) => pages.get(key)?.isFresh === true && !stale.has(key);
  const paths = planPaths(input, sources);
  const listed = new Set(paths.map(({ subsystem, address }) => pathKey(subsystem, address)));
  return {
    sources: sourcePlans,
    paths,
    listed,
    unlisted: controllers.filter((controller) => {
      const { hostNqn, subsystemNqn } = controller;
      const named = [...sources.values()].filter((source) =>
        source.hostNqn === hostNqn && source.subsystems.has(subsystemNqn)
      );
      return named.every(isUpToDate) && isUnlisted(controller, input, listed);
    }),
    released: [...managed].filter((key) => !subsystems.has(key)),
    unnamed: controllers.filter((controller) => {
      const named = [...sources.values()].filter(({ hostNqn }) => hostNqn === controller.hostNqn);
      // A source whose log page is not known may refer to this controller.
      return named.every(isUpToDate) && isUnnamed(controller, input, named);
    }),
    stale,
    stuckSince,
  };
}

/** The discovery controllers that entries name, and those that their log pages refer to, 64 at most for each subsystem. */
function sourcesOf({ subsystems, addresses, pages }: PlanInput): Map<string, DiscoverySource> {
  const sources = new Map<string, DiscoverySource>();
  const add = (address: TransportAddress, subsystem: RequestedSubsystem) => {
    const { hostNqn } = subsystem;
    const key = sourceKey(hostNqn, address);
    const source = sources.get(key) ?? { key, hostNqn, address, subsystems: new Map() };
    source.subsystems.set(subsystem.subsystemNqn, subsystem);
    sources.set(key, source);
  };
  for (const subsystem of subsystems.values()) {
    for (const entry of subsystem.entries) {
      const address = addresses.get(entry);
      if (address !== undefined) add(address, subsystem);
    }
    const namedByFiles = sources.size;
    // Referrals of referrals count too: a Map also visits what is added during the walk.
    for (const [key, source] of sources) {
      if (!source.subsystems.has(subsystem.subsystemNqn) || source.hostNqn !== subsystem.hostNqn) continue;
      for (const address of pages.get(key)?.log.referrals ?? []) {
        const isNew = !sources.has(sourceKey(subsystem.hostNqn, address));
        if (isNew && sources.size - namedByFiles >= mostReferrals) continue;
        add(address, subsystem);
      }
    }
  }
  return sources;
}

/** @param stuckSince receives since when the source's connection has not been live */
function planSource(
  { controllers, pages, nowMs, pollMs, stuckSince: before }: PlanInput,
  source: DiscoverySource,
  stuckSince: Map<string, number>,
): SourcePlan {
  const connected = controllers.filter((controller) =>
    controller.isDiscovery && controller.hostNqn === source.hostNqn && isAt(controller, source.address) &&
    isUsable(controller)
  ).sort((a, b) =>
    // The kernel takes any number of equal connections to a discovery controller. Two daemons must keep the same one.
    Number(b.state === "live") - Number(a.state === "live") || a.name.localeCompare(b.name, "en", { numeric: true })
  );
  const [controller, ...surplus] = connected;
  if (controller === undefined) return { source, action: "connect", controller, surplus };
  if (controller.state !== "live") {
    // The kernel tries to reconnect it every few seconds.
    const key = `${source.key} ${controller.name}`;
    const since = before.get(key) ?? nowMs;
    stuckSince.set(key, since);
    return { source, action: nowMs - since < stuckMs ? "wait" : "replace", controller, surplus };
  }
  const page = pages.get(source.key);
  const isDue = page === undefined || !page.isFresh || page.controller !== controller.name ||
    nowMs - page.readAt >= pollMs;
  return { source, action: isDue ? "read" : "wait", controller, surplus };
}

function planPaths(
  { pages, controllers, outdated }: PlanInput,
  sources: ReadonlyMap<string, DiscoverySource>,
): PathPlan[] {
  const paths = new Map<string, PathPlan>();
  for (const source of sources.values()) {
    for (const { subsystemNqn, address } of pages.get(source.key)?.log.controllers ?? []) {
      const subsystem = source.subsystems.get(subsystemNqn);
      if (subsystem === undefined || paths.has(pathKey(subsystem, address))) continue;
      const connected = controllers.filter((controller) =>
        controller.subsystemNqn === subsystemNqn && controller.hostNqn === subsystem.hostNqn &&
        isAt(controller, address) && isUsable(controller)
      );
      const isKept = connected.some(({ name }) => !outdated.has(name));
      const [old] = connected;
      const action = isKept ? "keep" : old === undefined ? "connect" : "replace";
      paths.set(pathKey(subsystem, address), { subsystem, address, action, outdated: isKept ? undefined : old });
    }
  }
  return [...paths.values()];
}

/** Whether a connection does not work and leads to an address that is no longer listed, while another one works. */
function isUnlisted(
  controller: NvmeController,
  { subsystems, controllers }: PlanInput,
  listed: ReadonlySet<string>,
): boolean {
  const { subsystemNqn } = controller;
  const key = `${controller.hostNqn} ${subsystemNqn}`;
  if (controller.isDiscovery || !subsystems.has(key) || controller.state === "live" || !isUsable(controller)) {
    return false;
  }
  const addresses = [...listed].filter((path) => path.startsWith(`${key} `)).map((path) => path.split(" ")[2]);
  if (addressOf(controller) === undefined || addresses.length === 0) return false;
  if (addresses.some((text) => isAtText(controller, text))) return false;
  return controllers.some((other) => other.subsystemNqn === subsystemNqn && other.state === "live");
}

/** Whether a discovery connection of one of our host NQNs is named by no file and no referral. */
function isUnnamed(
  controller: NvmeController,
  { subsystems, addresses, managed }: PlanInput,
  named: readonly DiscoverySource[],
): boolean {
  const { hostNqn } = controller;
  const isOurs = [...managed].some((key) => key.startsWith(`${hostNqn} `));
  if (!controller.isDiscovery || !isOurs || named.some(({ address }) => isAt(controller, address))) return false;
  // A host name without an address now may be the name of this controller.
  return ![...subsystems.values()].some((subsystem) =>
    subsystem.hostNqn === hostNqn && subsystem.entries.some((entry) => !addresses.has(entry))
  );
}

function sourceKey(hostNqn: string, address: TransportAddress): string {
  return `${hostNqn} discovery ${formatAddress(address)}`;
}

/** `<host NQN> <subsystem NQN> <address>`. */
export function pathKey(
  { hostNqn, subsystemNqn }: Pick<RequestedSubsystem, "hostNqn" | "subsystemNqn">,
  address: TransportAddress,
): string {
  return `${hostNqn} ${subsystemNqn} ${formatAddress(address)}`;
}

function isAtText(controller: NvmeController, text: string | undefined): boolean {
  const address = text === undefined ? undefined : parseAddress(text);
  return address !== undefined && isAt(controller, address);
}

/**
 * A Discovery-Client: keeps this machine connected to the subsystems that the files of a directory name (input.ts), as
 * the cluster moves. It is LightOS' daemon of that name for a machine that has only lbcsi.
 *
 * Nothing of what it does is in this process. It compares what the files ask for, what the discovery controllers tell and
 * what sysfs shows, and starts what is missing; so it takes over whatever connections it finds when it starts, and leaves
 * them when it ends: I/O notices neither. What it has to know after a crash, which subsystems it may let go of, is in a
 * file of the watched directory, made of comments for any other daemon that reads it.
 *
 * - Each discovery controller that a file or a referral names is kept connected, not one of them: each may tell only of its
 *   own port (the kernel's target does). nvme-cli makes these connections and reads the log pages, for that takes ioctls.
 *   They are persistent: the kernel reconnects them by itself, and gives them up after ctrl_loss_tmo.
 * - A log page is read when its connection comes (back), and then every few seconds. The kernel announces changes by
 *   uevents only (netlink), which no interface of the runtime can receive.
 * - Whatever a log page lists for a wanted subsystem and host NQN is connected. What fails is tried again after 1, 2, 4 …
 *   60 seconds, and at once when the page changes.
 * - Connections that the kernel does not heal by itself are healed as with the direct attacher (connection_watch.ts).
 * - A subsystem that no file names any more is disconnected when nothing uses its devices, looked at again immediately
 *   before; connections which no file ever named are never touched. A connection to an address that left the log page is
 *   dropped only while it does not work and others do, for each of its namespaces.
 *
 * The rule behind the last points: losing a connection that is needed costs data, keeping one too many costs nothing.
 */
import type { DhchapKeys } from "../auth_key.ts";
import { backgroundContext, type Fields, type Logger, type RequestContext, sleep } from "../context.ts";
import { messageOf, StatusError } from "../error.ts";
import { hostIdOf } from "../host/attach/attacher.ts";
import { temporaryPrefix } from "../host/attach/discovery_client.ts";
import { type Host, kindBehind } from "../host/host.ts";
import { authenticationObstacle, connectAuthenticated, dropOutdated, hasKeys } from "../host/nvme/authentication.ts";
import { connectController } from "../host/nvme/connect.ts";
import type { ConnectOptions } from "../host/nvme/connect_options.ts";
import {
  addressOf,
  allControllers,
  discoveryNqn,
  isAt,
  isUsable,
  type NvmeController,
} from "../host/nvme/controllers.ts";
import { devicesOf, hasNamespaces } from "../host/nvme/devices.ts";
import { disconnectController } from "../host/nvme/disconnect.ts";
import { type DiscoveryLog, readDiscoveryLog } from "../host/nvme/discovery_log.ts";
import { connectByKernel, describeConnectFailure } from "../host/nvme/fabrics.ts";
import { ConnectionWatch } from "../host/nvme/connection_watch.ts";
import { hasMultipath } from "../host/nvme/multipath.ts";
import { isNeeded } from "../host/nvme/paths.ts";
import { applyRemedy } from "../host/nvme/remedies.ts";
import { allUsersOf } from "../host/users.ts";
import { formatAddress, nodeIdOf, parseAddress, type TransportAddress } from "../namespace.ts";
import { discoveryInput, type Entry, isIpAddress } from "./input.ts";

export interface ClientOptions {
  readonly host: Host;
  /** The watched directory, or a link to it. It is never made: while it is missing, what the files said last counts. */
  readonly directory: string;
  readonly log: Logger;
  /** How often a log page is read that nothing is known to have changed. */
  readonly pollMs: number;
  /** For I/O controllers whose entry says nothing else; see ConnectWish. */
  readonly controllerLossSeconds: number | undefined;
  readonly keepAliveSeconds: number | undefined;
  readonly ioQueues: number | undefined;
  /**
   * What connections to I/O controllers are authenticated with, all of them; those that are there without these keys are
   * replaced. Discovery controllers are asked without.
   */
  readonly keys?: DhchapKeys | undefined;
  /** A clock, in milliseconds. */
  readonly now?: () => number;
}

export interface Client {
  /** Looks at files, log pages and sysfs once, and starts what is missing. Does not wait for what it has started. */
  look(): Promise<void>;
  /** Resolves when nothing of what was started goes on any more. */
  idle(): Promise<void>;
  /** Looks again and again until `signal` aborts; then waits for what goes on, `stopMs` at most. Connections stay. */
  run(signal: AbortSignal, stopMs: number): Promise<void>;
}

/** A subsystem that is wanted under a host NQN. */
interface Pair {
  readonly hostNqn: string;
  readonly subsystemNqn: string;
  readonly hostId: string | undefined;
  readonly controllerLossSeconds: number | undefined;
  readonly entries: Entry[];
}

/** A discovery controller that is wanted under a host NQN. */
interface Source {
  readonly hostNqn: string;
  readonly address: TransportAddress;
  /** For which subsystems it was named, by NQN. */
  readonly pairs: Map<string, Pair>;
}

/** What a discovery controller has told. */
interface Page {
  readonly log: DiscoveryLog;
  /** Over which connection. */
  readonly controller: string;
  readonly readAt: number;
  /** Whether that connection has worked ever since. */
  fresh: boolean;
}

// Log pages that name each other without end must not fill the machine with connections.
const mostReferrals = 64;
const discoveryKeepAliveSeconds = 30;
const firstPauseMs = 1000;
const longestPauseMs = 60_000;
// nvme-cli waits 3 s for an address that does not answer; a disconnect of a controller that has not noticed takes 61 s.
const taskLimitMs = 90_000;
const logPageLimitMs = 15_000;
const lookMs = 1000;
/** How long a connection has to be unlisted and without use before it is dropped. */
const staleMs = 30_000;
const resolvedMs = 60_000;
const healEveryMs = 5000;
/** How long a discovery connection may take to get live again. */
const stuckMs = 120_000;

/** See the head of this file. */
export function createDiscoveryDaemon(options: ClientOptions): Client {
  const { host, directory, log } = options;
  const now = options.now ?? (() => performance.now());
  const input = discoveryInput(host, directory, log, now);
  const managedFile = `${directory}/${temporaryPrefix}lbcsi`;
  const stop = new AbortController();
  const running = new Map<string, Promise<void>>();
  const pauses = new Map<string, { failures: number; until: number }>();
  const pages = new Map<string, Page>();
  /** The log pages that this look goes by: others may come while it goes on. */
  let counted: ReadonlyMap<string, Page> = pages;
  const resolved = new Map<string, { readonly address: string | undefined; readonly until: number }>();
  const staleSince = new Map<string, number>();
  const states = new Map<string, string>();
  const said = new Map<string, string>();
  let entries: readonly Entry[] = [];
  let managed: Set<string> = new Set();
  /** Whether the directory keeps what is noted down there. */
  let isNoted = true;
  /** Host NQNs of entries whose host name has no address now. */
  let unresolved: ReadonlySet<string> = new Set();
  /** Names of connections of ours that have other keys than they should. */
  let outdated: ReadonlySet<string> = new Set();
  let wake: (() => void) | undefined;
  const watch = new ConnectionWatch(host);
  let healAt = -Infinity;
  /** Namespaces that files asked for when it healed last. */
  let askedBefore: ReadonlySet<string> = new Set();
  /** Since when discovery connections have not been live. */
  const stuckSince = new Map<string, number>();

  /** Logs a trouble when it is new or another one; undefined: it is over. */
  function say(about: string, problem: string | undefined, event = "", fields: Fields = {}): void {
    if (problem === undefined) return void said.delete(about);
    if (said.get(about) === problem) return;
    said.set(about, problem);
    log.warning(event, { ...fields, error: problem });
  }

  /** Starts `work` unless the same goes on or has failed a short while ago; it answers why it failed, or undefined. */
  function start(
    key: string,
    failure: string,
    fields: Fields,
    work: (ctx: RequestContext) => Promise<string | undefined>,
  ): void {
    if (running.has(key) || stop.signal.aborted || (pauses.get(key)?.until ?? -Infinity) > now()) return;
    const ctx = backgroundContext("go on", log, taskLimitMs, stop.signal);
    const done = work(ctx).catch(messageOf).then((problem) => {
      running.delete(key);
      if (stop.signal.aborted) return;
      if (problem === undefined) pauses.delete(key);
      else {
        const failures = (pauses.get(key)?.failures ?? 0) + 1;
        pauses.set(key, { failures, until: now() + Math.min(firstPauseMs * 2 ** (failures - 1), longestPauseMs) });
      }
      say(key, problem, `${failure}, tries again`, fields);
      wake?.();
    });
    running.set(key, done);
  }

  // ---------------------------------------------------------------------------------------------------- what is wanted

  function pairsOf(entries: readonly Entry[]): Map<string, Pair> {
    const pairs = new Map<string, Pair>();
    for (const entry of entries) {
      const key = `${entry.hostNqn} ${entry.subsystemNqn}`;
      const pair = pairs.get(key) ?? { ...entry, entries: [] };
      pair.entries.push(entry);
      pairs.set(key, pair);
    }
    return pairs;
  }

  /** The IP address of an entry's host name, by the machine's own resolver; undefined when it has none now. */
  async function addressOfEntry({ traddr, trsvcid }: Entry): Promise<TransportAddress | undefined> {
    if (isIpAddress(traddr)) return { traddr, trsvcid };
    let found = resolved.get(traddr);
    if (found === undefined || found.until <= now()) {
      const ctx = backgroundContext(`resolve "${traddr}"`, log, 5000, stop.signal);
      try {
        const { stdout } = await host.run("getent", ["ahosts", traddr], { signal: ctx.signal, onAbort: "kill", log });
        const first = /^(\S+)\s+STREAM/m.exec(stdout)?.[1];
        // An address that was right may still be: better than none.
        found = { address: first ?? found?.address, until: now() + (first === undefined ? lookMs * 5 : resolvedMs) };
        say(`name ${traddr}`, first === undefined ? "it has no address" : undefined, "cannot resolve a host name", {
          name: traddr,
        });
      } catch (error) {
        found = { address: found?.address, until: now() + lookMs * 5 };
        say(`name ${traddr}`, messageOf(error), "cannot resolve a host name", { name: traddr });
      }
      resolved.set(traddr, found);
    }
    return found.address === undefined ? undefined : { traddr: found.address, trsvcid };
  }

  /** Every discovery controller that the files name, and those that these refer to. */
  async function sourcesOf(pairs: Iterable<Pair>): Promise<Map<string, Source>> {
    const sources = new Map<string, Source>();
    const without = new Set<string>();
    const add = (address: TransportAddress, pair: Pair) => {
      const key = sourceKey(pair.hostNqn, address);
      const source = sources.get(key) ?? { hostNqn: pair.hostNqn, address, pairs: new Map() };
      source.pairs.set(pair.subsystemNqn, pair);
      sources.set(key, source);
    };
    for (const pair of pairs) {
      for (const entry of pair.entries) {
        const address = await addressOfEntry(entry);
        if (address === undefined) without.add(pair.hostNqn);
        else add(address, pair);
      }
      const named = sources.size;
      // New ones are visited too: a Map goes on with what is added while it is walked.
      for (const [key, source] of sources) {
        if (!source.pairs.has(pair.subsystemNqn) || source.hostNqn !== pair.hostNqn) continue;
        for (const address of pages.get(key)?.log.referrals ?? []) {
          if (!sources.has(sourceKey(pair.hostNqn, address)) && sources.size - named >= mostReferrals) continue;
          add(address, pair);
        }
      }
    }
    unresolved = without;
    return sources;
  }

  /** The host ID that belongs to a host NQN: the kernel knows them in pairs, so one that is in use stays. */
  function hostIdFor(hostNqn: string, controllers: readonly NvmeController[], pairs: Iterable<Pair>): string {
    const used = controllers.find((controller) => controller.hostNqn === hostNqn && controller.hostId !== "")?.hostId;
    if (used !== undefined) return used;
    for (const pair of pairs) if (pair.hostNqn === hostNqn && pair.hostId !== undefined) return pair.hostId;
    return hostIdOf(nodeIdOf(hostNqn));
  }

  // ------------------------------------------------------------------------------------- what may be let go of one day

  const managedHead = "# Connected by lbcsi discovery-client, which may disconnect it: host NQN, subsystem NQN";

  /** Read anew each time: another directory in this one's place (a volume that was unmounted) must not count as "no files". */
  async function readManaged(): Promise<Set<string>> {
    if (!isNoted) return managed;
    const text = await host.readText(managedFile) ?? "";
    return new Set([...text.matchAll(/^# (nqn\.\S+ nqn\.\S+)$/gm)].flatMap(([, pair]) => pair ?? []));
  }

  async function writeManaged(next: Set<string>): Promise<void> {
    if (next.size === managed.size && next.isSubsetOf(managed)) return;
    managed = next;
    const text = [managedHead, ...[...next].sort().map((pair) => `# ${pair}`), ""].join("\n");
    try {
      await host.replaceText(managedFile, text, `${managedFile}.new`);
      isNoted = true;
      say(managedFile, undefined);
    } catch (error) {
      isNoted = false;
      say(managedFile, messageOf(error), "cannot note down what it manages, and forgets it when it ends", {
        path: managedFile,
      });
    }
  }

  // ----------------------------------------------------------------------------------------------------------- a look

  async function look(): Promise<void> {
    entries = await input.read() ?? entries;
    managed = await readManaged();
    const pairs = pairsOf(entries);
    // Before anything is connected, so that a crash leaves nothing that nobody may let go of.
    await writeManaged(managed.union(new Set(pairs.keys())));
    const controllers = (await allControllers(host)).filter(({ transport }) => transport === "tcp");
    watchStates(controllers, pairs);
    if (await host.kindOf(`${host.roots.dev}/nvme-fabrics`) === "absent") {
      say(
        "fabrics",
        `${host.roots.dev}/nvme-fabrics is missing, the kernel module nvme_tcp is needed`,
        "cannot connect",
      );
      return;
    }
    say("fabrics", undefined);
    counted = new Map(pages);
    const sources = await sourcesOf(pairs.values());
    const hostId = (hostNqn: string) => hostIdFor(hostNqn, controllers, pairs.values());
    outdated = await outdatedOf(controllers, pairs);
    for (const source of sources.values()) keepSource(source, controllers, hostId(source.hostNqn));
    const listed = new Set<string>();
    for (const [key, source] of sources) {
      for (const { subsystemNqn, address } of pages.get(key)?.log.controllers ?? []) {
        const pair = source.pairs.get(subsystemNqn);
        if (pair === undefined) continue;
        listed.add(`${source.hostNqn} ${subsystemNqn} ${formatAddress(address)}`);
        keepConnected(pair, address, controllers, hostId(source.hostNqn));
      }
    }
    await dropStale(pairs, sources, controllers, listed);
    for (const pair of managed) if (!pairs.has(pair)) letGo(pair);
    dropSources(sources, controllers);
    for (const key of pages.keys()) if (!sources.has(key)) pages.delete(key);
    await heal(pairs, controllers, listed, hostId);
  }

  /** Heals what the kernel does not (connection_watch.ts), at most one connection of each subsystem. */
  async function heal(
    pairs: Map<string, Pair>,
    controllers: readonly NvmeController[],
    listed: ReadonlySet<string>,
    hostId: (hostNqn: string) => string,
  ): Promise<void> {
    if (now() < healAt) return;
    healAt = now() + healEveryMs;
    const namespaces = input.namespaces();
    const asked = new Set([...namespaces.values()].flatMap((uuids) => [...uuids]));
    for (const uuid of askedBefore.difference(asked)) watch.release(uuid);
    askedBefore = asked;
    const remedies = await watch.findRemedies(
      [...pairs].map(([key, { hostNqn, subsystemNqn }]) => ({
        key,
        subsystemNqn,
        controllers: controllers.filter((controller) =>
          controller.hostNqn === hostNqn && controller.subsystemNqn === subsystemNqn && !controller.isDiscovery
        ),
        needed: namespaces.get(subsystemNqn) ?? new Set<string>(),
        isListed: (controller: NvmeController) => listed.has(`${key} ${where(controller)}`),
      })),
      now(),
    );
    for (const remedy of remedies) {
      const { hostNqn, subsystemNqn } = remedy.controller;
      const key = `${hostNqn} ${subsystemNqn}`;
      const pair = pairs.get(key);
      if (pair === undefined) continue;
      const fields = { subsystem: subsystemNqn, name: remedy.controller.name };
      start(`heal ${key}`, "could not heal a connection", fields, async (ctx) => {
        await applyRemedy(host, ctx, remedy, (ctx) => connectBeside(ctx, pair, remedy.controller, hostId(hostNqn)));
        return undefined;
      });
    }
  }

  /** Another connection to the address of one that there is; answers why it failed, or undefined. */
  async function connectBeside(
    ctx: RequestContext,
    pair: Pick<Pair, "hostNqn" | "subsystemNqn" | "controllerLossSeconds">,
    controller: NvmeController,
    hostId: string,
  ): Promise<string | undefined> {
    const address = addressOf(controller);
    if (address === undefined) return `its address is not known (${controller.address})`;
    const { keys } = options;
    const wish = wishOf(pair, address, hostId);
    if (keys !== undefined && !controller.isDiscovery) {
      return (await connectAuthenticated(host, ctx, { ...wish, keys, beside: true }))?.problem;
    }
    try {
      await connectByKernel(host, wish, { duplicate: true });
      return undefined;
    } catch (error) {
      return describeConnectFailure(messageOf(error), pair.hostNqn);
    }
  }

  function wishOf(
    { hostNqn, subsystemNqn, controllerLossSeconds }: Pick<Pair, "hostNqn" | "subsystemNqn" | "controllerLossSeconds">,
    address: TransportAddress,
    hostId: string,
  ): ConnectOptions {
    if (subsystemNqn === discoveryNqn) {
      return { address, subsystemNqn, hostNqn, hostId, keepAliveSeconds: discoveryKeepAliveSeconds };
    }
    return {
      address,
      subsystemNqn,
      hostNqn,
      hostId,
      controllerLossSeconds: controllerLossSeconds ?? options.controllerLossSeconds,
      keepAliveSeconds: options.keepAliveSeconds,
      ioQueues: options.ioQueues,
    };
  }

  /** One line when a connection of ours stops working, works again, or goes. */
  function watchStates(controllers: readonly NvmeController[], pairs: Map<string, Pair>): void {
    const seen = new Set<string>();
    for (const controller of controllers) {
      const isSource = controller.isDiscovery &&
        [...pairs.values()].some(({ hostNqn }) => hostNqn === controller.hostNqn);
      if (!isSource && !pairs.has(`${controller.hostNqn} ${controller.subsystemNqn}`)) continue;
      // A name can come back for another connection.
      const key = `${controller.name} ${controller.subsystemNqn} ${where(controller)}`;
      seen.add(key);
      const before = states.get(key);
      states.set(key, controller.state);
      if (before === controller.state) continue;
      const facts = { name: controller.name, address: where(controller), subsystem: controller.subsystemNqn };
      if (controller.state === "live") log.info(before === undefined ? "is connected" : "is connected again", facts);
      else log.warning("is not connected now", { ...facts, error: `its state is ${controller.state}` });
    }
    for (const key of states.keys()) {
      if (seen.has(key)) continue;
      states.delete(key);
      const [name = "", subsystem = "", address = ""] = key.split(" ");
      log.info("has no such connection any more", { name, address, subsystem });
    }
  }

  /** Whether a log page is up to date and was when this look took from it what is listed and referred to. */
  function hasTold(key: string): boolean {
    const page = pages.get(key);
    return page !== undefined && page.fresh && counted.get(key) === page;
  }

  function keepSource(source: Source, controllers: readonly NvmeController[], hostId: string): void {
    const { hostNqn, address } = source;
    const key = sourceKey(hostNqn, address);
    const discovery = { hostNqn, subsystemNqn: discoveryNqn, controllerLossSeconds: undefined };
    const here = controllers.filter((controller) =>
      controller.isDiscovery && controller.hostNqn === hostNqn && isAt(controller, address) && isUsable(controller)
    ).sort((a, b) =>
      Number(b.state === "live") - Number(a.state === "live") || a.name.localeCompare(b.name, "en", { numeric: true })
    );
    const [controller, ...surplus] = here;
    // The kernel takes any number of equal connections to a discovery controller. Two daemons agree on the same one.
    for (const other of surplus) startDrop(other);
    const page = pages.get(key);
    if (controller === undefined) {
      if (page !== undefined) page.fresh = false;
      const fields = { address: formatAddress(address) };
      start(`connect ${key}`, "could not connect to a discovery controller", fields, async (ctx) => {
        return await connectController(host, ctx, wishOf(discovery, address, hostId));
      });
      return;
    }
    if (controller.state !== "live") {
      if (page !== undefined) page.fresh = false;
      const stuck = `${key} ${controller.name}`;
      if (!stuckSince.has(stuck)) stuckSince.set(stuck, now());
      if (now() - (stuckSince.get(stuck) ?? 0) < stuckMs) return;
      // The kernel connects it again every few seconds; where it does not get on, another one takes its place.
      const fields = { address: formatAddress(address), name: controller.name };
      start(`connect ${key}`, "could not connect to a discovery controller", fields, async (ctx) => {
        return await connectBeside(ctx, discovery, controller, hostId);
      });
      return;
    }
    for (const stuck of stuckSince.keys()) if (stuck.startsWith(`${key} `)) stuckSince.delete(stuck);
    const isDue = page === undefined || !page.fresh || page.controller !== controller.name ||
      now() - page.readAt >= options.pollMs;
    if (!isDue) return;
    const fields = { address: formatAddress(address), name: controller.name };
    start(`read ${key}`, "could not read a log page", fields, async (ctx) => {
      const limited = backgroundContext("read a log page", ctx.log, logPageLimitMs, ctx.signal);
      const found = await readDiscoveryLog(host, limited, controller);
      pages.set(key, { log: found, controller: controller.name, readAt: now(), fresh: true });
      if (page !== undefined && page.log.generation === found.generation) return undefined;
      const offered = found.controllers.filter(({ subsystemNqn }) => source.pairs.has(subsystemNqn));
      log.info(page === undefined ? "read a log page" : "read a changed log page", {
        address: formatAddress(address),
        addresses: offered.map((record) => formatAddress(record.address)),
        ...(found.referrals.length === 0 ? {} : { referrals: found.referrals.map(formatAddress) }),
      });
      // What was refused may be let in now.
      for (const waiting of pauses.keys()) if (waiting.startsWith(`connect ${hostNqn} `)) pauses.delete(waiting);
      return undefined;
    });
  }

  function keepConnected(
    pair: Pair,
    address: TransportAddress,
    controllers: readonly NvmeController[],
    hostId: string,
  ): void {
    const { hostNqn, subsystemNqn } = pair;
    const fields = { subsystem: subsystemNqn, address: formatAddress(address) };
    const key = `connect ${hostNqn} ${subsystemNqn} ${fields.address}`;
    const here = controllers.filter((controller) =>
      controller.subsystemNqn === subsystemNqn && controller.hostNqn === hostNqn && isAt(controller, address) &&
      isUsable(controller)
    );
    if (here.some(({ name }) => !outdated.has(name))) {
      if (!running.has(key)) say(key, undefined);
      return;
    }
    const { keys } = options;
    const wish = wishOf(pair, address, hostId);
    start(key, "could not connect", fields, async (ctx) => {
      if (keys === undefined) return await connectController(host, ctx, wish);
      const obstacle = await authenticationObstacle(
        host,
        keys.controller === undefined ? "unidirectional" : "bidirectional",
      );
      if (obstacle !== undefined) return obstacle;
      const [old] = here;
      if (old !== undefined && !await hasMultipath(host)) {
        return `${old.name} is connected there with other keys, and without native NVMe multipath in the kernel it cannot be ` +
          `replaced, disconnect it first`;
      }
      const failed = await connectAuthenticated(host, ctx, { ...wish, keys, beside: old !== undefined });
      if (failed !== undefined) return failed.problem;
      if (old !== undefined) await dropOutdated(host, ctx, { subsystemNqn, hostNqn, keys });
      return undefined;
    });
  }

  async function outdatedOf(
    controllers: readonly NvmeController[],
    pairs: Map<string, Pair>,
  ): Promise<ReadonlySet<string>> {
    const found = new Set<string>();
    const { keys } = options;
    if (keys === undefined) return found;
    for (const controller of controllers) {
      if (controller.isDiscovery || !pairs.has(`${controller.hostNqn} ${controller.subsystemNqn}`)) continue;
      if (!await hasKeys(host, controller, keys)) found.add(controller.name);
    }
    return found;
  }

  // ----------------------------------------------------------------------------------------------------- letting go

  function startDrop(controller: NvmeController): void {
    const { name, subsystemNqn } = controller;
    const fields = { name, subsystem: subsystemNqn, address: where(controller) };
    start(`drop ${name}`, "could not disconnect", fields, async (ctx) => {
      await disconnectController(host, ctx, controller);
      return undefined;
    });
  }

  /** Disconnects a subsystem that no file names any more, if nothing uses it. */
  function letGo(key: string): void {
    const [hostNqn = "", subsystemNqn = ""] = key.split(" ");
    if ([...running.keys()].some((other) => other.startsWith(`connect ${key} `) || other === `heal ${key}`)) return;
    start(`let go ${key}`, "could not let go of a subsystem", { subsystem: subsystemNqn }, async (ctx) => {
      const devices = await devicesOf(host, subsystemNqn);
      for (const device of devices) {
        const users = await allUsersOf(host, device);
        if (users.length > 0) return `${device.path} is in use by ${users.join(", ")}, it stays connected`;
      }
      if (await hasNamespaces(host, subsystemNqn, devices.map(({ name }) => name))) {
        return "it shows a namespace without a UUID, of which nobody knows who uses it, it stays connected";
      }
      // Asked for again meanwhile, by a volume that is being attached.
      const wanted = pairsOf(await input.read() ?? entries);
      if (wanted.has(key)) return undefined;
      const connected = (await allControllers(host)).filter((controller) =>
        controller.subsystemNqn === subsystemNqn && controller.hostNqn === hostNqn && controller.transport === "tcp"
      );
      for (const controller of connected) await disconnectController(host, ctx, controller);
      // Discovery connections are found by the host NQN alone, so they go before it is forgotten.
      const isLast = [...wanted.values()].every((pair) => pair.hostNqn !== hostNqn);
      const isLeft = (await allControllers(host)).some((controller) =>
        controller.hostNqn === hostNqn && isUsable(controller) &&
        (controller.subsystemNqn === subsystemNqn || isLast && controller.isDiscovery && controller.transport === "tcp")
      );
      if (isLeft) return undefined;
      await writeManaged(managed.difference(new Set([key])));
      log.info("let go of a subsystem that no file names any more", { subsystem: subsystemNqn });
      return undefined;
    });
  }

  /** Drops discovery connections under our host NQNs that neither a file nor a referral names. */
  function dropSources(sources: Map<string, Source>, controllers: readonly NvmeController[]): void {
    const ours = new Set([...managed].map((pair) => pair.split(" ")[0] ?? ""));
    for (const controller of controllers) {
      if (!controller.isDiscovery || !ours.has(controller.hostNqn) || unresolved.has(controller.hostNqn)) continue;
      const wanted = [...sources.values()].filter(({ hostNqn }) => hostNqn === controller.hostNqn);
      if (wanted.some(({ address }) => isAt(controller, address))) continue;
      // One that has not told yet may refer to this one.
      if (wanted.some(({ hostNqn, address }) => !hasTold(sourceKey(hostNqn, address)))) continue;
      startDrop(controller);
    }
  }

  /**
   * Drops connections to addresses that left the log page, while they do not work and others do, for each of their namespaces:
   * with the last path to a namespace the kernel gives up what was not yet written.
   */
  async function dropStale(
    pairs: Map<string, Pair>,
    sources: Map<string, Source>,
    controllers: readonly NvmeController[],
    listed: ReadonlySet<string>,
  ): Promise<void> {
    const stale = new Set<string>();
    for (const controller of controllers) {
      const { hostNqn, subsystemNqn, name } = controller;
      const pair = `${hostNqn} ${subsystemNqn}`;
      if (controller.isDiscovery || !pairs.has(pair) || controller.state === "live" || !isUsable(controller)) continue;
      const told = [...sources].filter(([, source]) => source.hostNqn === hostNqn && source.pairs.has(subsystemNqn));
      if (told.some(([key]) => !hasTold(key))) continue;
      const at = addressOf(controller);
      const addresses = [...listed].filter((entry) => entry.startsWith(`${pair} `)).map((entry) => entry.split(" ")[2]);
      if (at === undefined || addresses.length === 0) continue;
      if (addresses.some((text) => isListedAt(controller, text))) continue;
      const works = controllers.some((other) => other.subsystemNqn === subsystemNqn && other.state === "live");
      if (!works || await isNeeded(host, controller, controllers.filter((other) => other !== controller))) continue;
      stale.add(name);
      if (!staleSince.has(name)) staleSince.set(name, now());
      if (now() - (staleSince.get(name) ?? 0) < staleMs) continue;
      startDrop(controller);
    }
    for (const name of staleSince.keys()) if (!stale.has(name)) staleSince.delete(name);
  }

  return {
    look,
    async idle() {
      while (running.size > 0) await Promise.all(running.values());
    },
    async run(signal, stopMs) {
      signal.addEventListener("abort", () => {
        stop.abort(new StatusError("CANCELLED", "Cannot go on: lbcsi discovery-client stops"));
      }, { once: true });
      if (signal.aborted) return;
      // Before the first look, or it would miss what comes in between; again when the directory has come meanwhile.
      let watched = false;
      using watches = new DisposableStack();
      while (!signal.aborted) {
        if (!watched && await kindBehind(host, directory) === "directory") {
          watches.use(host.watch(directory, () => wake?.()));
          watched = true;
        }
        let woken = false;
        const waked = new Promise<void>((resolve) =>
          wake = () => {
            woken = true;
            resolve();
          }
        );
        try {
          await look();
          say("look", undefined);
        } catch (error) {
          say("look", messageOf(error), "could not look at this machine, tries again");
        }
        // Something was started or has ended while it looked, mostly: then it looks again soon, but not in a frenzy.
        await Promise.race([waked, sleep(lookMs, signal).catch(() => {})]);
        if (woken) await sleep(20, signal).catch(() => {});
      }
      const late = new AbortController();
      const timer = setTimeout(() => late.abort(), stopMs);
      await Promise.race([
        Promise.all(running.values()),
        new Promise<void>((resolve) => late.signal.addEventListener("abort", () => resolve(), { once: true })),
      ]);
      clearTimeout(timer);
    },
  };
}

function sourceKey(hostNqn: string, address: TransportAddress): string {
  return `${hostNqn} discovery ${formatAddress(address)}`;
}

function where(controller: NvmeController): string {
  const address = addressOf(controller);
  return address === undefined ? controller.address : formatAddress(address);
}

function isListedAt(controller: NvmeController, text: string | undefined): boolean {
  const address = text === undefined ? undefined : parseAddress(text);
  return address !== undefined && isAt(controller, address);
}

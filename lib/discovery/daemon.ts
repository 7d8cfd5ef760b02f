/**
 * A Discovery-Client: keeps this machine connected to the subsystems that the files of a directory name (input.ts), also
 * when the cluster moves. It is LightOS' daemon of that name for a machine that has only lbcsi.
 *
 * The connections are the kernel's, not the process's. The daemon compares what the files ask for, what the discovery
 * controllers list and what sysfs shows (plan.ts), and starts what is missing. So it takes over the connections that it
 * finds when it starts, and leaves them when it ends; I/O is not affected. The one fact that must survive a crash, which
 * subsystems it may disconnect, is in a file of the watched directory (managed.ts).
 *
 * - Each discovery controller that a file or a referral names is kept connected, not one of them: each may list only its own
 *   port (the kernel's target does). nvme-cli makes these connections and reads the log pages, because that takes ioctls.
 *   They are persistent: the kernel reconnects them by itself, and gives up after ctrl_loss_tmo.
 * - A log page is read when its connection is made or works again, and then every few seconds. The kernel announces changes
 *   by uevents (netlink), which the runtime cannot receive.
 * - Every I/O controller that a log page lists for a requested subsystem and host NQN is connected. A failure is repeated
 *   after 1, 2, 4 … 60 seconds, and at once when the page changes.
 * - Connections that the kernel does not heal are healed as with the direct attacher (connection_watch.ts).
 * - A subsystem that no file names any more is disconnected when nothing uses its devices, which is checked immediately
 *   before. Connections that no file ever named are never touched. A connection to an address that left the log page is
 *   dropped only while it does not work and another one does for each of its namespaces.
 *
 * The rule behind the last points: losing a connection that is needed costs data, keeping one too many costs nothing.
 */
import { sleep } from "../timing.ts";
import { backgroundContext, type RequestContext } from "../context.ts";
import { messageOf, StatusError } from "../error.ts";
import { type Host, kindBehind } from "../host/host.ts";
import { ConnectionWatch } from "../host/nvme/connection_watch.ts";
import { allControllers, isUsable, type NvmeController } from "../host/nvme/controllers.ts";
import { devicesOf, hasNamespaces } from "../host/nvme/devices.ts";
import { disconnectController } from "../host/nvme/disconnect.ts";
import { readDiscoveryLog } from "../host/nvme/discovery_log.ts";
import { isNeeded } from "../host/nvme/paths.ts";
import { applyRemedy } from "../host/nvme/remedies.ts";
import { allUsersOf } from "../host/users.ts";
import type { Logger } from "../log.ts";
import { formatAddress } from "../namespace.ts";
import { type ConnectionSettings, Connector } from "./connections.ts";
import type { Entry } from "./entries.ts";
import { DiscoveryInput } from "./input.ts";
import { ManagedSubsystems } from "./managed.ts";
import { NameResolver } from "./names.ts";
import {
  type ConnectionPlan,
  hostIdFor,
  type LogPage,
  pathKey,
  type PathPlan,
  placeOf,
  planConnections,
  type RequestedSubsystem,
  type SourcePlan,
  subsystemsOf,
} from "./plan.ts";
import { StateLog } from "./state_log.ts";
import { ProblemLog, TaskRunner } from "./tasks.ts";

export interface DaemonOptions extends ConnectionSettings {
  readonly host: Host;
  /** The watched directory, or a link to it. It is never created: while it is missing, the last entries count. */
  readonly directory: string;
  readonly log: Logger;
  /** Age in milliseconds at which a log page is read again. */
  readonly pollMs: number;
  /** A clock in milliseconds. Default: `performance.now`. */
  readonly now?: () => number;
}

/** Makes a daemon that has not looked at anything yet. */
export function createDiscoveryDaemon(options: DaemonOptions): DiscoveryDaemon {
  return new DiscoveryDaemon(options);
}

const logPageLimitMs = 15_000;
const lookMs = 1000;
/** After a task has ended the next look comes early, but not at once: several tasks often end together. */
const earlyLookMs = 20;
/** How long a connection must be unlisted and not needed before it is dropped. */
const unlistedMs = 30_000;
const healEveryMs = 5000;

/** What one look has found. */
interface View {
  readonly subsystems: ReadonlyMap<string, RequestedSubsystem>;
  readonly controllers: readonly NvmeController[];
  readonly hostIdOf: (hostNqn: string) => string;
}

/** See the head of this file. */
export class DiscoveryDaemon {
  readonly #options: DaemonOptions;
  readonly #host: Host;
  readonly #log: Logger;
  readonly #now: () => number;
  readonly #stop = new AbortController();
  readonly #problems: ProblemLog;
  readonly #tasks: TaskRunner;
  readonly #input: DiscoveryInput;
  readonly #names: NameResolver;
  readonly #managed: ManagedSubsystems;
  readonly #connector: Connector;
  readonly #states: StateLog;
  readonly #watch: ConnectionWatch;
  /** Log pages by the key of their source. */
  readonly #pages = new Map<string, LogPage>();
  /** Since when connections have been unlisted and not needed, by name. */
  readonly #unlistedSince = new Map<string, number>();
  #stuckSince: ReadonlyMap<string, number> = new Map();
  #entries: readonly Entry[] = [];
  #wake: (() => void) | undefined;
  #nextHealAt = -Infinity;
  /** Namespaces that files asked for at the last healing. */
  #namespaces: ReadonlySet<string> = new Set();

  constructor(options: DaemonOptions) {
    const { host, directory, log, now = () => performance.now() } = options;
    const { signal } = this.#stop;
    this.#options = options;
    this.#host = host;
    this.#log = log;
    this.#now = now;
    const problems = this.#problems = new ProblemLog(log);
    this.#tasks = new TaskRunner({ log, problems, signal, now, onEnd: () => this.#wake?.() });
    this.#input = new DiscoveryInput(host, directory, log, now);
    this.#names = new NameResolver({ host, log, problems, signal, now });
    this.#managed = new ManagedSubsystems(host, directory, problems);
    this.#connector = new Connector(host, options);
    this.#states = new StateLog(log);
    this.#watch = new ConnectionWatch(host);
  }

  /** Reads files and sysfs once, and starts what is due. Does not wait for what it has started. */
  async look(): Promise<void> {
    this.#entries = await this.#input.read() ?? this.#entries;
    await this.#managed.read();
    const subsystems = subsystemsOf(this.#entries);
    // Before anything is connected, so that a crash leaves no connection that no daemon may end.
    await this.#managed.add(subsystems.keys());
    const controllers = (await allControllers(this.#host)).filter(({ transport }) => transport === "tcp");
    this.#states.update(controllers, subsystems);
    if (!await this.#canConnect()) return;
    const addresses = await this.#names.addressesOf([...subsystems.values()].flatMap(({ entries }) => entries));
    const outdated = await this.#connector.outdated(controllers, (key) => subsystems.has(key));
    const plan = planConnections({
      subsystems,
      addresses,
      pages: this.#pages,
      controllers,
      outdated,
      managed: this.#managed.keys,
      stuckSince: this.#stuckSince,
      nowMs: this.#now(),
      pollMs: this.#options.pollMs,
    });
    const hostIdOf = (hostNqn: string) => hostIdFor(hostNqn, controllers, subsystems.values());
    const view = { subsystems, controllers, hostIdOf };
    await this.#carryOut(plan, view);
    await this.#heal(view, plan.listed);
  }

  /** Resolves when no task runs. */
  async idle(): Promise<void> {
    await this.#tasks.waitUntilIdle();
  }

  /** Looks again and again until `signal` aborts; then waits for running tasks, `stopMs` at most. Connections stay. */
  async run(signal: AbortSignal, stopMs: number): Promise<void> {
    signal.addEventListener("abort", () => {
      this.#stop.abort(new StatusError("CANCELLED", "Cannot go on: lbcsi discovery-client stops"));
    }, { once: true });
    if (signal.aborted) return;
    const { directory } = this.#options;
    let isWatched = false;
    using watches = new DisposableStack();
    while (!signal.aborted) {
      // Before the look, which would miss a change in between. Later, when the directory was missing before.
      if (!isWatched && await kindBehind(this.#host, directory) === "directory") {
        watches.use(this.#host.watch(directory, () => this.#wake?.()));
        isWatched = true;
      }
      let isWoken = false;
      const woken = new Promise<void>((resolve) => {
        this.#wake = () => {
          isWoken = true;
          resolve();
        };
      });
      try {
        await this.look();
        this.#problems.clear("look");
      } catch (error) {
        this.#problems.report("look", messageOf(error), "could not look at this machine, tries again");
      }
      await Promise.race([woken, sleep(lookMs, signal).catch(() => {})]);
      if (isWoken) await sleep(earlyLookMs, signal).catch(() => {});
    }
    const late = new AbortController();
    const timer = setTimeout(() => late.abort(), stopMs);
    await Promise.race([
      this.#tasks.waitForRunning(),
      new Promise<void>((resolve) => late.signal.addEventListener("abort", () => resolve(), { once: true })),
    ]);
    clearTimeout(timer);
  }

  async #canConnect(): Promise<boolean> {
    const device = `${this.#host.roots.dev}/nvme-fabrics`;
    if (await this.#host.kindOf(device) !== "absent") {
      this.#problems.clear("fabrics");
      return true;
    }
    const problem = `${device} is missing, the kernel module nvme_tcp is needed`;
    this.#problems.report("fabrics", problem, "cannot connect");
    return false;
  }

  async #carryOut(plan: ConnectionPlan, view: View): Promise<void> {
    this.#stuckSince = plan.stuckSince;
    for (const key of plan.stale) {
      const page = this.#pages.get(key);
      if (page !== undefined) this.#pages.set(key, { ...page, isFresh: false });
    }
    for (const source of plan.sources) this.#keepSource(source, view);
    for (const path of plan.paths) this.#keepPath(path, view);
    const pages = new Map(this.#pages);
    const unneeded = await this.#unneeded(plan.unlisted, view.controllers);
    // A page that has changed meanwhile may list or name again what the plan drops.
    const isCurrent = pages.size === this.#pages.size &&
      [...pages].every(([key, page]) => this.#pages.get(key) === page);
    if (isCurrent) this.#dropUnlisted(unneeded);
    // One may have been released meanwhile.
    for (const key of plan.released) if (this.#managed.keys.has(key)) this.#release(key);
    if (isCurrent) { for (const controller of plan.unnamed) this.#drop(controller); }
    const sources = new Set(plan.sources.map(({ source }) => source.key));
    for (const key of this.#pages.keys()) if (!sources.has(key)) this.#pages.delete(key);
  }

  // -------------------------------------------------------------------------------------------------------- connect

  #keepSource({ source, action, controller, surplus }: SourcePlan, { hostIdOf }: View): void {
    for (const other of surplus) this.#drop(other);
    const { key, hostNqn } = source;
    const address = formatAddress(source.address);
    const failure = "could not connect to a discovery controller";
    const hostId = hostIdOf(hostNqn);
    if (action === "connect") {
      this.#tasks.start(`connect ${key}`, failure, { address }, (ctx) => {
        return this.#connector.connectSource(ctx, source, hostId);
      });
    }
    if (controller === undefined) return;
    const fields = { address, name: controller.name };
    if (action === "replace") {
      this.#tasks.start(`connect ${key}`, failure, fields, (ctx) => {
        return this.#connector.replaceSource(ctx, source, controller, hostId);
      });
    }
    if (action === "read") {
      this.#tasks.start(`read ${key}`, "could not read a log page", fields, (ctx) => {
        return this.#readPage(ctx, source, controller);
      });
    }
  }

  async #readPage(ctx: RequestContext, { key, ...source }: SourcePlan["source"], controller: NvmeController) {
    const limited = backgroundContext("read a log page", ctx.log, logPageLimitMs, ctx.signal);
    const before = this.#pages.get(key);
    const log = await readDiscoveryLog(this.#host, limited, controller);
    this.#pages.set(key, { log, controller: controller.name, readAt: this.#now(), isFresh: true });
    if (before !== undefined && before.log.generation === log.generation) return undefined;
    const offered = log.controllers.filter(({ subsystemNqn }) => source.subsystems.has(subsystemNqn));
    this.#log.info(before === undefined ? "read a log page" : "read a changed log page", {
      address: formatAddress(source.address),
      addresses: offered.map(({ address }) => formatAddress(address)),
      ...(log.referrals.length === 0 ? {} : { referrals: log.referrals.map(formatAddress) }),
    });
    // A connection that was rejected before may be admitted now.
    this.#tasks.endPauses(`connect ${source.hostNqn} `);
    return undefined;
  }

  #keepPath(plan: PathPlan, { hostIdOf }: View): void {
    const { subsystem, address, action } = plan;
    const key = `connect ${pathKey(subsystem, address)}`;
    if (action === "keep") {
      if (!this.#tasks.isRunning(key)) this.#problems.clear(key);
      return;
    }
    const fields = { subsystem: subsystem.subsystemNqn, address: formatAddress(address) };
    const hostId = hostIdOf(subsystem.hostNqn);
    this.#tasks.start(key, "could not connect", fields, (ctx) => this.#connector.connectPath(ctx, plan, hostId));
  }

  /** Heals what the kernel does not heal (connection_watch.ts), at most one connection of each subsystem. */
  async #heal({ subsystems, controllers, hostIdOf }: View, listed: ReadonlySet<string>): Promise<void> {
    if (this.#now() < this.#nextHealAt) return;
    this.#nextHealAt = this.#now() + healEveryMs;
    const namespaces = this.#input.namespaces();
    const requested = new Set([...namespaces.values()].flatMap((uuids) => [...uuids]));
    for (const uuid of this.#namespaces.difference(requested)) this.#watch.release(uuid);
    this.#namespaces = requested;
    const watched = [...subsystems].map(([key, { hostNqn, subsystemNqn }]) => ({
      key,
      subsystemNqn,
      controllers: controllers.filter((controller) =>
        controller.hostNqn === hostNqn && controller.subsystemNqn === subsystemNqn && !controller.isDiscovery
      ),
      needed: namespaces.get(subsystemNqn) ?? new Set<string>(),
      isListed: (controller: NvmeController) => listed.has(`${key} ${placeOf(controller)}`),
    }));
    for (const remedy of await this.#watch.findRemedies(watched, this.#now())) {
      const { controller } = remedy;
      const key = `${controller.hostNqn} ${controller.subsystemNqn}`;
      const subsystem = subsystems.get(key);
      if (subsystem === undefined) continue;
      const fields = { subsystem: controller.subsystemNqn, name: controller.name };
      const hostId = hostIdOf(controller.hostNqn);
      this.#tasks.start(`heal ${key}`, "could not heal a connection", fields, async (ctx) => {
        const connect = (ctx: RequestContext) => this.#connector.connectBesidePath(ctx, subsystem, controller, hostId);
        await applyRemedy(this.#host, ctx, remedy, connect);
        return undefined;
      });
    }
  }

  // ----------------------------------------------------------------------------------------------------- disconnect

  #drop(controller: NvmeController): void {
    const { name, subsystemNqn } = controller;
    const fields = { name, subsystem: subsystemNqn, address: placeOf(controller) };
    this.#tasks.start(`drop ${name}`, "could not disconnect", fields, async (ctx) => {
      await disconnectController(this.#host, ctx, controller);
      return undefined;
    });
  }

  /** The unlisted connections without which each of their namespaces keeps a working path. */
  async #unneeded(
    unlisted: readonly NvmeController[],
    controllers: readonly NvmeController[],
  ): Promise<NvmeController[]> {
    const unneeded: NvmeController[] = [];
    for (const controller of unlisted) {
      const others = controllers.filter((other) => other !== controller);
      if (!await isNeeded(this.#host, controller, others)) unneeded.push(controller);
    }
    return unneeded;
  }

  /** Drops connections that have been unlisted and not needed for a while. */
  #dropUnlisted(controllers: readonly NvmeController[]): void {
    const names = new Set(controllers.map(({ name }) => name));
    for (const name of this.#unlistedSince.keys()) if (!names.has(name)) this.#unlistedSince.delete(name);
    for (const controller of controllers) {
      const since = this.#unlistedSince.get(controller.name) ?? this.#now();
      this.#unlistedSince.set(controller.name, since);
      if (this.#now() - since >= unlistedMs) this.#drop(controller);
    }
  }

  /** Disconnects a subsystem that no file names, if nothing uses it. */
  #release(key: string): void {
    const [hostNqn = "", subsystemNqn = ""] = key.split(" ");
    const isChanging = this.#tasks.running().some((other) =>
      other.startsWith(`connect ${key} `) || other === `heal ${key}`
    );
    if (isChanging) return;
    const fields = { subsystem: subsystemNqn };
    this.#tasks.start(`release ${key}`, "could not disconnect a subsystem that no file names", fields, (ctx) => {
      return this.#disconnectUnused(ctx, key, hostNqn, subsystemNqn);
    });
  }

  async #disconnectUnused(
    ctx: RequestContext,
    key: string,
    hostNqn: string,
    subsystemNqn: string,
  ): Promise<string | undefined> {
    const host = this.#host;
    const obstacle = await useOf(host, subsystemNqn);
    if (obstacle !== undefined) return `${obstacle}, it stays connected`;
    // A volume that is being attached may have asked for it again.
    const subsystems = subsystemsOf(await this.#input.read() ?? this.#entries);
    if (subsystems.has(key)) return undefined;
    const connected = (await allControllers(host)).filter((controller) =>
      controller.subsystemNqn === subsystemNqn && controller.hostNqn === hostNqn && controller.transport === "tcp"
    );
    for (const controller of connected) await disconnectController(host, ctx, controller);
    // Discovery connections are found by the host NQN alone, so they end before the last subsystem of it is forgotten.
    const isLast = [...subsystems.values()].every((subsystem) => subsystem.hostNqn !== hostNqn);
    const isLeft = (await allControllers(host)).some((controller) =>
      controller.hostNqn === hostNqn && isUsable(controller) &&
      (controller.subsystemNqn === subsystemNqn || isLast && controller.isDiscovery && controller.transport === "tcp")
    );
    if (isLeft) return undefined;
    await this.#managed.remove(key);
    this.#log.info("disconnected a subsystem that no file names", { subsystem: subsystemNqn });
    return undefined;
  }
}

/** What uses a subsystem or may use it, for an error; undefined when nothing does. */
async function useOf(host: Host, subsystemNqn: string): Promise<string | undefined> {
  const devices = await devicesOf(host, subsystemNqn);
  for (const device of devices) {
    const users = await allUsersOf(host, device);
    if (users.length > 0) return `${device.path} is in use by ${users.join(", ")}`;
  }
  if (await hasNamespaces(host, subsystemNqn, devices.map(({ name }) => name))) {
    return "it shows a namespace without a UUID, whose users are not known";
  }
  return undefined;
}

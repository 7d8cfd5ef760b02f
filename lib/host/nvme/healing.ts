/**
 * What heals connections that do not heal by themselves. The kernel reconnects what it has lost; it does nothing about
 *
 * - a live controller whose announcement of a namespace was lost (it is rescanned: the kernel asks for the list again),
 * - a live controller that gives no usable path although a namespace needs one, because its ANA log page or its namespaces
 *   are those of another time (it is reset: the kernel connects it again, under the same name),
 * - a controller that stays `connecting` or `resetting` although its address takes connections (another one is made beside
 *   it, and it goes when the other one carries all that it led to).
 *
 * I/O notices none of this. A controller that carries a usable path is never reset, whichever namespace that leads to, nor
 * is one of another host NQN touched; the caller passes its own. Each remedy is repeated after longer and longer pauses, a
 * limited number of times, and one at a time in a subsystem: what a cluster has taken away on purpose, no remedy brings back.
 */
import { type RequestContext, requestContext, sleep, timeLimit } from "../../context.ts";
import { messageOf } from "../../error.ts";
import { formatAddress } from "../../namespace.ts";
import type { Host } from "../host.ts";
import { addressOf, allControllers, controllersOf, isAt, isUsable, type NvmeController } from "./controllers.ts";
import { allDevices, type BlockDevice } from "./devices.ts";
import { disconnectController, isSameController, resetController } from "./disconnect.ts";
import { hasMultipath } from "./multipath.ts";
import { allPaths, isLivePath, isNeeded, type NamespacePath } from "./paths.ts";
import { rescanController } from "./rescan.ts";

/** A subsystem that this machine is to be connected to. */
export interface WatchedSubsystem {
  /** Tells it from others; with the host NQN where one process uses several. */
  readonly key: string;
  readonly subsystemNqn: string;
  /** Our I/O controllers of it, and no others. */
  readonly controllers: readonly NvmeController[];
  /** UUIDs of the namespaces that volumes need, whether they are there or not. */
  readonly wanted: ReadonlySet<string>;
  /** Whether the subsystem still answers at the controller's address, as far as we know. */
  readonly isListed: (controller: NvmeController) => boolean;
}

export interface Remedy {
  readonly kind: "rescan" | "reset" | "reconnect";
  readonly controller: NvmeController;
  /** What is wrong, for the log. */
  readonly reason: string;
  /** Whether it is not tried again as long as the trouble stays the same. */
  readonly isLast: boolean;
}

/** How long something has to be wrong before the first attempt. The pause doubles with each further one. */
const firstAfterMs = { rescan: 20_000, reset: 60_000, reconnect: 120_000 } as const;
const longestPauseMs = 1_800_000;
const mostAttempts = 8;
/** How long all has to be well before a new trouble counts as the first. */
const forgottenAfterMs = 600_000;
const resetLimitMs = 90_000;
const takeOverMs = 5000;

interface Attempts {
  count: number;
  nextAt: number;
  since: number;
  wellSince: number | undefined;
  /** UUIDs or names of what it was about. Another one starts the count again. */
  about: Set<string>;
}

/** Sees what is wrong and when which remedy is due. Does nothing about it, and remembers only times and counts. */
export class ConnectionWatch {
  readonly #host: Host;
  readonly #attempts = new Map<string, Attempts>();
  /** Namespaces that subsystems have shown, and those that each of their addresses has, by key. */
  readonly #seen = new Map<string, { readonly uuids: Set<string>; readonly ways: Set<string> }>();
  /** Namespaces that nobody needs any more and that are still shown. */
  readonly #released = new Set<string>();

  constructor(host: Host) {
    this.#host = host;
  }

  /** From now on nobody needs this namespace, and it may go. */
  release(uuid: string): void {
    this.#released.add(uuid);
    for (const { uuids } of this.#seen.values()) uuids.delete(uuid);
  }

  /**
   * What is due now, one remedy per subsystem at most, and counted as tried. Reads sysfs and nothing else.
   *
   * @param nowMs of a clock that only goes forward
   */
  async look(subsystems: readonly WatchedSubsystem[], nowMs: number): Promise<readonly Remedy[]> {
    const view = await readView(this.#host);
    const touched = new Set<string>();
    const remedies: Remedy[] = [];
    for (const subsystem of subsystems) {
      const due = [
        ...this.#rescans(subsystem, view, nowMs, touched),
        ...this.#resets(subsystem, view, nowMs, touched),
        ...this.#reconnects(subsystem, view, nowMs, touched),
      ].sort((a, b) => a.attempts.count - b.attempts.count);
      const [first] = due;
      if (first === undefined) continue;
      const { attempts, kind, controller, reason } = first;
      attempts.count++;
      attempts.nextAt = nowMs + Math.min(firstAfterMs[kind] * 2 ** attempts.count, longestPauseMs);
      remedies.push({ kind, controller, reason, isLast: attempts.count >= mostAttempts });
    }
    const keys = new Set(subsystems.map(({ key }) => key));
    for (const key of this.#seen.keys()) if (!keys.has(key)) this.#seen.delete(key);
    for (const uuid of this.#released) {
      if (view.devices.every((device) => device.uuid !== uuid)) this.#released.delete(uuid);
    }
    for (const [key, attempts] of this.#attempts) {
      if (touched.has(key)) continue;
      attempts.wellSince ??= nowMs;
      if (nowMs - attempts.wellSince >= forgottenAfterMs) this.#attempts.delete(key);
    }
    return remedies;
  }

  /** Live controllers that lack the path to a namespace which is needed, or was there. */
  #rescans(
    { key, subsystemNqn, controllers, wanted }: WatchedSubsystem,
    view: View,
    now: number,
    touched: Set<string>,
  ) {
    const present = view.devices.filter((device) => device.subsystemNqn === subsystemNqn);
    const seen = this.#seen.get(key) ?? { uuids: new Set<string>(), ways: new Set<string>() };
    this.#seen.set(key, seen);
    for (const uuid of wanted) this.#released.delete(uuid);
    for (const { uuid } of present) if (!this.#released.has(uuid)) seen.uuids.add(uuid);
    const gone = [...wanted.union(seen.uuids)].filter((uuid) => present.every((device) => device.uuid !== uuid));
    return controllers.filter(({ state }) => state === "live").flatMap((controller) => {
      const pathless: string[] = [];
      for (const device of present) {
        const ways = view.paths.filter((path) => path.device === device.name);
        const way = `${device.uuid} ${placeOf(controller)}`;
        if (ways.some((path) => path.controller.name === controller.name)) seen.ways.add(way);
        // A server need not show every namespace, so only those count that it has shown, or that nothing else leads to.
        else if (ways.length > 0 && (seen.ways.has(way) || !ways.some(isLivePath))) pathless.push(device.uuid);
      }
      const missing = [...gone, ...pathless].filter((uuid) => !this.#released.has(uuid));
      if (missing.length === 0) return [];
      const condition = { kind: "rescan", subsystem: key, controller, about: missing } as const;
      return this.#due({ ...condition, reason: () => `it does not show ${named(missing)}` }, now, touched);
    });
  }

  /** Live controllers without a usable path, where a namespace needs one. */
  #resets({ key, subsystemNqn, controllers, wanted }: WatchedSubsystem, view: View, now: number, touched: Set<string>) {
    const present = view.devices.filter((device) => device.subsystemNqn === subsystemNqn);
    const needy = [
      ...present.filter((device) => !this.#released.has(device.uuid) && !hasUsablePath(view, device))
        .map(({ uuid }) => uuid),
      ...[...wanted].filter((uuid) => present.every((device) => device.uuid !== uuid)),
    ];
    if (needy.length === 0) return [];
    const reason = (seconds: number) =>
      `${named(needy)} has had no usable path for ${seconds} s, and this connection is live and gives none`;
    return controllers.filter((controller) => controller.state === "live" && !carries(view, controller)).flatMap(
      (controller) => this.#due({ kind: "reset", subsystem: key, controller, about: needy, reason }, now, touched),
    );
  }

  /** Controllers that do not get live, at an address that is still one of the subsystem and has no other of ours. */
  #reconnects({ key, controllers, isListed }: WatchedSubsystem, view: View, now: number, touched: Set<string>) {
    // Without multipath a second connection is a second device.
    if (!view.multipath) return [];
    return controllers.filter((controller) => {
      const address = addressOf(controller);
      return controller.state !== "live" && isUsable(controller) && isListed(controller) && address !== undefined &&
        !controllers.some((other) => other.state === "live" && isAt(other, address));
    }).flatMap((controller) => {
      const reason = (seconds: number) => `its state has been ${controller.state} for ${seconds} s`;
      const condition = { kind: "reconnect", subsystem: key, controller, about: [controller.name], reason } as const;
      return this.#due(condition, now, touched);
    });
  }

  /** Counts how long something has been wrong, and answers it when its remedy is due. */
  #due({ kind, subsystem, controller, about, reason }: Finding, now: number, touched: Set<string>) {
    // By address: a connection that was made again is the same one to us, unless it is what did not come back.
    const name = kind === "reconnect" ? ` ${controller.name}` : "";
    const key = `${kind} ${subsystem} ${placeOf(controller)}${name}`;
    touched.add(key);
    const attempts = this.#attempts.get(key) ??
      { count: 0, nextAt: now + firstAfterMs[kind], since: now, wellSince: undefined, about: new Set<string>() };
    this.#attempts.set(key, attempts);
    if (attempts.wellSince !== undefined) {
      attempts.nextAt = Math.max(attempts.nextAt, now + firstAfterMs[kind]);
      Object.assign(attempts, { since: now, wellSince: undefined });
    }
    if (about.some((name) => !attempts.about.has(name)) && attempts.about.size > 0) {
      Object.assign(attempts, { count: 0, nextAt: now + firstAfterMs[kind], since: now });
    }
    attempts.about = attempts.about.union(new Set(about));
    if (attempts.count >= mostAttempts || now < attempts.nextAt) return [];
    return [{ kind, controller, attempts, reason: reason(Math.round((now - attempts.since) / 1000)) }];
  }
}

/** Something that is wrong with a controller now. */
interface Finding {
  readonly kind: Remedy["kind"];
  /** Key of its subsystem. */
  readonly subsystem: string;
  readonly controller: NvmeController;
  /** UUIDs or names of what lacks something because of it. */
  readonly about: readonly string[];
  readonly reason: (seconds: number) => string;
}

/** What sysfs shows of namespaces and of the ways to them. */
interface View {
  readonly devices: readonly BlockDevice[];
  readonly controllers: readonly NvmeController[];
  readonly paths: readonly (NamespacePath & { readonly device: string })[];
  readonly multipath: boolean;
}

async function readView(host: Host): Promise<View> {
  const [devices, controllers, multipath] = await Promise.all([
    allDevices(host),
    allControllers(host),
    hasMultipath(host),
  ]);
  return { devices, controllers, paths: await allPaths(host, controllers), multipath };
}

/** Without paths in sysfs a device hangs on its controllers as a whole. */
function hasUsablePath({ paths, controllers }: View, device: BlockDevice): boolean {
  const ways = paths.filter((path) => path.device === device.name);
  if (ways.length > 0) return ways.some(isLivePath);
  return controllers.some(({ state, subsystemNqn }) => state === "live" && subsystemNqn === device.subsystemNqn);
}

/** Whether reads and writes can go over this controller now, to whatever namespace. */
function carries({ paths, devices }: View, controller: NvmeController): boolean {
  const ways = paths.filter((path) => path.controller.name === controller.name);
  if (ways.length > 0) return ways.some(isLivePath);
  // A kernel that shows no paths of a device does not tell which controllers carry it.
  return devices.some((device) =>
    device.subsystemNqn === controller.subsystemNqn && !paths.some((path) => path.device === device.name)
  );
}

/**
 * Applies a remedy, once more after a look at what the controller is and does now; and logs it.
 *
 * @param connectBeside makes another connection to the controller's address; answers why it failed, or undefined
 * @throws only the reason of `ctx.signal`
 */
export async function applyRemedy(
  host: Host,
  ctx: RequestContext,
  remedy: Remedy,
  connectBeside: (ctx: RequestContext) => Promise<string | undefined>,
): Promise<void> {
  const { kind, controller, reason, isLast } = remedy;
  const facts = { subsystem: controller.subsystemNqn, name: controller.name, address: placeOf(controller) };
  const view = await readView(host);
  const now = view.controllers.find(({ name }) => name === controller.name);
  if (now === undefined || !isSameController(now, controller) || now.state !== controller.state) return;
  if (kind === "reset" && carries(view, now)) return;
  // Servers are away for a while now and then; a live connection that gives nothing is another matter.
  ctx.log[kind === "reset" ? "warning" : "info"](events[kind], { ...facts, error: reason });
  let problem: string | undefined;
  try {
    if (kind === "rescan") problem = await rescanController(host, ctx, now);
    else if (kind === "reset") {
      using limit = timeLimit(ctx.signal, resetLimitMs);
      problem = await resetController(host, requestContext(limit.signal, ctx.deadline, ctx.log, ctx.action), now);
    } else {
      problem = await connectBeside(ctx);
      if (problem === undefined) await dropWhenReplaced(host, ctx, now);
    }
  } catch (error) {
    ctx.signal.throwIfAborted();
    problem = messageOf(error);
  }
  if (problem !== undefined) ctx.log.info("could not heal a connection", { ...facts, error: problem });
  if (!isLast) return;
  ctx.log.warning("does no more about this connection unless something else goes wrong with it", {
    ...facts,
    error: `${reason}; see that the cluster shows this host its namespaces, and the kernel log (dmesg)`,
  });
}

const events = {
  rescan: "asks for the namespaces of a connection again",
  reset: "resets a connection that gives no usable path",
  reconnect: "connects beside a connection that does not come back",
} as const;

/**
 * Drops a controller once live ones of the same host carry all that it led to. One that has come back meanwhile stays, and so
 * does one in a state in which the kernel may not release it.
 */
async function dropWhenReplaced(host: Host, ctx: RequestContext, old: NvmeController): Promise<void> {
  const giveUpAt = performance.now() + takeOverMs;
  for (;;) {
    const ours = (await controllersOf(host, old.subsystemNqn)).filter(({ hostNqn }) => hostNqn === old.hostNqn);
    const now = ours.find(({ name }) => name === old.name);
    if (now === undefined || !isSameController(now, old) || now.state !== "connecting") return;
    const address = addressOf(now);
    const others = ours.filter((other) => other.name !== now.name && other.state === "live");
    const isReplaced = address !== undefined && others.some((other) => isAt(other, address));
    if (isReplaced && !await isNeeded(host, now, others)) return await disconnectController(host, ctx, now);
    if (performance.now() >= giveUpAt) return;
    await sleep(50, ctx.signal);
  }
}

function placeOf(controller: NvmeController): string {
  const address = addressOf(controller);
  return address === undefined ? controller.address : formatAddress(address);
}

function named(uuids: readonly string[]): string {
  const some = uuids.slice(0, 3).join(", ");
  return `namespace${uuids.length === 1 ? "" : "s"} ${some}${uuids.length > 3 ? ` and ${uuids.length - 3} more` : ""}`;
}

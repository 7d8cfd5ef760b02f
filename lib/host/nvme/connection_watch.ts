/**
 * Finds connections that do not heal by themselves, and when which remedy is due. The kernel reconnects what it has lost; it
 * does nothing about
 *
 * - a live controller whose announcement of a namespace was lost (remedy: rescan, so that the kernel reads the list again),
 * - a live controller without a usable path although a namespace needs one, because its ANA log page or its namespaces are
 *   out of date (remedy: reset, so that the kernel connects it again under the same name),
 * - a controller that stays `connecting` or `resetting` although its address accepts connections (remedy: reconnect, which
 *   makes another one beside it and drops it when the other one carries all its namespaces).
 *
 * No remedy disturbs I/O. A controller that carries a usable path is never reset, whatever namespace the path leads to; nor
 * is a controller of another host NQN touched, because callers pass their own only. Each remedy is repeated after longer and
 * longer pauses, a limited number of times, and one at a time in a subsystem: no remedy brings back what a cluster has taken
 * away on purpose.
 */
import type { Host } from "../host.ts";
import { addressText, carries, type ConnectionView, hasUsablePath, readConnectionView } from "./connection_view.ts";
import { addressOf, isAt, isUsable, type NvmeController } from "./controllers.ts";
import { isLivePath } from "./paths.ts";
import type { Remedy } from "./remedies.ts";

/** A subsystem that this machine is to be connected to. */
export interface WatchedSubsystem {
  /** Unique; contains the host NQN where one process uses several. */
  readonly key: string;
  readonly subsystemNqn: string;
  /** Our I/O controllers of it, and no others. */
  readonly controllers: readonly NvmeController[];
  /** UUIDs of the namespaces that volumes need, whether they are there or not. */
  readonly needed: ReadonlySet<string>;
  /** Whether the subsystem still answers at the controller's address, as far as we know. */
  readonly isListed: (controller: NvmeController) => boolean;
}

/** How long something has to be wrong before the first attempt. The pause doubles with each further attempt. */
const firstAfterMs = { rescan: 20_000, reset: 60_000, reconnect: 120_000 } as const;
const longestPauseMs = 1_800_000;
const mostAttempts = 8;
/** How long all has to be well before attempts are counted from zero again. */
const forgottenAfterMs = 600_000;

interface Attempts {
  count: number;
  nextAt: number;
  since: number;
  wellSince: number | undefined;
  /** UUIDs or names of what lacked something. Another one starts the count again. */
  about: Set<string>;
}

/** Finds what is wrong and when which remedy is due. It applies none, and remembers only times and counts. */
export class ConnectionWatch {
  readonly #host: Host;
  readonly #attempts = new Map<string, Attempts>();
  /** Namespaces that subsystems have shown, and which of their addresses has shown which, by key. */
  readonly #seen = new Map<string, { readonly uuids: Set<string>; readonly ways: Set<string> }>();
  /** Namespaces that are not needed any more and are still shown. */
  readonly #released = new Set<string>();

  constructor(host: Host) {
    this.#host = host;
  }

  /** From now on this namespace is not needed, and may disappear. */
  release(uuid: string): void {
    this.#released.add(uuid);
    for (const { uuids } of this.#seen.values()) uuids.delete(uuid);
  }

  /**
   * The remedies that are due now, one per subsystem at most; they count as tried. Reads sysfs and nothing else.
   *
   * @param nowMs time of a clock that never goes back
   */
  async findRemedies(subsystems: readonly WatchedSubsystem[], nowMs: number): Promise<readonly Remedy[]> {
    const view = await readConnectionView(this.#host);
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

  /** Live controllers that lack the path to a namespace which is needed, or was shown before. */
  #rescans(
    { key, subsystemNqn, controllers, needed }: WatchedSubsystem,
    view: ConnectionView,
    now: number,
    touched: Set<string>,
  ) {
    const present = view.devices.filter((device) => device.subsystemNqn === subsystemNqn);
    const seen = this.#seen.get(key) ?? { uuids: new Set<string>(), ways: new Set<string>() };
    this.#seen.set(key, seen);
    for (const uuid of needed) this.#released.delete(uuid);
    for (const { uuid } of present) if (!this.#released.has(uuid)) seen.uuids.add(uuid);
    const gone = [...needed.union(seen.uuids)].filter((uuid) => present.every((device) => device.uuid !== uuid));
    return controllers.filter(({ state }) => state === "live").flatMap((controller) => {
      const pathless: string[] = [];
      for (const device of present) {
        const ways = view.paths.filter((path) => path.device === device.name);
        const way = `${device.uuid} ${addressText(controller)}`;
        if (ways.some((path) => path.controller.name === controller.name)) seen.ways.add(way);
        // A server need not show every namespace: only those count that it has shown, or that have no other live path.
        else if (ways.length > 0 && (seen.ways.has(way) || !ways.some(isLivePath))) pathless.push(device.uuid);
      }
      const missing = [...gone, ...pathless].filter((uuid) => !this.#released.has(uuid));
      if (missing.length === 0) return [];
      const condition = { kind: "rescan", subsystem: key, controller, about: missing } as const;
      return this.#due({ ...condition, reason: () => `it does not show ${listNamespaces(missing)}` }, now, touched);
    });
  }

  /** Live controllers without a usable path, where a namespace needs one. */
  #resets(
    { key, subsystemNqn, controllers, needed }: WatchedSubsystem,
    view: ConnectionView,
    now: number,
    touched: Set<string>,
  ) {
    const present = view.devices.filter((device) => device.subsystemNqn === subsystemNqn);
    const deprived = [
      ...present.filter((device) => !this.#released.has(device.uuid) && !hasUsablePath(view, device))
        .map(({ uuid }) => uuid),
      ...[...needed].filter((uuid) => present.every((device) => device.uuid !== uuid)),
    ];
    if (deprived.length === 0) return [];
    const reason = (seconds: number) =>
      `${listNamespaces(deprived)} has had no usable path for ${seconds} s, and this connection is live and gives none`;
    return controllers.filter((controller) => controller.state === "live" && !carries(view, controller)).flatMap(
      (controller) => this.#due({ kind: "reset", subsystem: key, controller, about: deprived, reason }, now, touched),
    );
  }

  /** Controllers that do not become live, at an address that still is one of the subsystem and has no other of ours. */
  #reconnects(
    { key, controllers, isListed }: WatchedSubsystem,
    view: ConnectionView,
    now: number,
    touched: Set<string>,
  ) {
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

  /** Notes how long something has been wrong, and returns it when its remedy is due. */
  #due({ kind, subsystem, controller, about, reason }: ConnectionFinding, now: number, touched: Set<string>) {
    // By address: a connection that was made again counts as the same one. By name too where its loss is the problem.
    const name = kind === "reconnect" ? ` ${controller.name}` : "";
    const key = `${kind} ${subsystem} ${addressText(controller)}${name}`;
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
interface ConnectionFinding {
  readonly kind: Remedy["kind"];
  /** Key of its subsystem. */
  readonly subsystem: string;
  readonly controller: NvmeController;
  /** UUIDs or names of what lacks something because of it. */
  readonly about: readonly string[];
  readonly reason: (seconds: number) => string;
}

function listNamespaces(uuids: readonly string[]): string {
  const some = uuids.slice(0, 3).join(", ");
  return `namespace${uuids.length === 1 ? "" : "s"} ${some}${uuids.length > 3 ? ` and ${uuids.length - 3} more` : ""}`;
}

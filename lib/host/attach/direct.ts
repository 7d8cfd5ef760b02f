/** Attaches namespaces by connections that the driver makes itself, with nvme-cli or through the kernel's own interface. */
import type { DhchapKeys } from "../../auth_key.ts";
import type { RequestContext } from "../../context.ts";
import { messageOf } from "../../error.ts";
import type { KeyedLock } from "../../lock.ts";
import { formatAddress, type RemoteNamespace, type TransportAddress } from "../../namespace.ts";
import type { Host } from "../host.ts";
import {
  authenticationObstacle,
  connectAuthenticated,
  type ConnectProblem,
  dropOutdated,
  hasKeys,
  keysInUse,
} from "../nvme/authentication.ts";
import { connectController } from "../nvme/connect.ts";
import type { ConnectionTuning, ConnectOptions } from "../nvme/connect_options.ts";
import { ConnectionWatch } from "../nvme/connection_watch.ts";
import { addressOf, allControllers, controllersOf, isAt, isUsable, type NvmeController } from "../nvme/controllers.ts";
import { type BlockDevice, devicesOf, findDevice, hasNamespaces } from "../nvme/devices.ts";
import { disconnectController } from "../nvme/disconnect.ts";
import { connectByKernel, describeConnectFailure } from "../nvme/fabrics.ts";
import { hasMultipath } from "../nvme/multipath.ts";
import { applyRemedy } from "../nvme/remedies.ts";
import { usersOf } from "../users.ts";
import type { Attacher } from "./attacher.ts";

/** Time between two calls of `reconcile`, in milliseconds. */
export const reconcileEveryMs = 10_000;

/** What the direct attacher works with. */
export interface DirectOptions {
  readonly host: Host;
  readonly hostNqn: string;
  readonly hostId: string;
  /** Holds `subsystem <nqn>` while connections of that subsystem are made or dropped. */
  readonly locks: KeyedLock;
  /** Absent: the kernel's defaults. */
  readonly tuning?: ConnectionTuning;
}

/**
 * Attaches to the I/O controllers in the publish context: with nvme-cli, or with keys through the kernel's own interface.
 *
 * One connection is enough, because multipath brings back the others; those that fail are logged. Detach disconnects a
 * subsystem when this machine sees no other namespace of it and no call waits for one: unrelated LightOS volumes share a
 * subsystem. It drops our own connections only, by controller and not by NQN: another program may be connected under
 * another host NQN.
 */
export function createDirectAttacher(options: DirectOptions): Attacher {
  return new DirectAttacher(options);
}

/** What the missing connections of a subsystem are made with. */
interface MissingConnections {
  readonly addresses: readonly TransportAddress[];
  readonly keys: DhchapKeys | undefined;
  /** Whether an address whose connection has other keys counts as missing. */
  readonly replacesOtherKeys: boolean;
}

class DirectAttacher implements Attacher {
  readonly hint = "see that this host is on the volume's access list, and the kernel log (dmesg) of this node";
  readonly takesKeys = true;

  readonly #host: Host;
  readonly #hostNqn: string;
  readonly #hostId: string;
  readonly #locks: KeyedLock;
  readonly #tuning: ConnectionTuning;
  readonly #watch: ConnectionWatch;
  /** Where the subsystems of attached namespaces answer, by NQN. Losing it is harmless: reconcile learns it from sysfs. */
  readonly #addresses = new Map<string, readonly TransportAddress[]>();
  /**
   * The keys that worked last, by NQN, for connections that are made again. In memory only; after a restart the driver
   * finds them in sysfs with the connections that are left.
   */
  readonly #keys = new Map<string, DhchapKeys>();
  /** Namespaces whose device was not there yet when attach returned, by NQN: a call may wait for them. */
  readonly #expected = new Map<string, Set<string>>();
  /** Namespaces that were attached and not detached, by NQN. */
  readonly #attached = new Map<string, Set<string>>();
  /** Calls of reconcile so far. It is a clock that the machine's time does not change: the calls come at a fixed interval. */
  #rounds = 0;
  /** Subsystems that showed nothing at the last call of reconcile. One is not enough: `lbcsi attach` may be running. */
  #idle = new Set<string>();

  constructor({ host, hostNqn, hostId, locks, tuning = {} }: DirectOptions) {
    this.#host = host;
    this.#hostNqn = hostNqn;
    this.#hostId = hostId;
    this.#locks = locks;
    this.#tuning = tuning;
    this.#watch = new ConnectionWatch(host);
  }

  async attach(outer: RequestContext, namespace: RemoteNamespace, given?: DhchapKeys): Promise<void> {
    const ctx = outer.doing(`attach namespace ${namespace.uuid}`);
    const nqn = namespace.subsystemNqn;
    const kind = given?.controller === undefined ? "unidirectional" : "bidirectional";
    const obstacle = given === undefined ? undefined : await authenticationObstacle(this.#host, kind);
    if (obstacle !== undefined) throw ctx.error("FAILED_PRECONDITION", obstacle);
    if (namespace.addresses.length === 0) {
      throw ctx.error("FAILED_PRECONDITION", `the publish context names no I/O controller of ${nqn}`);
    }
    using _held = await this.#locks.wait(`subsystem ${nqn}`, "attach", ctx.signal);
    const keys = this.#keysFor(nqn, given);
    const missing = { addresses: namespace.addresses, keys, replacesOtherKeys: given !== undefined };
    const outcomes = await this.#connectMissing(ctx, nqn, missing);
    const problems = outcomes.filter((problem) => problem !== undefined);
    if (problems.length === outcomes.length) {
      throw ctx.error(
        problems.some(({ isAboutKeys }) => isAboutKeys) ? "FAILED_PRECONDITION" : "UNAVAILABLE",
        `no I/O controller of ${nqn} took the connection (${problems.map(({ problem }) => problem).join("; ")})`,
      );
    }
    for (const { problem } of problems) ctx.log.warning("could not connect", { subsystem: nqn, error: problem });
    this.#addresses.set(nqn, namespace.addresses);
    add(this.#attached, nqn, namespace.uuid);
    if (given !== undefined && keys !== undefined) {
      this.#keys.set(nqn, keys);
      await dropOutdated(this.#host, ctx, { subsystemNqn: nqn, hostNqn: this.#hostNqn, keys });
    }
    if (await findDevice(this.#host, namespace.uuid, nqn) === undefined) add(this.#expected, nqn, namespace.uuid);
  }

  async detach(outer: RequestContext, uuid: string, subsystemNqn?: string): Promise<void> {
    const ctx = outer.doing(`detach namespace ${uuid}`);
    for (const uuids of [...this.#expected.values(), ...this.#attached.values()]) uuids.delete(uuid);
    this.#watch.release(uuid);
    const device = await findDevice(this.#host, uuid, subsystemNqn);
    const nqn = device?.subsystemNqn ?? subsystemNqn;
    if (nqn === undefined) {
      // Without its device, nothing here shows which subsystem it belonged to.
      const connected = (await this.#ownControllers()).map((controller) => controller.subsystemNqn);
      return await this.#disconnectIdle(ctx, new Set(connected));
    }
    using _held = await this.#locks.wait(`subsystem ${nqn}`, "detach", ctx.signal);
    // Read again under the lock: a name or another namespace may have appeared meanwhile.
    const devices = await devicesOf(this.#host, nqn);
    for (const { uuid } of devices) this.#expected.get(nqn)?.delete(uuid);
    if (subsystemNqn === undefined && !devices.some((other) => other.uuid === uuid)) return;
    const ours = devices.filter((other) => other.uuid === uuid).map(({ name }) => name);
    if (this.#isExpecting(nqn) || await hasNamespaces(this.#host, nqn, ours)) {
      ctx.log.debug("left a subsystem connected that has other namespaces here", { subsystem: nqn });
      return;
    }
    await this.#assertUnused(ctx, devices);
    await this.#disconnect(ctx, nqn);
  }

  async reconcile(ctx: RequestContext): Promise<void> {
    this.#rounds++;
    const ours = await this.#ownControllers();
    const connected = new Set(ours.map((controller) => controller.subsystemNqn));
    await this.#disconnectIdle(ctx, [...connected].filter((nqn) => this.#idle.has(nqn)));
    this.#idle = new Set();
    for (const nqn of connected) if (await this.#isIdle(nqn)) this.#idle.add(nqn);
    await this.#learnFrom(ours);
    for (const nqn of [...this.#addresses.keys()]) await this.#reconnect(ctx, nqn, ours);
    await this.#heal(ctx, ours);
  }

  /** Connects what is missing; one outcome for each address, undefined: connected. */
  async #connectMissing(
    ctx: RequestContext,
    subsystemNqn: string,
    { addresses, keys, replacesOtherKeys }: MissingConnections,
  ): Promise<readonly (ConnectProblem | undefined)[]> {
    // Another host NQN may be connected to the same address: the kernel tells them apart, and each has its own access.
    const connected = (await controllersOf(this.#host, subsystemNqn)).filter((controller) =>
      controller.hostNqn === this.#hostNqn && isUsable(controller)
    );
    return await Promise.all(addresses.map(async (address) => {
      const ours = connected.filter((controller) => isAt(controller, address));
      const outcome = keys === undefined
        ? await this.#connectWithoutKeys(ctx, subsystemNqn, address, ours)
        : await this.#connectWithKeys(ctx, { subsystemNqn, address, keys, replacesOtherKeys }, ours);
      return outcome === undefined
        ? undefined
        : { ...outcome, problem: `${formatAddress(address)}: ${outcome.problem}` };
    }));
  }

  async #connectWithoutKeys(
    ctx: RequestContext,
    subsystemNqn: string,
    address: TransportAddress,
    ours: readonly NvmeController[],
  ): Promise<ConnectProblem | undefined> {
    if (ours.length > 0) return undefined;
    const problem = await connectController(this.#host, ctx, this.#connectOptions(subsystemNqn, address));
    return problem === undefined ? undefined : { problem, isAboutKeys: false };
  }

  async #connectWithKeys(
    ctx: RequestContext,
    { subsystemNqn, address, keys, replacesOtherKeys }: {
      readonly subsystemNqn: string;
      readonly address: TransportAddress;
      readonly keys: DhchapKeys;
      readonly replacesOtherKeys: boolean;
    },
    ours: readonly NvmeController[],
  ): Promise<ConnectProblem | undefined> {
    const [first] = ours;
    if (first !== undefined) {
      if (!replacesOtherKeys) return undefined;
      for (const controller of ours) if (await hasKeys(this.#host, controller, keys)) return undefined;
      if (!await hasMultipath(this.#host)) {
        return {
          problem:
            `${first.name} is connected there with other keys, and without native NVMe multipath in the kernel it ` +
            `cannot be replaced, disconnect it first`,
          isAboutKeys: false,
        };
      }
    }
    const options = { ...this.#connectOptions(subsystemNqn, address), keys, beside: first !== undefined };
    return await connectAuthenticated(this.#host, ctx, options);
  }

  #connectOptions(subsystemNqn: string, address: TransportAddress): ConnectOptions {
    return { address, subsystemNqn, hostNqn: this.#hostNqn, hostId: this.#hostId, ...this.#tuning };
  }

  /** The keys to connect a subsystem with, when `given` are those of one of its namespaces. */
  #keysFor(subsystemNqn: string, given: DhchapKeys | undefined): DhchapKeys | undefined {
    const before = this.#keys.get(subsystemNqn);
    if (given === undefined) return before;
    // A namespace that needs no controller key must not take it from another namespace of the subsystem.
    return { ...given, controller: given.controller ?? before?.controller };
  }

  async #assertUnused(ctx: RequestContext, devices: readonly BlockDevice[]): Promise<void> {
    for (const device of devices) {
      const users = await usersOf(this.#host, device);
      if (users.length > 0) throw ctx.error("FAILED_PRECONDITION", `${device.path} is in use by ${users.join(", ")}`);
    }
  }

  async #disconnect(ctx: RequestContext, subsystemNqn: string): Promise<void> {
    this.#addresses.delete(subsystemNqn);
    this.#attached.delete(subsystemNqn);
    this.#keys.delete(subsystemNqn);
    for (const controller of await controllersOf(this.#host, subsystemNqn)) {
      if (controller.hostNqn === this.#hostNqn) await disconnectController(this.#host, ctx, controller);
    }
  }

  /** Drops our connections to idle subsystems: a volume leaves them when its access is taken away first. */
  async #disconnectIdle(ctx: RequestContext, nqns: Iterable<string>): Promise<void> {
    for (const nqn of nqns) {
      if (!await this.#isIdle(nqn)) continue;
      using _held = await this.#locks.wait(`subsystem ${nqn}`, "detach", ctx.signal);
      if (await this.#isIdle(nqn)) await this.#disconnect(ctx, nqn);
    }
  }

  /** Whether a subsystem shows this machine no namespace at all, and no call waits for one. */
  async #isIdle(nqn: string): Promise<boolean> {
    return !this.#isExpecting(nqn) && !await hasNamespaces(this.#host, nqn);
  }

  #isExpecting(nqn: string): boolean {
    return (this.#expected.get(nqn)?.size ?? 0) > 0;
  }

  async #ownControllers(): Promise<readonly NvmeController[]> {
    return (await allControllers(this.#host)).filter((controller) =>
      controller.hostNqn === this.#hostNqn && controller.transport === "tcp" && !controller.isDiscovery
    );
  }

  /** Remembers keys and addresses of connections that an earlier process made. */
  async #learnFrom(ours: readonly NvmeController[]): Promise<void> {
    for (const controller of ours) {
      const { subsystemNqn } = controller;
      if (!this.#keys.has(subsystemNqn)) {
        const used = await keysInUse(this.#host, controller);
        if (used.host !== undefined) this.#keys.set(subsystemNqn, { host: used.host, controller: used.controller });
      }
      if (this.#addresses.has(subsystemNqn)) continue;
      const seen = ours.filter((other) => other.subsystemNqn === subsystemNqn).map(addressOf);
      this.#addresses.set(subsystemNqn, seen.filter((address) => address !== undefined));
    }
  }

  /** Makes the connections of a subsystem again that the kernel has given up. */
  async #reconnect(ctx: RequestContext, nqn: string, ours: readonly NvmeController[]): Promise<void> {
    const addresses = this.#addresses.get(nqn) ?? [];
    const connected = ours.filter((controller) => controller.subsystemNqn === nqn);
    // A controller that is dead, or that the kernel keeps deleting, does not come back.
    const missing = addresses.filter((address) =>
      !connected.some((controller) => isAt(controller, address) && isUsable(controller))
    );
    if (missing.length === 0) return;
    using _held = await this.#locks.wait(`subsystem ${nqn}`, "reconcile", ctx.signal);
    // Attached or detached meanwhile.
    if (this.#addresses.get(nqn) !== addresses) return;
    if (!await hasNamespaces(this.#host, nqn)) {
      // The kernel gave up the last path: only the next attach connects again.
      if (await this.#isIdle(nqn) && connected.length === 0) {
        this.#addresses.delete(nqn);
        this.#keys.delete(nqn);
      }
      return;
    }
    const keys = this.#keys.get(nqn);
    for (
      const outcome of await this.#connectMissing(ctx, nqn, { addresses: missing, keys, replacesOtherKeys: false })
    ) {
      if (outcome !== undefined) ctx.log.debug("could not connect again", { subsystem: nqn, error: outcome.problem });
    }
  }

  /** Heals what does not heal by itself, at most one connection of each subsystem. */
  async #heal(ctx: RequestContext, ours: readonly NvmeController[]): Promise<void> {
    const subsystems = [...this.#addresses].map(([nqn, known]) => ({
      key: nqn,
      subsystemNqn: nqn,
      controllers: ours.filter((controller) => controller.subsystemNqn === nqn),
      needed: (this.#attached.get(nqn) ?? new Set<string>()).union(this.#expected.get(nqn) ?? new Set<string>()),
      isListed: (controller: NvmeController) => known.some((address) => isAt(controller, address)),
    }));
    const remedies = await this.#watch.findRemedies(subsystems, this.#rounds * reconcileEveryMs);
    await Promise.all(
      remedies.map((remedy) =>
        applyRemedy(this.#host, ctx, remedy, (ctx) => this.#connectBeside(ctx, remedy.controller))
      ),
    );
  }

  /** Makes another connection to the address of `controller`; returns why it failed, or undefined. */
  async #connectBeside(ctx: RequestContext, controller: NvmeController): Promise<string | undefined> {
    const { subsystemNqn } = controller;
    using _held = await this.#locks.wait(`subsystem ${subsystemNqn}`, "reconcile", ctx.signal);
    const address = this.#addresses.get(subsystemNqn)?.find((address) => isAt(controller, address));
    // Detached meanwhile.
    if (address === undefined) return undefined;
    const options = this.#connectOptions(subsystemNqn, address);
    const keys = this.#keys.get(subsystemNqn);
    if (keys !== undefined) {
      return (await connectAuthenticated(this.#host, ctx, { ...options, keys, beside: true }))?.problem;
    }
    try {
      await connectByKernel(this.#host, options, { duplicate: true });
      return undefined;
    } catch (error) {
      return describeConnectFailure(messageOf(error), this.#hostNqn);
    }
  }
}

function add(sets: Map<string, Set<string>>, key: string, value: string): void {
  sets.set(key, (sets.get(key) ?? new Set()).add(value));
}

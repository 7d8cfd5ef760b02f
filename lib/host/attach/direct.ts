/** Connections by the driver itself, with nvme-cli or the kernel's own interface. */
import type { DhchapKeys } from "../../auth_key.ts";
import type { RequestContext } from "../../context.ts";
import { messageOf, StatusError } from "../../error.ts";
import type { KeyedLock } from "../../lock.ts";
import { formatAddress, type TransportAddress } from "../../namespace.ts";
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
import type { ConnectionTuning } from "../nvme/connect_options.ts";
import { addressOf, allControllers, controllersOf, isAt, isUsable, type NvmeController } from "../nvme/controllers.ts";
import { devicesOf, findDevice, hasNamespaces } from "../nvme/devices.ts";
import { disconnectController } from "../nvme/disconnect.ts";
import { connectByKernel, describeConnectFailure } from "../nvme/fabrics.ts";
import { applyRemedy, ConnectionWatch } from "../nvme/healing.ts";
import { hasMultipath } from "../nvme/multipath.ts";
import { usersOf } from "../users.ts";
import type { Attacher } from "./attacher.ts";

/** How far the looks of `tend` are apart. */
export const lookMs = 10_000;

export interface DirectOptions {
  readonly host: Host;
  readonly hostNqn: string;
  readonly hostId: string;
  /** Holds `subsystem <nqn>` while connections of that subsystem are made or dropped. */
  readonly locks: KeyedLock;
  /** Left out: the kernel's defaults. */
  readonly tuning?: ConnectionTuning;
}

/**
 * Attaches to the I/O controllers in the publish context: with nvme-cli, or with keys through the kernel's own interface.
 *
 * One connection is enough, for the others come back by multipath: those that fail are logged. On detach, a subsystem is
 * disconnected when this machine sees no other namespace of it and nobody waits for one; unrelated LightOS volumes share
 * one. Only our own connections are dropped, by controller and not by NQN: another program may be connected under another
 * host NQN.
 */
export function createDirectAttacher({ host, hostNqn, hostId, locks, tuning = {} }: DirectOptions): Attacher {
  /** Where the subsystems of attached namespaces answer, by NQN. Losing it is harmless, see `tend`. */
  const addresses = new Map<string, readonly TransportAddress[]>();
  /**
   * The keys that worked last, by NQN, for connections that are made again. In memory only; a process that is started anew
   * finds them in sysfs with the connections that are left.
   */
  const known = new Map<string, DhchapKeys>();
  /** Namespaces whose device was not there yet when attach returned, by subsystem: who waits needs the connection. */
  const expected = new Map<string, Set<string>>();
  /** Namespaces that were attached and not detached, by subsystem. */
  const attached = new Map<string, Set<string>>();
  const watch = new ConnectionWatch(host);
  /** Looks of `tend` so far: its clock, for it is called every few seconds whatever the machine's time does. */
  let looks = 0;
  /** Subsystems that showed nothing at the last look of `tend`. One look is not enough: `lbcsi attach` may be at work. */
  let idle = new Set<string>();

  /** Connects what is missing; with `isStrict`, also what has other keys. */
  async function connectMissing(
    ctx: RequestContext,
    subsystemNqn: string,
    wanted: readonly TransportAddress[],
    keys: DhchapKeys | undefined,
    isStrict: boolean,
  ): Promise<readonly (ConnectProblem | undefined)[]> {
    // Another host NQN may be connected to the same address: the kernel tells them apart, and each has its own access.
    const connected = (await controllersOf(host, subsystemNqn)).filter((controller) =>
      controller.hostNqn === hostNqn && isUsable(controller)
    );
    return await Promise.all(wanted.map(async (address) => {
      const other = (problem: string) => ({ problem: `${formatAddress(address)}: ${problem}`, isAboutKeys: false });
      const ours = connected.filter((controller) => isAt(controller, address));
      const wish = { address, subsystemNqn, hostNqn, hostId, ...tuning };
      if (keys === undefined) {
        if (ours.length > 0) return undefined;
        const problem = await connectController(host, ctx, wish);
        return problem === undefined ? undefined : other(problem);
      }
      const beside = ours.length > 0;
      if (beside) {
        if (!isStrict) return undefined;
        for (const controller of ours) if (await hasKeys(host, controller, keys)) return undefined;
        if (!await hasMultipath(host)) {
          return other(
            `${ours[0]?.name} is connected there with other keys, and without native NVMe multipath in the kernel it ` +
              `cannot be replaced, disconnect it first`,
          );
        }
      }
      const problem = await connectAuthenticated(host, ctx, { ...wish, keys, beside });
      return problem === undefined
        ? undefined
        : { ...problem, problem: `${formatAddress(address)}: ${problem.problem}` };
    }));
  }

  /** Heals what does not heal by itself, at most one connection of each subsystem. */
  async function heal(ctx: RequestContext, ours: readonly NvmeController[]): Promise<void> {
    const subsystems = [...addresses].map(([nqn, known]) => ({
      key: nqn,
      subsystemNqn: nqn,
      controllers: ours.filter((controller) => controller.subsystemNqn === nqn),
      wanted: (attached.get(nqn) ?? new Set<string>()).union(expected.get(nqn) ?? new Set<string>()),
      isListed: (controller: NvmeController) => known.some((address) => isAt(controller, address)),
    }));
    const remedies = await watch.look(subsystems, looks * lookMs);
    await Promise.all(
      remedies.map((remedy) => applyRemedy(host, ctx, remedy, (ctx) => connectBeside(ctx, remedy.controller))),
    );
  }

  async function connectBeside(ctx: RequestContext, controller: NvmeController): Promise<string | undefined> {
    const { subsystemNqn } = controller;
    using _held = await locks.wait(`subsystem ${subsystemNqn}`, "tend", ctx.signal);
    const address = addresses.get(subsystemNqn)?.find((address) => isAt(controller, address));
    // Detached meanwhile.
    if (address === undefined) return undefined;
    const wish = { address, subsystemNqn, hostNqn, hostId, ...tuning };
    const keys = known.get(subsystemNqn);
    if (keys !== undefined) return (await connectAuthenticated(host, ctx, { ...wish, keys, beside: true }))?.problem;
    try {
      await connectByKernel(host, wish, { duplicate: true });
      return undefined;
    } catch (error) {
      return describeConnectFailure(messageOf(error), hostNqn);
    }
  }

  /** The keys to connect a subsystem with, when `given` are those of one of its namespaces. */
  function keysFor(subsystemNqn: string, given: DhchapKeys | undefined): DhchapKeys | undefined {
    const before = known.get(subsystemNqn);
    if (given === undefined) return before;
    // A namespace that asks for less than its neighbour does not take the controller's proof away.
    return { ...given, controller: given.controller ?? before?.controller };
  }

  async function disconnect(ctx: RequestContext, subsystemNqn: string): Promise<void> {
    addresses.delete(subsystemNqn);
    attached.delete(subsystemNqn);
    known.delete(subsystemNqn);
    for (const controller of await controllersOf(host, subsystemNqn)) {
      if (controller.hostNqn === hostNqn) await disconnectController(host, ctx, controller);
    }
  }

  const ownControllers = async () =>
    (await allControllers(host)).filter((controller) =>
      controller.hostNqn === hostNqn && controller.transport === "tcp" && !controller.isDiscovery
    );

  /** Whether a subsystem shows this machine no namespace at all, not even one that somebody waits for. */
  const isIdle = async (nqn: string) => (expected.get(nqn)?.size ?? 0) === 0 && !await hasNamespaces(host, nqn);

  /** Drops our connections to idle subsystems: what a volume leaves whose access was taken away first. */
  async function disconnectIdle(ctx: RequestContext, nqns: Iterable<string>): Promise<void> {
    for (const nqn of nqns) {
      if (!await isIdle(nqn)) continue;
      using _held = await locks.wait(`subsystem ${nqn}`, "detach", ctx.signal);
      if (await isIdle(nqn)) await disconnect(ctx, nqn);
    }
  }

  return {
    hint: "see that this host is on the volume's access list, and the kernel log (dmesg) of this node",
    takesKeys: true,

    async attach(ctx, namespace, given) {
      const nqn = namespace.subsystemNqn;
      const kind = given?.controller === undefined ? "unidirectional" : "bidirectional";
      const obstacle = given === undefined ? undefined : await authenticationObstacle(host, kind);
      if (obstacle !== undefined) {
        throw new StatusError("FAILED_PRECONDITION", `Cannot attach namespace ${namespace.uuid}: ${obstacle}`);
      }
      if (namespace.addresses.length === 0) {
        throw new StatusError(
          "FAILED_PRECONDITION",
          `Cannot attach namespace ${namespace.uuid}: the publish context names no I/O controller of ${nqn}`,
        );
      }
      using _held = await locks.wait(`subsystem ${nqn}`, "attach", ctx.signal);
      const keys = keysFor(nqn, given);
      const outcomes = await connectMissing(ctx, nqn, namespace.addresses, keys, given !== undefined);
      const problems = outcomes.filter((problem) => problem !== undefined);
      if (problems.length === outcomes.length) {
        throw new StatusError(
          problems.some(({ isAboutKeys }) => isAboutKeys) ? "FAILED_PRECONDITION" : "UNAVAILABLE",
          `Cannot attach namespace ${namespace.uuid}: no I/O controller of ${nqn} took the connection (${
            problems.map(({ problem }) => problem).join("; ")
          })`,
        );
      }
      for (const { problem } of problems) ctx.log.warning("could not connect", { subsystem: nqn, error: problem });
      addresses.set(nqn, namespace.addresses);
      attached.set(nqn, (attached.get(nqn) ?? new Set()).add(namespace.uuid));
      if (given !== undefined && keys !== undefined) {
        known.set(nqn, keys);
        await dropOutdated(host, ctx, nqn, hostNqn, keys);
      }
      if (await findDevice(host, namespace.uuid, nqn) === undefined) {
        expected.set(nqn, (expected.get(nqn) ?? new Set()).add(namespace.uuid));
      }
    },

    async detach(ctx, uuid, subsystemNqn) {
      for (const uuids of [...expected.values(), ...attached.values()]) uuids.delete(uuid);
      watch.release(uuid);
      const device = await findDevice(host, uuid, subsystemNqn);
      const nqn = device?.subsystemNqn ?? subsystemNqn;
      // Without its device nothing here tells which subsystem it belonged to.
      if (nqn === undefined) {
        return await disconnectIdle(
          ctx,
          new Set((await ownControllers()).map((controller) => controller.subsystemNqn)),
        );
      }
      using _held = await locks.wait(`subsystem ${nqn}`, "detach", ctx.signal);
      // Looked at again under the lock: a name or a neighbour may have come meanwhile.
      const devices = await devicesOf(host, nqn);
      for (const { uuid } of devices) expected.get(nqn)?.delete(uuid);
      if (subsystemNqn === undefined && !devices.some((other) => other.uuid === uuid)) return;
      const ours = devices.filter((other) => other.uuid === uuid).map(({ name }) => name);
      const isExpected = (expected.get(nqn)?.size ?? 0) > 0;
      if (isExpected || await hasNamespaces(host, nqn, ours)) {
        ctx.log.debug("left a subsystem connected that has other namespaces here", { subsystem: nqn });
        return;
      }
      for (const found of devices) {
        const users = await usersOf(host, found);
        if (users.length === 0) continue;
        throw new StatusError(
          "FAILED_PRECONDITION",
          `Cannot detach namespace ${uuid}: ${found.path} is in use by ${users.join(", ")}`,
        );
      }
      await disconnect(ctx, nqn);
    },

    async reconcile(ctx) {
      looks++;
      const ours = await ownControllers();
      const connected = new Set(ours.map((controller) => controller.subsystemNqn));
      await disconnectIdle(ctx, [...connected].filter((nqn) => idle.has(nqn)));
      idle = new Set();
      for (const nqn of connected) if (await isIdle(nqn)) idle.add(nqn);
      for (const controller of ours) {
        const { subsystemNqn } = controller;
        if (!known.has(subsystemNqn)) {
          const used = await keysInUse(host, controller);
          if (used.host !== undefined) known.set(subsystemNqn, { host: used.host, controller: used.controller });
        }
        if (addresses.has(subsystemNqn)) continue;
        const seen = ours.filter((other) => other.subsystemNqn === subsystemNqn).map(addressOf);
        addresses.set(subsystemNqn, seen.filter((address) => address !== undefined));
      }
      for (const [nqn, wanted] of addresses) {
        // One that is dead, or that the kernel has been deleting for ever, does not come back.
        const missing = wanted.filter((address) =>
          !ours.some((controller) =>
            controller.subsystemNqn === nqn && isAt(controller, address) && isUsable(controller)
          )
        );
        if (missing.length === 0) continue;
        using _held = await locks.wait(`subsystem ${nqn}`, "tend", ctx.signal);
        if (addresses.get(nqn) !== wanted) continue;
        if (!await hasNamespaces(host, nqn)) {
          // The kernel gave up the last path: the next attach is whose turn it is then.
          if (await isIdle(nqn) && !connected.has(nqn)) {
            addresses.delete(nqn);
            known.delete(nqn);
          }
          continue;
        }
        for (const outcome of await connectMissing(ctx, nqn, missing, known.get(nqn), false)) {
          if (outcome !== undefined) {
            ctx.log.debug("could not connect again", { subsystem: nqn, error: outcome.problem });
          }
        }
      }
      await heal(ctx, ours);
    },
  };
}

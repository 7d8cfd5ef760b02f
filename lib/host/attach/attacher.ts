/**
 * Attachers: what makes the kernel connect to a namespace's subsystem, or let go of it.
 *
 * attach: may be repeated, also for a namespace that is connected. When it returns, what this strategy can do for the
 * connection has been done; the device itself may still be on its way, and waitForDevice is who waits for it.
 *
 * detach: may be repeated, also for a namespace that was never attached. Its file system must be unmounted before. It
 * needs nothing but the UUID: NodeUnstageVolume has no publish context. Other namespaces of the same subsystem keep
 * their connection.
 *
 * With keys, attach leaves no connection of ours without them: first another one is made beside it, and only when that one
 * works and leads to the same namespaces, the old one goes. So a wrong key is found out by a connection that carries nothing,
 * and changing keys interrupts no I/O. Writing a new key to the attribute `dhchap_secret` of a live connection was left out:
 * the kernel takes it without a look, and host and controller key cannot be changed in one step. A wrong one costs the
 * connection and leaves I/O hanging, and writing the right one back then never returned (Linux 6.12).
 *
 * Two strategies, and the node service cannot tell which it has. With the Discovery-Client of LightOS, a daemon connects
 * and follows the cluster as it moves; the driver tells it what to know by one file per namespace. Direct uses nvme-cli,
 * and with keys the kernel's own interface.
 */
import type { RequestContext } from "../../context.ts";
import type { DhchapKeys } from "../../auth_key.ts";
import { messageOf, StatusError } from "../../error.ts";
import type { KeyedLock } from "../../lock.ts";
import { formatAddress, type RemoteNamespace, type TransportAddress } from "../../namespace.ts";
import {
  authenticationObstacle,
  connectAuthenticated,
  type ConnectProblem,
  dropOutdated,
  hasKeys,
  hasMultipath,
  keysInUse,
} from "../nvme/authentication.ts";
import { connectByKernel, describeConnectFailure } from "../nvme/fabrics.ts";
import { applyRemedy, ConnectionWatch } from "../nvme/healing.ts";
import { type Host, kindBehind } from "../host.ts";
import { loopDevicesOn } from "../loop_devices.ts";
import { foreignMountsOf, mountedSomewhere, mountsOf, mountTable, processesAt } from "../mounts.ts";
import {
  addressOf,
  allControllers,
  type BlockDevice,
  connectController,
  type ConnectionTuning,
  controllersOf,
  devicesOf,
  disconnectController,
  findDevice,
  hasNamespaces,
  isAt,
  isUsable,
  nameUuid,
  type NvmeController,
} from "../nvme/sysfs.ts";
import { holdersOfDevice } from "../users.ts";

export interface Attacher {
  /** What to look at when an attached namespace does not show up as a device; ends the error that says so. */
  readonly hint: string;
  /** Whether attach needs the keys of an authenticated connection; false: a daemon connects, and has keys of its own. */
  readonly takesKeys: boolean;
  /**
   * Makes the kernel connect.
   *
   * @param keys for authenticated connections; a connection without them is replaced
   * @throws StatusError FAILED_PRECONDITION when this node lacks what the strategy needs, or the keys are refused;
   *   UNAVAILABLE when no controller of the subsystem could be connected
   */
  attach(ctx: RequestContext, namespace: RemoteNamespace, keys?: DhchapKeys): Promise<void>;
  /**
   * Lets go of a namespace; throws UNAVAILABLE when that failed and may be repeated.
   *
   * @param subsystemNqn lets go of a connection that shows no namespace any more too, where it is known
   */
  detach(ctx: RequestContext, namespaceUuid: string, subsystemNqn?: string): Promise<void>;
  /**
   * Makes connections again that the kernel has given up (`ctrl_loss_tmo` after their loss), so that a volume in use gets
   * back the paths it was attached with; heals those that give no path (healing.ts); and drops those that have shown no
   * namespace since the last call. To be called every `lookMs`; with nothing to do it reads sysfs and nothing more. Absent
   * where a daemon does it.
   *
   * It knows the addresses of what this process has attached: one that is started anew learns from sysfs those that are
   * connected, and the rest with the next attach.
   */
  tend?(ctx: RequestContext): Promise<void>;
}

/**
 * The NVMe host ID of a node: a UUID (version 8) made of the node ID, so that it is the same after each restart and
 * differs between nodes. The kernel wants host NQN and host ID in pairs, and nvme-cli would take a random ID.
 */
export function hostIdOf(nodeId: string): string {
  return nameUuid(`nvme host ID of ${nodeId}`);
}

export interface DiscoveryClientOptions {
  readonly host: Host;
  /** The directory that the Discovery-Client watches (its setting `clientConfigDir`). */
  readonly directory: string;
  readonly hostNqn: string;
}

/**
 * The name of a temporary file in the watched directory begins with this, and the daemon looks away, except when it starts
 * (spec/lightos.md 12.3). So there is one for each namespace, which detach finds when a killed driver has left it.
 */
export const temporaryPrefix = "tmp.dc.";

/**
 * Attaches through LightOS' Discovery-Client: one file per namespace UUID in its directory (spec/lightos.md 10.2, 12.3).
 *
 * The daemon takes up a file when it appears and ignores its removal until it starts again; connections stay. A file
 * that is right already is not written again, for every write makes the daemon read the directory anew.
 */
export function discoveryClient({ host, directory, hostNqn }: DiscoveryClientOptions): Attacher {
  const fileOf = (uuid: string) => `${directory}/${uuid.toLowerCase()}`;
  const temporaryOf = (uuid: string) => `${directory}/${temporaryPrefix}${uuid.toLowerCase()}`;
  return {
    hint: `see that the Discovery-Client runs on this node, watches ${directory}, and reaches the cluster`,
    takesKeys: false,

    async attach(ctx, namespace) {
      const refuse = (problem: string, cause?: unknown) =>
        new StatusError("FAILED_PRECONDITION", `Cannot attach namespace ${namespace.uuid}: ${problem}`, { cause });
      if (namespace.discovery.length === 0) {
        throw refuse(`the publish context names no discovery controller of ${namespace.subsystemNqn}`);
      }
      const path = fileOf(namespace.uuid);
      const text = discoveryFile(namespace, hostNqn);
      const kind = await kindBehind(host, directory);
      if (kind !== "directory") {
        throw refuse(
          `${directory} is ${kind === "absent" ? "missing" : "not a directory"}, ` +
            `the LightOS Discovery-Client has to be installed on this node and share its directory with the driver`,
        );
      }
      try {
        if (await host.readText(path) === text) return;
        await host.replaceText(path, text, temporaryOf(namespace.uuid));
      } catch (error) {
        throw refuse(`${path} cannot be written (${messageOf(error)})`, error);
      }
      ctx.log.info("told the Discovery-Client", { path, subsystem: namespace.subsystemNqn });
    },

    async detach(ctx, uuid) {
      const path = fileOf(uuid);
      try {
        await host.remove(temporaryOf(uuid));
        if (await host.readText(path) === undefined) return;
        await host.remove(path);
      } catch (error) {
        throw new StatusError(
          "UNAVAILABLE",
          `Cannot detach namespace ${uuid}: ${path} cannot be removed (${messageOf(error)})`,
          { cause: error },
        );
      }
      ctx.log.info("untold the Discovery-Client", { path });
    },
  };
}

/** The Discovery-Client's input for one namespace: one line per discovery controller, in the order of their text. */
export function discoveryFile(namespace: RemoteNamespace, hostNqn: string): string {
  const byText = new Map(namespace.discovery.map((address) => [formatAddress(address), address]));
  const texts = [...byText.keys()].sort();
  return texts.map((text) => {
    const address = byText.get(text) as TransportAddress;
    return `-t tcp -a ${address.traddr} -s ${address.trsvcid} -q ${hostNqn} -n ${namespace.subsystemNqn}\n`;
  }).join("");
}

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
export function direct({ host, hostNqn, hostId, locks, tuning = {} }: DirectOptions): Attacher {
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

    async tend(ctx) {
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

/** What holds a device on this machine, in words for an error message: devices on top of it, and mounts. */
export async function usersOf(host: Host, device: BlockDevice): Promise<readonly string[]> {
  const table = await mountTable(host);
  const mounts = await mountsOf(host, table, device);
  return [
    ...await holdersOfDevice(host, device),
    ...await loopDevicesOn(host, table, device.path),
    ...mounts.map((mount) => `the mount at "${mount.path}"`),
  ];
}

/**
 * The same, with what it takes more work to see: who has the device open, and mounts that our own mount table does not
 * show. Of those in containers that do not share their processes with us (`hostPID`) it sees the file system alone.
 */
export async function allUsersOf(host: Host, device: BlockDevice): Promise<readonly string[]> {
  const users = [
    ...await usersOf(host, device),
    ...await foreignMountsOf(host, device),
    ...await processesAt(host, (place) => place === device.path),
  ];
  if (users.length > 0) return users;
  const fsType = await mountedSomewhere(host, device);
  return fsType === undefined ? [] : [`its ${fsType}, which is mounted where this process cannot see it`];
}

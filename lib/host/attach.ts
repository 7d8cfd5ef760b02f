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
 * Two strategies, and the node service cannot tell which it has. With the Discovery-Client of LightOS, a daemon connects
 * and follows the cluster as it moves; the driver tells it what to know by one file per namespace. Direct uses nvme-cli.
 */
import type { RequestContext } from "../context.ts";
import { messageOf, StatusError } from "../error.ts";
import type { KeyedLock } from "../lock.ts";
import { formatAddress, type RemoteNamespace, type TransportAddress } from "../namespace.ts";
import type { Host } from "./host.ts";
import { foreignMountsOf, mountedSomewhere, mountsOf, mountTable, processesAt } from "./mounts.ts";
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
} from "./nvme.ts";

export interface Attacher {
  /** What to look at when an attached namespace does not show up as a device; ends the error that says so. */
  readonly hint: string;
  /**
   * Makes the kernel connect.
   *
   * @throws StatusError FAILED_PRECONDITION when this node lacks what the strategy needs; UNAVAILABLE when no controller
   *   of the subsystem could be connected
   */
  attach(ctx: RequestContext, namespace: RemoteNamespace): Promise<void>;
  /**
   * Lets go of a namespace; throws UNAVAILABLE when that failed and may be repeated.
   *
   * @param subsystemNqn lets go of a connection that shows no namespace any more too, where it is known
   */
  detach(ctx: RequestContext, namespaceUuid: string, subsystemNqn?: string): Promise<void>;
  /**
   * Makes connections again that the kernel has given up (`ctrl_loss_tmo` after their loss), so that a volume in use gets
   * back the paths it was attached with, and drops those that have shown no namespace since the last call. To be called
   * every few seconds; with nothing to do it reads sysfs and nothing more. Absent where a daemon does it.
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

    async attach(ctx, namespace) {
      const refuse = (problem: string, cause?: unknown) =>
        new StatusError("FAILED_PRECONDITION", `Cannot attach namespace ${namespace.uuid}: ${problem}`, { cause });
      if (namespace.discovery.length === 0) {
        throw refuse(`the publish context names no discovery controller of ${namespace.subsystemNqn}`);
      }
      const path = fileOf(namespace.uuid);
      const text = discoveryFile(namespace, hostNqn);
      const kind = await host.kindOf(directory);
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
 * Attaches with nvme-cli, to the I/O controllers in the publish context.
 *
 * One connection is enough, for the others come back by multipath: those that fail are logged. On detach, a subsystem is
 * disconnected when this machine sees no other namespace of it and nobody waits for one; unrelated LightOS volumes share
 * one. Only our own connections are dropped, by controller and not by NQN: another program may be connected under another
 * host NQN.
 */
export function direct({ host, hostNqn, hostId, locks, tuning = {} }: DirectOptions): Attacher {
  /** Where the subsystems of attached namespaces answer, by NQN. Losing it is harmless, see `tend`. */
  const addresses = new Map<string, readonly TransportAddress[]>();
  /** Namespaces whose device was not there yet when attach returned, by subsystem: who waits needs the connection. */
  const expected = new Map<string, Set<string>>();
  /** Subsystems that showed nothing at the last look of `tend`. One look is not enough: `lbcsi attach` may be at work. */
  let idle = new Set<string>();

  const connect = (ctx: RequestContext, subsystemNqn: string, wanted: readonly TransportAddress[]) =>
    connectMissing(ctx, subsystemNqn, wanted).then((outcomes) =>
      outcomes.map(({ address, problem }) =>
        problem === undefined ? undefined : `${formatAddress(address)}: ${problem}`
      )
    );

  async function connectMissing(ctx: RequestContext, subsystemNqn: string, wanted: readonly TransportAddress[]) {
    const connected = await controllersOf(host, subsystemNqn);
    return await Promise.all(wanted.map(async (address) => {
      const there = connected.find((controller) => isAt(controller, address) && isUsable(controller));
      if (there !== undefined) {
        // The kernel allows one connection per address and NQN, whatever the host NQN.
        return there.hostNqn === hostNqn
          ? { address, problem: undefined }
          : { address, problem: `${there.name} is connected there as host ${there.hostNqn}, disconnect it first` };
      }
      const wish = { address, subsystemNqn, hostNqn, hostId, ...tuning };
      return { address, problem: await connectController(host, ctx, wish) };
    }));
  }

  async function disconnect(ctx: RequestContext, subsystemNqn: string): Promise<void> {
    addresses.delete(subsystemNqn);
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

    async attach(ctx, namespace) {
      const nqn = namespace.subsystemNqn;
      if (namespace.addresses.length === 0) {
        throw new StatusError(
          "FAILED_PRECONDITION",
          `Cannot attach namespace ${namespace.uuid}: the publish context names no I/O controller of ${nqn}`,
        );
      }
      using _held = await locks.wait(`subsystem ${nqn}`, "attach", ctx.signal);
      const outcomes = await connect(ctx, nqn, namespace.addresses);
      const problems = outcomes.filter((problem) => problem !== undefined);
      if (problems.length === outcomes.length) {
        throw new StatusError(
          "UNAVAILABLE",
          `Cannot attach namespace ${namespace.uuid}: no I/O controller of ${nqn} took the connection (${
            problems.join("; ")
          })`,
        );
      }
      for (const problem of problems) ctx.log.warning("could not connect", { subsystem: nqn, error: problem });
      addresses.set(nqn, namespace.addresses);
      if (await findDevice(host, namespace.uuid, nqn) === undefined) {
        expected.set(nqn, (expected.get(nqn) ?? new Set()).add(namespace.uuid));
      }
    },

    async detach(ctx, uuid, subsystemNqn) {
      for (const waited of expected.values()) waited.delete(uuid);
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
      const isHalfThere = devices.length === 0 && await hasNamespaces(host, nqn);
      const isExpected = (expected.get(nqn)?.size ?? 0) > 0;
      if (devices.some((other) => other.uuid !== uuid) || isHalfThere || isExpected) {
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
      const ours = await ownControllers();
      const connected = new Set(ours.map((controller) => controller.subsystemNqn));
      await disconnectIdle(ctx, [...connected].filter((nqn) => idle.has(nqn)));
      idle = new Set();
      for (const nqn of connected) if (await isIdle(nqn)) idle.add(nqn);
      for (const { subsystemNqn } of ours) {
        if (addresses.has(subsystemNqn)) continue;
        const known = ours.filter((controller) => controller.subsystemNqn === subsystemNqn).map(addressOf);
        addresses.set(subsystemNqn, known.filter((address) => address !== undefined));
      }
      for (const [nqn, wanted] of addresses) {
        const missing = wanted.filter((address) =>
          !ours.some((controller) => controller.subsystemNqn === nqn && isAt(controller, address))
        );
        if (missing.length === 0) continue;
        using _held = await locks.wait(`subsystem ${nqn}`, "tend", ctx.signal);
        if (addresses.get(nqn) !== wanted) continue;
        if (!await hasNamespaces(host, nqn)) {
          // The kernel gave up the last path: the next attach is whose turn it is then.
          if (await isIdle(nqn) && !connected.has(nqn)) addresses.delete(nqn);
          continue;
        }
        for (const problem of await connect(ctx, nqn, missing)) {
          if (problem !== undefined) ctx.log.debug("could not connect again", { subsystem: nqn, error: problem });
        }
      }
    },
  };
}

/** What holds a device on this machine, in words for an error message: devices on top of it, and mounts. */
export async function usersOf(host: Host, device: BlockDevice): Promise<readonly string[]> {
  const holders = await host.list(`${host.roots.sysfs}/class/block/${device.name}/holders`) ?? [];
  const mounts = await mountsOf(host, await mountTable(host), device);
  return [...holders, ...mounts.map((mount) => `the mount at "${mount.path}"`)];
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

/**
 * Connections that are authenticated with DH-HMAC-CHAP (auth_key.ts) by the kernel's initiator, 6.0 and later.
 *
 * The driver writes to /dev/nvme-fabrics itself. nvme-cli takes keys as arguments, which every user of the machine can read;
 * and where the kernel does not support keys, it leaves them out and connects without them (seen with 2.3). A kernel before
 * 6.0 writes the unknown option to its log, with the key. A later one that was built without the feature accepts the option
 * and connects without a key (seen with Debian's 6.1). So the driver first checks what the kernel supports, and afterwards
 * what the kernel did with the key.
 *
 * The controller decides whether a connection is authenticated, when it is connected. Sysfs shows only which keys the host
 * has for a connection.
 */
import { sleep } from "../../timing.ts";
import { type AuthKind, DhchapKey, type DhchapKeys, type GivenKeys } from "../../auth_key.ts";
import type { RequestContext } from "../../context.ts";
import { messageOf } from "../../error.ts";
import { formatAddress } from "../../namespace.ts";
import type { Host } from "../host.ts";
import type { ConnectOptions } from "./connect_options.ts";
import { allControllers, controllersOf, isUsable, type NvmeController } from "./controllers.ts";
import { disconnectController } from "./disconnect.ts";
import { connectByKernel, describeConnectFailure, kernelErrorNumber } from "./fabrics.ts";
import { isNeeded } from "./paths.ts";

/** Why this machine cannot authenticate its connections, and what is needed; undefined when it can. */
export async function authenticationObstacle(host: Host, kind: AuthKind): Promise<string | undefined> {
  const path = `${host.roots.dev}/nvme-fabrics`;
  let options: string | undefined;
  try {
    options = await host.readText(path);
  } catch (error) {
    if ([1, 13].includes(kernelErrorNumber(error) ?? 0)) return describeConnectFailure(messageOf(error), "");
    // Before 5.17 it answers EINVAL until something is connected.
    return `the kernel does not tell which options of connections it knows (${path}: ${
      messageOf(error)
    }), ${kernelNeeded}`;
  }
  if (options === undefined) return `${path} is missing, the kernel module nvme_tcp is needed`;
  const known = new Set(options.split(/[,\n]/).map((option) => option.split("=")[0]));
  const missing = ["dhchap_secret", ...(kind === "bidirectional" ? ["dhchap_ctrl_secret"] : [])]
    .filter((option) => !known.has(option));
  if (missing.length > 0) {
    return `the kernel cannot authenticate NVMe connections (no ${
      missing.join(", ")
    } among the options of ${path}), ${kernelNeeded}`;
  }
  return await isBuiltWithout(host)
    ? `the kernel was built without the authentication of NVMe connections (it has no nvme_auth_negotiate), ${kernelNeeded}`
    : undefined;
}

const kernelNeeded = "Linux 6.0 or later with CONFIG_NVME_AUTH (CONFIG_NVME_HOST_AUTH since 6.7) is needed";

/** Looks at the names of the kernel's functions, those of modules included. The kernel may hide them. */
async function isBuiltWithout(host: Host): Promise<boolean> {
  let symbols: string;
  try {
    symbols = await host.readText(`${host.roots.proc}/kallsyms`) ?? "";
  } catch {
    return false;
  }
  return /\bnvmf_connect_admin_queue\b/.test(symbols) && !/\bnvme_auth_negotiate\b/.test(symbols);
}

/** Why a connection was not made, in words for an error message, and whether the keys are the reason. */
export interface ConnectProblem {
  readonly problem: string;
  readonly isAboutKeys: boolean;
}

/** A connection with keys. */
export interface AuthenticatedConnectOptions extends ConnectOptions {
  readonly keys: DhchapKeys;
  /** Whether another connection is made to an address that has one. */
  readonly beside?: boolean;
}

/**
 * Connects as connectController does, with keys, where authenticationObstacle has found none.
 *
 * @returns undefined, or why it failed
 * @throws `ctx.signal.reason` when that has aborted; StatusError UNAVAILABLE when a connection without the key cannot be
 *   dropped
 */
export async function connectAuthenticated(
  host: Host,
  ctx: RequestContext,
  { keys, beside = false, ...options }: AuthenticatedConnectOptions,
): Promise<ConnectProblem | undefined> {
  ctx.signal.throwIfAborted();
  const started = performance.now();
  let failure: unknown;
  let name: string | undefined;
  try {
    name = await connectByKernel(host, options, {
      dhchapSecret: keys.host.reveal(),
      dhchapControllerSecret: keys.controller?.reveal(),
      duplicate: beside,
    });
  } catch (error) {
    failure = error;
  }
  const facts = {
    subsystem: options.subsystemNqn,
    address: formatAddress(options.address),
    ms: Math.round(performance.now() - started),
  };
  if (failure === undefined) ctx.log.info("connected with a key", facts);
  else ctx.log.warning("could not connect with a key", { ...facts, error: messageOf(failure) });
  ctx.signal.throwIfAborted();
  if (failure !== undefined) return problemOf(failure, options.hostNqn, keys);
  // Undefined when it is gone, or the kernel did not name it.
  const made = (await allControllers(host)).find((controller) => controller.name === name);
  if (made === undefined || await hasKeys(host, made, keys)) return undefined;
  await disconnectController(host, ctx, made);
  return {
    problem: `the kernel has taken the key and does not use it, the connection was dropped again; ${kernelNeeded}`,
    isAboutKeys: true,
  };
}

/** What the kernel answered, in words. */
function problemOf(error: unknown, hostNqn: string, keys: DhchapKeys): ConnectProblem {
  const text = messageOf(error);
  const isBidirectional = keys.controller !== undefined;
  const check = `see that host NQN ${hostNqn} has the same key${isBidirectional ? "s" : ""} on the cluster as here`;
  switch (kernelErrorNumber(error)) {
    case 129: // EKEYREJECTED
      return {
        problem: `the key was refused${
          isBidirectional ? ", or the controller's own is another one than here" : ""
        }; ${check}`,
        isAboutKeys: true,
      };
    case 126: // ENOKEY
      return { problem: `the kernel has no use for the key it was given (${text}); ${check}`, isAboutKeys: true };
    case 5:
      // EIO: any error of an NVMe controller; before 6.10 also for a wrong key. Seen with 6.12 as well, after 61 s: the
      // controller hangs up after it has rejected a key, sometimes before the host has read the reason.
      return {
        problem:
          `not allowed: the subsystem is unknown there, has no access for host NQN ${hostNqn}, or a key is wrong; ` +
          `${check}, the kernel log (dmesg) tells which`,
        isAboutKeys: false,
      };
    case 114:
    case 115:
      return { problem: "another connection was made there in between, by another program", isAboutKeys: false };
    case 22:
      return { problem: `the kernel does not take these settings of a connection (${text})`, isAboutKeys: false };
    default:
      return { problem: describeConnectFailure(text, hostNqn), isAboutKeys: false };
  }
}

/** The keys that the kernel has for a connection; undefined each where there is none. */
export async function keysInUse(host: Host, controller: NvmeController): Promise<GivenKeys> {
  const read = async (attribute: string) => {
    const path = `${host.roots.sysfs}/class/nvme/${controller.name}/${attribute}`;
    try {
      return DhchapKey.parse(await host.readText(path) ?? "");
    } catch {
      // "none", or the connection is being removed.
      return undefined;
    }
  };
  return { host: await read("dhchap_secret"), controller: await read("dhchap_ctrl_secret") };
}

/** Whether the kernel has these keys for a connection. A controller key beyond them does not count. */
export async function hasKeys(host: Host, controller: NvmeController, keys: DhchapKeys): Promise<boolean> {
  const used = await keysInUse(host, controller);
  return keys.host.equals(used.host) &&
    (keys.controller === undefined || keys.controller.equals(used.controller));
}

const takeOverMs = 5000;

/** Our connections to a subsystem, and the keys that they are to have. */
export interface KeyedSubsystem {
  readonly subsystemNqn: string;
  readonly hostNqn: string;
  readonly keys: DhchapKeys;
}

/**
 * Drops our connections to a subsystem that have other keys, once each of their paths has a live one beside it over a
 * connection with these keys. A connection that carries the last path to a namespace stays, and is logged.
 */
export async function dropOutdated(
  host: Host,
  ctx: RequestContext,
  { subsystemNqn, hostNqn, keys }: KeyedSubsystem,
): Promise<void> {
  const giveUpAt = performance.now() + takeOverMs;
  for (;;) {
    const ours = (await controllersOf(host, subsystemNqn)).filter((controller) =>
      controller.hostNqn === hostNqn && isUsable(controller)
    );
    const current: NvmeController[] = [];
    const outdated: NvmeController[] = [];
    for (const controller of ours) (await hasKeys(host, controller, keys) ? current : outdated).push(controller);
    const left: NvmeController[] = [];
    for (const controller of outdated) {
      if (await isNeeded(host, controller, current)) {
        left.push(controller);
        continue;
      }
      // The kernel reuses names: another program may have made a connection under this one meanwhile.
      const same = (await controllersOf(host, subsystemNqn)).find(({ name }) => name === controller.name);
      if (same === undefined || same.hostNqn !== hostNqn || await hasKeys(host, same, keys)) continue;
      await disconnectController(host, ctx, same);
    }
    if (left.length === 0) return;
    if (performance.now() >= giveUpAt) {
      const names = left.map(({ name }) => name).join(", ");
      ctx.log.warning("left connections that have other keys, because nothing else leads to their namespaces", {
        subsystem: subsystemNqn,
        name: names,
      });
      return;
    }
    await sleep(50, ctx.signal);
  }
}

/**
 * Throws FAILED_PRECONDITION when a live connection to a subsystem was made without keys of this kind, by any program: data
 * would go over it as over the others.
 */
export async function assertAuthenticated(
  host: Host,
  ctx: RequestContext,
  subsystemNqn: string,
  kind: AuthKind,
): Promise<void> {
  for (const controller of await controllersOf(host, subsystemNqn)) {
    if (controller.state !== "live" || controller.isDiscovery) continue;
    const used = await keysInUse(host, controller);
    const missing = used.host === undefined
      ? "has no key"
      : kind === "bidirectional" && used.controller === undefined
      ? "has no key to authenticate the controller with"
      : undefined;
    if (missing === undefined) continue;
    const obstacle = await authenticationObstacle(host, kind);
    if (obstacle !== undefined) throw ctx.error("FAILED_PRECONDITION", obstacle);
    throw ctx.error(
      "FAILED_PRECONDITION",
      `in-band-auth is "${kind}", and the connection ${controller.name} of host ${controller.hostNqn} to ` +
        `${subsystemNqn} ${missing}; the program that makes the connections needs the keys (with a Discovery-Client, in its own ` +
        `settings), and this one has to be disconnected first`,
    );
  }
}

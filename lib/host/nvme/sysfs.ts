/**
 * Block devices of NVMe namespaces, and the mappers that encrypt them: found in sysfs by namespace UUID, never by name or
 * number.
 *
 * What the kernel shows (measured on 6.1): `class/block/nvmeXnY` is the multipath head of a namespace, `nvmeXcYnZ` are its
 * paths (`hidden` is 1, no device node). `wwid` begins with `uuid.` if the namespace has a UUID; the file `uuid` shows the
 * NGUID when it has none, so only `wwid` decides. X is the subsystem's number, Y is not the NSID, and a name can belong to
 * another namespace after a reconnect: identity is read again before each step that relies on it.
 */
import { createHash } from "node:crypto";
import * as z from "zod";
import type { RequestContext } from "../../context.ts";
import { hasCode, messageOf, StatusError } from "../../error.ts";
import { formatAddress, isNodeHostNqn, parseAddress, type TransportAddress } from "../../namespace.ts";
import { connectByKernel, describeConnectFailure, kernelErrorNumber } from "./fabrics.ts";
import type { CommandResult, Host } from "../host.ts";

/** The subsystem NQN that every discovery controller answers to, by the NVMe base specification. */
export const discoveryNqn = "nqn.2014-08.org.nvmexpress.discovery";

/** A namespace as this machine sees it. */
export interface BlockDevice {
  /** `nvme0n1`. Says nothing for long. */
  readonly name: string;
  /** Its node, below the root of device nodes. */
  readonly path: string;
  /** `major:minor`. */
  readonly number: string;
  /** Namespace UUID, lower case. */
  readonly uuid: string;
  readonly subsystemNqn: string;
  readonly sizeBytes: bigint;
  /** Whether the kernel refuses writes to it. */
  readonly readOnly: boolean;
  /** Of a mapper that encrypts (luks.ts): its name, and the namespace under it, undefined when that has gone. */
  readonly encrypts?: { readonly name: string; readonly beneath: BlockDevice | undefined };
}

/** A connection of this machine to a subsystem: one path to each of its namespaces. */
export interface NvmeController {
  /** `nvme0`. */
  readonly name: string;
  /** `live`, `connecting`, `resetting`, `deleting` … */
  readonly state: string;
  readonly subsystemNqn: string;
  readonly hostNqn: string;
  readonly hostId: string;
  /** Tells of other controllers, no data goes over it. */
  readonly isDiscovery: boolean;
  readonly transport: string;
  /** As sysfs has it: `traddr=192.0.2.1,trsvcid=4420,src_addr=…`. */
  readonly address: string;
}

/**
 * The block device with this namespace UUID, or undefined. Does not touch the device itself.
 *
 * @throws StatusError FAILED_PRECONDITION when two devices claim the UUID, so that no choice is safe
 */
export async function findDevice(host: Host, uuid: string, subsystemNqn?: string): Promise<BlockDevice | undefined> {
  const found = (await devicesWithUuid(host, uuid)).filter((device) =>
    subsystemNqn === undefined || device.subsystemNqn === subsystemNqn
  );
  if (found.length > 1) {
    const isOneSubsystem = new Set(found.map((device) => device.subsystemNqn)).size === 1;
    const obstacle = isOneSubsystem ? await multipathObstacle(host) : undefined;
    const devices = found.map(describeDevice).join(" and ");
    throw new StatusError(
      "FAILED_PRECONDITION",
      obstacle === undefined
        ? `Cannot tell which block device is namespace ${uuid}: ${devices} both claim it, one subsystem has to be disconnected`
        : `Cannot tell which block device is namespace ${uuid}: ${devices} both claim it, for each path is a device of its ` +
          `own here: ${obstacle.found}, ${obstacle.needed} is needed`,
    );
  }
  return found[0];
}

/**
 * Why this kernel shows each path to a namespace as a device of its own, and what is needed instead; undefined: it has native
 * multipath, or sysfs does not tell.
 */
export async function multipathObstacle(
  host: Host,
): Promise<{ readonly found: string; readonly needed: string } | undefined> {
  const text = (await host.readText(`${host.roots.sysfs}/module/nvme_core/parameters/multipath`))?.trim();
  if (text === "Y") return undefined;
  if (text !== undefined) {
    return {
      found: `native NVMe multipath is off (nvme_core.multipath=${text})`,
      needed: "nvme_core.multipath=Y on the kernel's command line",
    };
  }
  if (await host.kindOf(`${host.roots.sysfs}/module/nvme_core`) === "absent") return undefined;
  return {
    found: "this kernel was built without native NVMe multipath (CONFIG_NVME_MULTIPATH)",
    needed: "a kernel with it",
  };
}

/** Name of the volume's mapper, the incumbent driver's. */
export function mapperName(uuid: string): string {
  return `lb-csi-nvme-uuid.${uuid.toLowerCase()}`;
}

/**
 * The open mapper of a volume as a block device, or undefined. Does not touch the device itself.
 *
 * @throws as findDevice
 */
export async function findMapper(host: Host, uuid: string): Promise<BlockDevice | undefined> {
  const base = `${host.roots.sysfs}/class/block`;
  for (const name of await host.list(base) ?? []) {
    if (!/^dm-\d+$/.test(name)) continue;
    const text = async (path: string) => (await host.readText(`${base}/${name}/${path}`))?.trim();
    if (await text("dm/name") !== mapperName(uuid)) continue;
    const [number, size, ro] = await Promise.all([text("dev"), text("size"), text("ro")]);
    if (number === undefined || size === undefined || !/^\d+$/.test(size)) continue;
    const slaves = await host.list(`${base}/${name}/slaves`) ?? [];
    const device = await findDevice(host, uuid);
    const beneath = device !== undefined && slaves.includes(device.name) ? device : undefined;
    return {
      name,
      path: `${host.roots.dev}/${name}`,
      number,
      uuid: uuid.toLowerCase(),
      subsystemNqn: device?.subsystemNqn ?? "",
      sizeBytes: BigInt(size) * 512n,
      readOnly: ro === "1",
      encrypts: { name: mapperName(uuid), beneath },
    };
  }
  return undefined;
}

/** All block devices of a subsystem on this machine. */
export async function devicesOf(host: Host, subsystemNqn: string): Promise<readonly BlockDevice[]> {
  return (await allDevices(host)).filter((device) => device.subsystemNqn === subsystemNqn);
}

/** The block device with this number (`major:minor`); undefined when it is not a namespace with a UUID. */
export async function deviceNumbered(host: Host, number: string): Promise<BlockDevice | undefined> {
  return (await allDevices(host)).find((device) => device.number === number);
}

/**
 * Whether this machine shows any block device of a subsystem, be it one that has no UUID or that is half there.
 *
 * @param but names of devices that do not count
 */
export async function hasNamespaces(host: Host, subsystemNqn: string, but: readonly string[] = []): Promise<boolean> {
  for (const name of await namespaceNames(host)) {
    if (but.includes(name)) continue;
    if (await attribute(host, `class/block/${name}/device/subsysnqn`) === subsystemNqn) return true;
  }
  return false;
}

/** All connections of this machine to a subsystem. */
export async function controllersOf(host: Host, subsystemNqn: string): Promise<readonly NvmeController[]> {
  return (await allControllers(host)).filter((controller) => controller.subsystemNqn === subsystemNqn);
}

/** All NVMe controllers of this machine, local drives and discovery controllers among them. */
export async function allControllers(host: Host): Promise<readonly NvmeController[]> {
  const names = await host.list(`${host.roots.sysfs}/class/nvme`) ?? [];
  const controllers = await Promise.all(names.map((name) => readController(host, name)));
  return controllers.filter((controller) => controller !== undefined);
}

/** All NVMe namespaces of this machine that have a UUID, local drives among them. Does not touch the devices. */
export async function allDevices(host: Host): Promise<readonly BlockDevice[]> {
  const devices = await Promise.all((await namespaceNames(host)).map((name) => readDevice(host, name)));
  return devices.filter((device) => device !== undefined);
}

/**
 * The volumes that this machine is connected to as a node of this driver, whoever made the connections. Does not touch the
 * devices.
 */
export async function attachedVolumes(host: Host): Promise<readonly BlockDevice[]> {
  const subsystems = new Set(
    (await allControllers(host))
      .filter(({ transport, hostNqn }) => transport === "tcp" && isNodeHostNqn(hostNqn))
      .map(({ subsystemNqn }) => subsystemNqn),
  );
  return (await allDevices(host)).filter(({ subsystemNqn }) => subsystems.has(subsystemNqn));
}

/** One controller's way to a namespace. */
export interface NamespacePath {
  readonly controller: NvmeController;
  /** `optimized`, `non-optimized`, `inaccessible` …; undefined where the kernel has no multipath. */
  readonly anaState: string | undefined;
}

/** Every path that sysfs shows over `controllers`, with the name of its device (`nvme1n3`). None without native multipath. */
export async function allPaths(
  host: Host,
  controllers: readonly NvmeController[],
): Promise<readonly (NamespacePath & { readonly device: string })[]> {
  const names = await host.list(`${host.roots.sysfs}/class/block`) ?? [];
  const paths = await Promise.all(names.map(async (name) => {
    // nvme1c2n3 is the path of nvme1n3 over controller nvme2.
    const [, subsystem, instance, namespace] = /^nvme(\d+)c(\d+)n(\d+)$/.exec(name) ?? [];
    const controller = controllers.find((controller) => controller.name === `nvme${instance}`);
    if (controller === undefined) return [];
    const anaState = await attribute(host, `class/block/${name}/ana_state`);
    return [{ controller, anaState, device: `nvme${subsystem}n${namespace}` }];
  }));
  return paths.flat();
}

/** The paths of a device over `controllers`, by controller name. Does not touch the device. */
export async function pathsOf(
  host: Host,
  device: BlockDevice,
  controllers: readonly NvmeController[],
): Promise<readonly NamespacePath[]> {
  const found = (await allPaths(host, controllers)).filter((path) => path.device === device.name)
    .map(({ controller, anaState }) => ({ controller, anaState }));
  // Without native multipath there are no such entries, and the device hangs on its one controller.
  return found.length > 0 ? found : controllers
    .filter((controller) => controller.subsystemNqn === device.subsystemNqn)
    .map((controller) => ({ controller, anaState: undefined }));
}

/** Whether reads and writes get through on this path now. */
export function isLivePath({ controller, anaState }: NamespacePath): boolean {
  return controller.state === "live" && (anaState === undefined || /optimized$/.test(anaState));
}

/**
 * Whether some namespace has no live path but over this controller, those over `others` counted. Without native multipath
 * the kernel shows no paths, and nobody is needed.
 */
export async function isNeeded(
  host: Host,
  controller: NvmeController,
  others: readonly NvmeController[],
): Promise<boolean> {
  const names = await host.list(`${host.roots.sysfs}/class/block`) ?? [];
  const live = new Set(others.filter(({ state }) => state === "live").map(({ name }) => name));
  // nvme1c2n3 is the path of nvme1n3 over controller nvme2.
  const paths = names.flatMap((name) => {
    const [, subsystem = "", instance = "", namespace = ""] = /^nvme(\d+)c(\d+)n(\d+)$/.exec(name) ?? [];
    return subsystem === "" ? [] : [{ name, controller: `nvme${instance}`, device: `nvme${subsystem}n${namespace}` }];
  });
  for (const { device } of paths.filter((path) => path.controller === controller.name)) {
    let isCarried = false;
    for (const path of paths) {
      if (path.device !== device || !live.has(path.controller)) continue;
      const state = await host.readText(`${host.roots.sysfs}/class/block/${path.name}/ana_state`);
      isCarried ||= state !== undefined && /optimized$/.test(state.trim());
    }
    if (!isCarried) return true;
  }
  return false;
}

/**
 * Throws UNAVAILABLE when no path of the device is live. Whoever touches it then waits in the kernel, where no signal
 * reaches him, until a path comes back or the kernel gives the connection up (`ctrl_loss_tmo`; with live connections whose
 * ANA state is inaccessible, never). Shows sysfs nothing of its connections, that is no reason to refuse.
 */
export async function refuseWithoutPath(host: Host, device: BlockDevice, action: string): Promise<void> {
  const bare = device.encrypts === undefined ? device : device.encrypts.beneath;
  const paths = bare === undefined ? [] : await pathsOf(host, bare, await controllersOf(host, bare.subsystemNqn));
  if (paths.length === 0 || paths.some(isLivePath)) return;
  const states = paths.map((path) => {
    const { name, state } = path.controller;
    return `${name} ${state}${state === "live" ? `, ${path.anaState}` : ""}`;
  });
  throw new StatusError(
    "UNAVAILABLE",
    `Cannot ${action}: ${device.path} has no live path (${
      states.join("; ")
    }), what was not yet written waits for one; ` +
      `it goes on when a path comes back, or without what was not written when the kernel gives up (ctrl_loss_tmo)`,
  );
}

/** The traddr and trsvcid in a controller's address. */
export function addressOf(controller: NvmeController): TransportAddress | undefined {
  const fields = new Map(
    controller.address.split(",").map((field) => {
      const equals = field.indexOf("=");
      return [field.slice(0, equals), field.slice(equals + 1)] as const;
    }),
  );
  const traddr = fields.get("traddr");
  const trsvcid = fields.get("trsvcid");
  return traddr === undefined || trsvcid === undefined ? undefined : { traddr, trsvcid };
}

/** Whether a controller is a connection to `address`. */
export function isAt(controller: NvmeController, address: TransportAddress): boolean {
  const at = addressOf(controller);
  return at !== undefined && at.trsvcid === address.trsvcid && canonical(at.traddr) === canonical(address.traddr);
}

/** IPv6 has many spellings of one address. */
function canonical(traddr: string): string {
  if (!traddr.includes(":")) return traddr;
  const [plain = "", zone] = traddr.split("%");
  const url = URL.parse(`http://[${plain}]`);
  return `${url === null ? plain.toLowerCase() : url.hostname}${zone === undefined ? "" : `%${zone}`}`;
}

/** Whether a controller works or heals by itself, as a connecting one does; one that is being deleted never does. */
export function isUsable(controller: NvmeController): boolean {
  return !controller.state.startsWith("deleting") && controller.state !== "dead";
}
// A cluster announces a namespace within 0.3 s where it was measured; then the kernel is asked to look.
const announcedMs = 2000;
const rescanEveryMs = 15_000;

export interface WaitOptions {
  /** Only a namespace of this subsystem will do. */
  readonly subsystemNqn?: string | undefined;
  /** What to look at when the device does not come. */
  readonly hint: string;
  readonly pollMs?: number;
}

/**
 * The block device with this namespace UUID and its node in the directory of devices, as soon as both are there: sysfs is
 * polled and the directory is watched, until `ctx.signal` aborts.
 *
 * @throws StatusError UNAVAILABLE at the deadline, saying what is there instead and what to look at; FAILED_PRECONDITION
 *   as findDevice
 */
export async function waitForDevice(
  host: Host,
  ctx: RequestContext,
  uuid: string,
  options: WaitOptions,
): Promise<BlockDevice> {
  const ready = async () => {
    const device = await findDevice(host, uuid, options.subsystemNqn);
    if (device === undefined) return undefined;
    return await host.blockNumber(device.path) === device.number && device.sizeBytes > 0n ? device : undefined;
  };
  const here = await ready();
  if (here !== undefined) return here;
  const started = performance.now();
  // Watches before it looks again, or it would miss what came in between.
  const bell = new Bell();
  using _watch = host.watch(host.roots.dev, () => bell.ring());
  let rescanAtMs = announcedMs;
  for (;;) {
    const device = await ready();
    if (device !== undefined) {
      ctx.log.debug("device arrived", { device: device.path, ms: Math.round(performance.now() - started) });
      return device;
    }
    if (options.subsystemNqn !== undefined && performance.now() - started >= rescanAtMs) {
      // The announcement of the namespace may be lost, as after a change of the access list during a reconnect. Each
      // connection has announcements of its own, and it may be on one alone that the namespace is shown.
      rescanAtMs += rescanEveryMs;
      await rescanAll(host, ctx, options.subsystemNqn);
    }
    try {
      await bell.wait(options.pollMs ?? 100, ctx.signal);
    } catch (error) {
      if (hasCode(error, "CANCELLED")) throw error;
      const seconds = Math.round((performance.now() - started) / 1000);
      throw new StatusError(
        "UNAVAILABLE",
        `Cannot find a block device of namespace ${uuid} after ${seconds} s: ` +
          `${await describeAbsence(host, uuid, options.subsystemNqn)}; ${options.hint}`,
        { cause: error },
      );
    }
  }
}

/**
 * The same device read again; use it before each step that would hurt another namespace.
 *
 * @throws StatusError UNAVAILABLE when its name is gone, or now belongs to another namespace or number
 */
export async function recheckDevice(host: Host, device: BlockDevice, action: string): Promise<BlockDevice> {
  const refuse = (problem: string) =>
    new StatusError("UNAVAILABLE", `Cannot ${action}: ${problem}, namespace ${device.uuid} has to be found again`);
  if (device.encrypts !== undefined) {
    const mapper = await findMapper(host, device.uuid);
    if (mapper === undefined) throw refuse(`${device.encrypts.name} has been closed`);
    if (mapper.number !== device.number) throw refuse(`${device.encrypts.name} has become device ${mapper.number}`);
    if (mapper.encrypts?.beneath === undefined) throw refuse(`${device.encrypts.name} has lost its device`);
    await recheckDevice(host, mapper.encrypts.beneath, action);
    return mapper;
  }
  const now = await readDevice(host, device.name);
  if (now === undefined) throw refuse(`${device.path} is gone`);
  if (now.uuid !== device.uuid || now.subsystemNqn !== device.subsystemNqn) {
    throw refuse(`${device.path} is ${describeDevice(now)} now`);
  }
  if (now.number !== device.number) throw refuse(`${device.path} has become device ${now.number}`);
  const node = await host.blockNumber(device.path);
  if (node !== now.number) {
    throw refuse(`the node ${device.path} is device ${node ?? "none"}, sysfs says ${now.number}`);
  }
  return now;
}

/**
 * Asks the kernel to look at the namespaces of a subsystem again over one live controller: at their sizes, most of all. At
 * best effort, for the kernel does so by itself when the cluster announces a change.
 */
export async function rescanNamespaces(host: Host, ctx: RequestContext, subsystemNqn: string): Promise<void> {
  for (const controller of await controllersOf(host, subsystemNqn)) {
    if (controller.state !== "live") continue;
    const problem = await rescanController(host, ctx, controller);
    if (problem === undefined) return;
    ctx.log.warning("could not rescan", { device: `${host.roots.dev}/${controller.name}`, error: problem });
  }
}

/** The same over every live controller: for namespaces that are missing, for which one controller does not speak for all. */
async function rescanAll(host: Host, ctx: RequestContext, subsystemNqn: string): Promise<void> {
  for (const controller of await controllersOf(host, subsystemNqn)) {
    if (controller.state !== "live") continue;
    const problem = await rescanController(host, ctx, controller);
    if (problem === undefined) continue;
    ctx.log.warning("could not rescan", { device: `${host.roots.dev}/${controller.name}`, error: problem });
  }
}

/** Asks the kernel to look again at the namespaces that one live controller shows; answers why not, or undefined. */
export async function rescanController(
  host: Host,
  ctx: RequestContext,
  { name }: NvmeController,
): Promise<string | undefined> {
  return await runNvme(host, ctx, ["ns-rescan", `${host.roots.dev}/${name}`], "finish");
}

/**
 * Makes the kernel connect a live controller again, under its name. What is on its way over it fails over to other paths,
 * or waits. Until it is live again or that has failed, it blocks; a signal that aborts lets it go on in the kernel.
 *
 * @returns why it failed, or undefined
 */
export async function resetController(
  host: Host,
  ctx: RequestContext,
  { name }: NvmeController,
): Promise<string | undefined> {
  return await runNvme(host, ctx, ["reset", `${host.roots.dev}/${name}`], "kill");
}

async function runNvme(
  host: Host,
  ctx: RequestContext,
  args: readonly string[],
  onAbort: "kill" | "finish",
): Promise<string | undefined> {
  try {
    const result = await host.run("nvme", args, { signal: ctx.signal, onAbort, log: ctx.log });
    return result.code === 0 ? undefined : `exit ${result.code} ${wordsOf(result)}`.trim();
  } catch (error) {
    ctx.signal.throwIfAborted();
    return messageOf(error);
  }
}

/** How the kernel treats a connection; what is undefined is the kernel's own choice. */
export interface ConnectionTuning {
  /** After how many seconds without a connection the kernel gives it up, -1: never. The kernel's own choice is 600. */
  readonly controllerLossSeconds?: number | undefined;
  /** Between attempts to connect again. The kernel's own choice is 10. */
  readonly reconnectDelaySeconds?: number | undefined;
  /** After how much silence the connection counts as lost. The kernel's own choice is 5. */
  readonly keepAliveSeconds?: number | undefined;
  /** After how long without a connection I/O fails instead of waiting. The kernel's own choice is never. */
  readonly fastIoFailSeconds?: number | undefined;
  /** The kernel's own choice is one for each processor. */
  readonly ioQueues?: number | undefined;
  /** Commands per queue. The kernel's own choice is 128. */
  readonly queueSize?: number | undefined;
}

export interface ConnectWish extends ConnectionTuning {
  readonly address: TransportAddress;
  readonly subsystemNqn: string;
  readonly hostNqn: string;
  readonly hostId: string;
}

/**
 * Connects to one I/O controller, or with discoveryNqn to a discovery controller, which then stays connected. Connected
 * already under these host names: done. Connections of other host NQNs to the same address do not count, and stay.
 *
 * It is `nvme connect`, and the kernel itself where nvme-cli takes another connection for this one, or does not say why it
 * failed (fabrics.ts).
 *
 * @returns undefined, or why it failed, in words for an error message
 * @throws StatusError FAILED_PRECONDITION when nvme-cli is missing; `ctx.signal.reason` when that has aborted
 */
export async function connectController(
  host: Host,
  ctx: RequestContext,
  wish: ConnectWish,
): Promise<string | undefined> {
  const { address, subsystemNqn, hostNqn, hostId, ...tuning } = wish;
  const settings = {
    "ctrl-loss-tmo": tuning.controllerLossSeconds,
    "reconnect-delay": tuning.reconnectDelaySeconds,
    "keep-alive-tmo": tuning.keepAliveSeconds,
    "nr-io-queues": tuning.ioQueues,
    "queue-size": tuning.queueSize,
  };
  // Both host names are always given: without them nvme-cli takes a random host ID each time.
  const result = await host.run("nvme", [
    "connect",
    "--transport=tcp",
    `--traddr=${address.traddr}`,
    `--trsvcid=${address.trsvcid}`,
    `--nqn=${subsystemNqn}`,
    `--hostnqn=${hostNqn}`,
    `--hostid=${hostId}`,
    ...Object.entries(settings).flatMap(([name, value]) => value === undefined ? [] : [`--${name}=${value}`]),
  ], { signal: ctx.signal, onAbort: "finish", log: ctx.log });
  if (result.code === 0) {
    if (tuning.fastIoFailSeconds !== undefined) {
      await setFastIoFail(host, ctx, subsystemNqn, hostNqn, address, tuning.fastIoFailSeconds);
    }
    return undefined;
  }
  const text = wordsOf(result);
  if (/already connected|already in progress/i.test(text)) return await connectBeside(host, ctx, wish);
  // All that nvme-cli 2.11 to 2.16 say of most of the kernel's answers.
  if (/failed to write to nvme-fabrics device$/i.test(text) && !/\/nvme-fabrics: \S/.test(text)) {
    const answer = await connectUnlessConnected(host, ctx, wish);
    if (answer === undefined) return undefined;
    // Without the device, nvme-cli knows more than the kernel.
    if (answer.number !== undefined && answer.number !== 2) return describeConnectFailure(answer.text, hostNqn);
    return `${text}; the kernel log (dmesg) tells why`;
  }
  return text === "" ? `nvme connect exits ${result.code}` : describeConnectFailure(text, hostNqn);
}

/** After nvme-cli has found a connection: done if it is ours and works, otherwise the kernel is asked for one beside it. */
async function connectBeside(host: Host, ctx: RequestContext, wish: ConnectWish): Promise<string | undefined> {
  const there = (await controllersOf(host, wish.subsystemNqn)).filter((controller) => isAt(controller, wish.address));
  const isOurs = (controller: NvmeController) => controller.hostNqn === wish.hostNqn;
  const other = there.find((controller) => !isOurs(controller)) ?? there[0];
  // None at all: it came in between, and goes or shows soon.
  if (other === undefined || there.some((controller) => isOurs(controller) && isUsable(controller))) return undefined;
  const answer = await connectUnlessConnected(host, ctx, wish);
  if (answer === undefined) return undefined;
  const reason = describeConnectFailure(answer.text, wish.hostNqn);
  return isOurs(other)
    ? `${other.name} is ${other.state} there, and no other connection could be made beside it (${reason})`
    : `${other.name} is connected there as host ${other.hostNqn}, disconnect it first (${reason})`;
}

/** One connection by the kernel itself; undefined: it is there. */
async function connectUnlessConnected(
  host: Host,
  ctx: RequestContext,
  wish: ConnectWish,
): Promise<{ readonly text: string; readonly number: number | undefined } | undefined> {
  ctx.signal.throwIfAborted();
  const facts = { subsystem: wish.subsystemNqn, address: formatAddress(wish.address) };
  try {
    const name = await connectByKernel(host, wish);
    ctx.log.info("connected without nvme-cli", { ...facts, ...(name === undefined ? {} : { name }) });
    return undefined;
  } catch (error) {
    const text = messageOf(error);
    ctx.log.info("could not connect without nvme-cli", { ...facts, error: text });
    return { text, number: kernelErrorNumber(error) };
  }
}

/** What a tool says about its failure, in one line; nvme-cli 2.13 says some of it on its standard output. */
function wordsOf({ stdout, stderr }: CommandResult): string {
  const text = stderr.trim() === "" ? stdout : stderr;
  return text.trim().replace(/\s*\n\s*/g, "; ").slice(0, 1000);
}

/** nvme-cli 2.3 has no option for it, sysfs has. At best effort: the connection is there and works without. */
async function setFastIoFail(
  host: Host,
  ctx: RequestContext,
  subsystemNqn: string,
  hostNqn: string,
  address: TransportAddress,
  seconds: number,
): Promise<void> {
  for (const controller of await controllersOf(host, subsystemNqn)) {
    if (controller.hostNqn !== hostNqn || !isAt(controller, address)) continue;
    const path = `${host.roots.sysfs}/class/nvme/${controller.name}/fast_io_fail_tmo`;
    try {
      await host.writeAttribute(path, String(seconds));
    } catch (error) {
      ctx.log.warning("could not set fast_io_fail_tmo", { path, error: messageOf(error) });
    }
  }
}

/**
 * `nvme disconnect` of one controller. Not connected, or its name is that of another connection by now: done.
 *
 * @throws StatusError UNAVAILABLE with nvme-cli's words
 */
export async function disconnectController(
  host: Host,
  ctx: RequestContext,
  controller: NvmeController,
): Promise<void> {
  // Names are used anew, and a disconnect of the one before can have taken a minute.
  if (!isSameController(await readController(host, controller.name), controller)) return;
  const result = await host.run("nvme", ["disconnect", `--device=${controller.name}`], {
    signal: ctx.signal,
    onAbort: "finish",
    log: ctx.log,
  });
  // nvme-cli 2.3 to 2.16 exit with 0 also when the kernel refused, and say so.
  if (result.code === 0 && !/failed to disconnect/i.test(result.stderr)) return;
  // It was gone before nvme-cli came to it.
  if (!isSameController(await readController(host, controller.name), controller)) return;
  throw new StatusError(
    "UNAVAILABLE",
    `Cannot disconnect ${controller.name} from ${controller.subsystemNqn}: ${
      wordsOf(result) || `nvme exits ${result.code}`
    }`,
  );
}

/** Whether what a name stands for now is still this connection. */
export function isSameController(now: NvmeController | undefined, controller: NvmeController): boolean {
  const address = addressOf(controller);
  return now !== undefined && now.subsystemNqn === controller.subsystemNqn && now.hostNqn === controller.hostNqn &&
    (address === undefined || isAt(now, address));
}

/** What a discovery controller tells. */
export interface DiscoveryLog {
  /** Changes with its content. */
  readonly generation: bigint;
  /** I/O controllers that it offers to this host NQN, over TCP. */
  readonly controllers: readonly { readonly subsystemNqn: string; readonly address: TransportAddress }[];
  /** Other discovery controllers, over TCP. */
  readonly referrals: readonly TransportAddress[];
}

const discoverySchema = z.object({
  genctr: z.number().int().nonnegative(),
  records: z.array(z.object({
    trtype: z.string(),
    subtype: z.string(),
    trsvcid: z.string(),
    subnqn: z.string(),
    traddr: z.string(),
  })),
});

/**
 * Reads the discovery log page over a connection that is there: it takes the ioctl of nvme-cli, sysfs does not show it.
 *
 * @param controller a live discovery controller; nvme-cli does not wait for one that is connecting
 * @throws StatusError UNAVAILABLE when it cannot be read, INTERNAL when nvme-cli's answer cannot
 */
export async function readDiscoveryLog(
  host: Host,
  ctx: RequestContext,
  controller: NvmeController,
): Promise<DiscoveryLog> {
  const action = `read the discovery log page over ${controller.name} (${controller.address})`;
  const result = await host.run("nvme", ["discover", `--device=${controller.name}`, "--output-format=json"], {
    signal: ctx.signal,
    onAbort: "kill",
    log: ctx.log,
  });
  if (result.code !== 0) {
    throw new StatusError("UNAVAILABLE", `Cannot ${action}: ${wordsOf(result) || `nvme exits ${result.code}`}`);
  }
  let json: unknown;
  try {
    json = JSON.parse(result.stdout);
  } catch (error) {
    throw new StatusError("INTERNAL", `Cannot ${action}: nvme-cli's answer is not JSON`, { cause: error });
  }
  const parsed = discoverySchema.safeParse(json);
  if (!parsed.success) {
    const problems = parsed.error.issues.map(({ path, message }) => `${path.join(".")}: ${message}`).join("; ");
    throw new StatusError("INTERNAL", `Cannot ${action}: nvme-cli's answer is not understood (${problems})`);
  }
  const records = parsed.data.records.filter(({ trtype }) => trtype === "tcp").flatMap((record) => {
    // Padded with blanks by some targets, as the page's fields are of fixed length.
    const text = record.traddr.trim();
    const address = parseAddress(formatAddress({ traddr: text, trsvcid: record.trsvcid.trim() }));
    return address === undefined ? [] : [{ subtype: record.subtype, subsystemNqn: record.subnqn.trim(), address }];
  });
  return {
    generation: BigInt(parsed.data.genctr),
    controllers: records.filter(({ subtype }) => subtype === "nvme subsystem")
      .map(({ subsystemNqn, address }) => ({ subsystemNqn, address })),
    referrals: records.filter(({ subtype }) => subtype === "discovery subsystem referral")
      .map(({ address }) => address),
  };
}

/** `nvme0n1 (namespace <uuid> of <subsystem NQN>)`. */
export function describeDevice(device: BlockDevice): string {
  return `${device.name} (namespace ${device.uuid} of ${device.subsystemNqn})`;
}

/** A UUID (version 8, RFC 9562) that depends on `name` alone. */
export function nameUuid(name: string): string {
  const bytes = createHash("sha256").update(name).digest().subarray(0, 16);
  bytes[6] = ((bytes[6] ?? 0) & 0x0f) | 0x80;
  bytes[8] = ((bytes[8] ?? 0) & 0x3f) | 0x80;
  return bytes.toString("hex").replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

async function devicesWithUuid(host: Host, uuid: string): Promise<readonly BlockDevice[]> {
  const found: BlockDevice[] = [];
  for (const name of await namespaceNames(host)) {
    // One file tells most devices apart; the rest is read of the right one only.
    if (await readUuid(host, name) !== uuid.toLowerCase()) continue;
    const device = await readDevice(host, name);
    if (device !== undefined) found.push(device);
  }
  return found;
}

async function namespaceNames(host: Host): Promise<readonly string[]> {
  // Neither paths (nvme0c1n1) nor partitions (nvme0n1p1).
  return (await host.list(`${host.roots.sysfs}/class/block`) ?? []).filter((name) => /^nvme\d+n\d+$/.test(name));
}

async function readUuid(host: Host, name: string): Promise<string | undefined> {
  const wwid = await attribute(host, `class/block/${name}/wwid`);
  return wwid?.startsWith("uuid.") ? wwid.slice("uuid.".length).toLowerCase() : undefined;
}

async function readDevice(host: Host, name: string): Promise<BlockDevice | undefined> {
  const base = `class/block/${name}`;
  const [uuid, number, size, hidden, ro, nqn] = await Promise.all([
    readUuid(host, name),
    attribute(host, `${base}/dev`),
    attribute(host, `${base}/size`),
    attribute(host, `${base}/hidden`),
    attribute(host, `${base}/ro`),
    attribute(host, `${base}/device/subsysnqn`),
  ]);
  // A device on its way out loses its files one by one; then it is not there.
  if (uuid === undefined || number === undefined || size === undefined || nqn === undefined) return undefined;
  if (hidden === "1" || !/^\d+$/.test(size)) return undefined;
  return {
    name,
    path: `${host.roots.dev}/${name}`,
    number,
    uuid,
    subsystemNqn: nqn,
    // The kernel counts in 512 bytes whatever the device's own sectors are.
    sizeBytes: BigInt(size) * 512n,
    readOnly: ro === "1",
  };
}

async function readController(host: Host, name: string): Promise<NvmeController | undefined> {
  const base = `class/nvme/${name}`;
  const [subsystemNqn, state, hostNqn, hostId, type, transport, address] = await Promise.all([
    attribute(host, `${base}/subsysnqn`),
    attribute(host, `${base}/state`),
    attribute(host, `${base}/hostnqn`),
    attribute(host, `${base}/hostid`),
    attribute(host, `${base}/cntrltype`),
    attribute(host, `${base}/transport`),
    attribute(host, `${base}/address`),
  ]);
  if (subsystemNqn === undefined || state === undefined) return undefined;
  return {
    name,
    subsystemNqn,
    state,
    hostNqn: hostNqn ?? "",
    hostId: hostId ?? "",
    isDiscovery: type === "discovery" || subsystemNqn === discoveryNqn,
    transport: transport ?? "",
    address: address ?? "",
  };
}

async function attribute(host: Host, path: string): Promise<string | undefined> {
  try {
    return (await host.readText(`${host.roots.sysfs}/${path}`))?.trim();
  } catch (error) {
    // An attribute of a device that is being removed answers ENODEV or EIO.
    if (/No such device|os error (5|19)\b/.test(messageOf(error))) return undefined;
    throw error;
  }
}

async function describeAbsence(host: Host, uuid: string, subsystemNqn: string | undefined): Promise<string> {
  const elsewhere = await devicesWithUuid(host, uuid);
  const other = elsewhere.find((device) => device.subsystemNqn !== subsystemNqn);
  if (subsystemNqn !== undefined && other !== undefined) {
    return `${describeDevice(other)} has this UUID, but belongs to another subsystem than ${subsystemNqn}`;
  }
  const device = elsewhere[0];
  if (device !== undefined) {
    if (device.sizeBytes === 0n) return `sysfs has ${device.name}, but its size is zero`;
    const node = await host.blockNumber(device.path);
    return `sysfs has ${device.name} as device ${device.number}, but the node ${device.path} is ` +
      `${node === undefined ? "missing" : `device ${node}`}`;
  }
  if (await host.list(`${host.roots.sysfs}/class/nvme`) === undefined) {
    return `this machine has no NVMe controllers at all, the kernel module nvme_tcp is needed`;
  }
  if (subsystemNqn === undefined) return "sysfs has no such namespace";
  const controllers = await controllersOf(host, subsystemNqn);
  if (controllers.length === 0) return `this machine has no connection to ${subsystemNqn}`;
  const list = controllers.map((controller) => {
    const address = addressOf(controller);
    return `${controller.name} to ${
      address === undefined ? controller.address : formatAddress(address)
    } is ${controller.state}`;
  });
  return `of ${subsystemNqn}, ${list.join(", ")}, but it shows no such namespace to this host`;
}

/** Wakes one waiter; a ring while nobody waits is kept for the next. */
class Bell {
  #rung = false;
  #wake: (() => void) | undefined;
  #end: (() => void) | undefined;

  ring(): void {
    this.#rung = true;
    this.#wake?.();
  }

  /** Resolves at the next ring or after `ms`; rejects with `signal.reason`. */
  wait(ms: number, signal: AbortSignal): Promise<void> {
    return new Promise<void>((resolve, reject) => {
      if (signal.aborted) return reject(signal.reason);
      const timer = setTimeout(resolve, this.#rung ? 0 : ms);
      this.#wake = resolve;
      const giveUp = () => reject(signal.reason);
      signal.addEventListener("abort", giveUp, { once: true });
      this.#end = () => {
        clearTimeout(timer);
        signal.removeEventListener("abort", giveUp);
      };
    }).finally(() => {
      this.#end?.();
      this.#rung = false;
      this.#wake = undefined;
    });
  }
}

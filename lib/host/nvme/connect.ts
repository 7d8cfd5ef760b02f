/** Connects I/O controllers of subsystems, resets and disconnects them. */
import type { RequestContext } from "../../context.ts";
import { messageOf, StatusError } from "../../error.ts";
import { formatAddress, type TransportAddress } from "../../namespace.ts";
import type { Host } from "../host.ts";
import { connectByKernel, describeConnectFailure, kernelErrorNumber } from "./fabrics.ts";
import { runNvme, wordsOf } from "./nvme_cli.ts";
import { addressOf, controllersOf, isAt, isUsable, type NvmeController, readController } from "./sysfs.ts";

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

export interface ConnectOptions extends ConnectionTuning {
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
  wish: ConnectOptions,
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
async function connectBeside(host: Host, ctx: RequestContext, wish: ConnectOptions): Promise<string | undefined> {
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
  wish: ConnectOptions,
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

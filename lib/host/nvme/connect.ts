/** Connects I/O controllers of subsystems, resets and disconnects them. */
import type { RequestContext } from "../../context.ts";
import { messageOf } from "../../error.ts";
import { formatAddress, type TransportAddress } from "../../namespace.ts";
import type { Host } from "../host.ts";
import type { ConnectOptions } from "./connect_options.ts";
import { controllersOf, isAt, isUsable, type NvmeController } from "./controllers.ts";
import { connectByKernel, describeConnectFailure, kernelErrorNumber } from "./fabrics.ts";
import { wordsOf } from "./nvme_cli.ts";

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

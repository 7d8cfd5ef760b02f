/** Makes the arguments of `nvme connect` and runs it; fabrics.ts is the kernel's own way. */
import type { RequestContext } from "../../context.ts";
import { messageOf } from "../../error.ts";
import { formatAddress } from "../../namespace.ts";
import type { Host } from "../host.ts";
import type { ConnectOptions } from "./connect_options.ts";
import { controllersOf, isAt, isUsable, type NvmeController } from "./controllers.ts";
import { connectByKernel, describeConnectFailure, kernelErrorNumber } from "./fabrics.ts";
import { wordsOf } from "./nvme_cli.ts";

/**
 * Connects to one I/O controller, or with discoveryNqn to a discovery controller, which then stays connected. Does nothing
 * when it is connected already under these host names. Connections of other host NQNs to the same address do not count.
 *
 * Runs `nvme connect`, and asks the kernel itself (fabrics.ts) where nvme-cli takes another connection for this one, or
 * does not say why it failed.
 *
 * @returns undefined, or why it failed, in words for an error message
 * @throws StatusError FAILED_PRECONDITION when nvme-cli is missing; `ctx.signal.reason` when that has aborted
 */
export async function connectController(
  host: Host,
  ctx: RequestContext,
  options: ConnectOptions,
): Promise<string | undefined> {
  const { address, subsystemNqn, hostNqn, hostId, ...tuning } = options;
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
      await setFastIoFail(host, ctx, options, tuning.fastIoFailSeconds);
    }
    return undefined;
  }
  const text = wordsOf(result);
  if (/already connected|already in progress/i.test(text)) return await connectBeside(host, ctx, options);
  // nvme-cli 2.11 to 2.16 say nothing more for most of the kernel's errors.
  if (/failed to write to nvme-fabrics device$/i.test(text) && !/\/nvme-fabrics: \S/.test(text)) {
    const answer = await connectUnlessConnected(host, ctx, options);
    if (answer === undefined) return undefined;
    // Without the device, nvme-cli knows more than the kernel.
    if (answer.number !== undefined && answer.number !== 2) return describeConnectFailure(answer.text, hostNqn);
    return `${text}; the kernel log (dmesg) tells why`;
  }
  return text === "" ? `nvme connect exits ${result.code}` : describeConnectFailure(text, hostNqn);
}

/** After nvme-cli has found a connection: does nothing if it is ours and works, else asks the kernel for one beside it. */
async function connectBeside(host: Host, ctx: RequestContext, options: ConnectOptions): Promise<string | undefined> {
  const there = (await controllersOf(host, options.subsystemNqn)).filter((controller) =>
    isAt(controller, options.address)
  );
  const isOurs = (controller: NvmeController) => controller.hostNqn === options.hostNqn;
  const other = there.find((controller) => !isOurs(controller)) ?? there[0];
  // None at all: it was made in between, and is removed or visible soon.
  if (other === undefined || there.some((controller) => isOurs(controller) && isUsable(controller))) return undefined;
  const answer = await connectUnlessConnected(host, ctx, options);
  if (answer === undefined) return undefined;
  const reason = describeConnectFailure(answer.text, options.hostNqn);
  return isOurs(other)
    ? `${other.name} is ${other.state} there, and no other connection could be made beside it (${reason})`
    : `${other.name} is connected there as host ${other.hostNqn}, disconnect it first (${reason})`;
}

/** Makes one connection through the kernel; returns why it failed, or undefined. */
async function connectUnlessConnected(
  host: Host,
  ctx: RequestContext,
  options: ConnectOptions,
): Promise<{ readonly text: string; readonly number: number | undefined } | undefined> {
  ctx.signal.throwIfAborted();
  const facts = { subsystem: options.subsystemNqn, address: formatAddress(options.address) };
  try {
    const name = await connectByKernel(host, options);
    ctx.log.info("connected without nvme-cli", { ...facts, ...(name === undefined ? {} : { name }) });
    return undefined;
  } catch (error) {
    const text = messageOf(error);
    ctx.log.info("could not connect without nvme-cli", { ...facts, error: text });
    return { text, number: kernelErrorNumber(error) };
  }
}

/** Sets in sysfs what nvme-cli 2.3 has no option for. A failure is logged only, because the connection works without it. */
async function setFastIoFail(
  host: Host,
  ctx: RequestContext,
  { subsystemNqn, hostNqn, address }: ConnectOptions,
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

/** Applies the remedies that connection_watch.ts finds due, and logs them. */
import { sleep, timeLimit } from "../../timing.ts";
import { type RequestContext, requestContext } from "../../context.ts";
import { messageOf } from "../../error.ts";
import type { Host } from "../host.ts";
import { addressText, carries, readConnectionView } from "./connection_view.ts";
import { addressOf, controllersOf, isAt, type NvmeController } from "./controllers.ts";
import { disconnectController, isSameController, resetController } from "./disconnect.ts";
import { isNeeded } from "./paths.ts";
import { rescanController } from "./rescan.ts";

/** What is to be done about a connection. */
export interface Remedy {
  readonly kind: "rescan" | "reset" | "reconnect";
  readonly controller: NvmeController;
  /** What is wrong, for the log. */
  readonly reason: string;
  /** Whether it is not tried again as long as the same thing is wrong. */
  readonly isLast: boolean;
}

/**
 * Applies a remedy and logs it. Does nothing when the controller is another one or has another state by now.
 *
 * @param connectBeside makes another connection to the controller's address; returns why it failed, or undefined
 * @throws only the reason of `ctx.signal`
 */
export async function applyRemedy(
  host: Host,
  ctx: RequestContext,
  remedy: Remedy,
  connectBeside: (ctx: RequestContext) => Promise<string | undefined>,
): Promise<void> {
  const { kind, controller, reason, isLast } = remedy;
  const facts = { subsystem: controller.subsystemNqn, name: controller.name, address: addressText(controller) };
  const view = await readConnectionView(host);
  const now = view.controllers.find(({ name }) => name === controller.name);
  if (now === undefined || !isSameController(now, controller) || now.state !== controller.state) return;
  if (kind === "reset" && carries(view, now)) return;
  // Servers are away now and then, which is no reason for a warning; a live connection without a usable path is.
  ctx.log[kind === "reset" ? "warning" : "info"](events[kind], { ...facts, error: reason });
  let problem: string | undefined;
  try {
    if (kind === "rescan") problem = await rescanController(host, ctx, now);
    else if (kind === "reset") {
      using limit = timeLimit(ctx.signal, resetLimitMs);
      problem = await resetController(host, requestContext(limit.signal, ctx.deadline, ctx.log, ctx.action), now);
    } else {
      problem = await connectBeside(ctx);
      if (problem === undefined) await dropWhenReplaced(host, ctx, now);
    }
  } catch (error) {
    ctx.signal.throwIfAborted();
    problem = messageOf(error);
  }
  if (problem !== undefined) ctx.log.info("could not heal a connection", { ...facts, error: problem });
  if (!isLast) return;
  ctx.log.warning("does no more about this connection unless something else goes wrong with it", {
    ...facts,
    error: `${reason}; see that the cluster shows this host its namespaces, and the kernel log (dmesg)`,
  });
}

const resetLimitMs = 90_000;
const takeOverMs = 5000;

const events = {
  rescan: "asks for the namespaces of a connection again",
  reset: "resets a connection that gives no usable path",
  reconnect: "connects beside a connection that does not come back",
} as const;

/**
 * Drops a controller once live ones of the same host carry all its namespaces. It stays when it has come back meanwhile, or
 * is in a state in which the kernel may not release it.
 */
async function dropWhenReplaced(host: Host, ctx: RequestContext, old: NvmeController): Promise<void> {
  const giveUpAt = performance.now() + takeOverMs;
  for (;;) {
    const ours = (await controllersOf(host, old.subsystemNqn)).filter(({ hostNqn }) => hostNqn === old.hostNqn);
    const now = ours.find(({ name }) => name === old.name);
    if (now === undefined || !isSameController(now, old) || now.state !== "connecting") return;
    const address = addressOf(now);
    const others = ours.filter((other) => other.name !== now.name && other.state === "live");
    const isReplaced = address !== undefined && others.some((other) => isAt(other, address));
    if (isReplaced && !await isNeeded(host, now, others)) return await disconnectController(host, ctx, now);
    if (performance.now() >= giveUpAt) return;
    await sleep(50, ctx.signal);
  }
}

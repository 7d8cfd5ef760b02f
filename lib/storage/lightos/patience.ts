/** How long to wait for a management endpoint, and how to notice one that has gone silent. */
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import { DurosAPI } from "../../../proto/gen/lightos_pb.ts";
import { sleep, timeLimit } from "../../timing.ts";
import type { RequestContext } from "../../context.ts";
import { CallError, type CallOptions, type Channel } from "../../grpc/client.ts";

/** How long to wait for an endpoint that gives no sign of life, while there are others. */
export const silenceMs = 3000;

/** How long to wait for an endpoint; one that has gone silent must not use up the time of the others. */
export function patienceFor({ deadline }: RequestContext, hasOthers: boolean): number {
  const leftMs = Math.max(1, deadline.getTime() - Date.now());
  return hasOthers ? Math.min(silenceMs, Math.max(1000, leftMs / 2)) : Math.max(1000, leftMs);
}

/**
 * The result of the first of these attempts that ends; undefined when none has after `waitMs`.
 *
 * @param waitMs undefined: without limit
 * @throws what the attempt throws; without attempts `signal.reason` when it aborts
 */
export async function firstOf<T>(
  attempts: readonly Promise<T>[],
  waitMs: number | undefined,
  signal: AbortSignal,
): Promise<T | undefined> {
  if (waitMs === undefined) return await Promise.race(attempts);
  if (attempts.length === 0) return await sleep(waitMs, signal).then(() => undefined);
  let timer: ReturnType<typeof setTimeout> | undefined;
  try {
    return await Promise.race([
      ...attempts,
      new Promise<undefined>((resolve) => timer = setTimeout(() => resolve(undefined), waitMs)),
    ]);
  } finally {
    clearTimeout(timer);
  }
}

/**
 * Sends a change and waits for its answer as long as the server gives signs of life: a change may take its time, and a
 * server that has gone silent must not use up the time of the others.
 *
 * @param options `patienceMs` is how long the server may give no sign of life
 * @throws what `Channel.call` throws; DOMException when the server is silent
 */
export async function callUnlessSilent<I extends DescMessage, O extends DescMessage>(
  channel: Channel,
  method: DescMethodUnary<I, O>,
  request: MessageInitShape<I>,
  options: CallOptions & { readonly patienceMs: number },
): Promise<MessageShape<O>> {
  const stop = new AbortController();
  using _following = follow(options.signal, stop);
  watchForSilence(channel, options, stop).catch(() => {});
  try {
    return await channel.call(method, request, { ...options, signal: stop.signal });
  } finally {
    stop.abort();
  }
}

/** Aborts `stop` when `signal` aborts, until disposed. */
export function follow(signal: AbortSignal, stop: AbortController): Disposable {
  const abort = () => stop.abort(signal.reason);
  if (signal.aborted) abort();
  else signal.addEventListener("abort", abort, { once: true });
  return { [Symbol.dispose]: () => signal.removeEventListener("abort", abort) };
}

/** Asks the server for its version again and again, and aborts `stop` when no answer comes. */
async function watchForSilence(
  channel: Channel,
  options: CallOptions & { readonly patienceMs: number },
  stop: AbortController,
): Promise<void> {
  for (;;) {
    await sleep(options.patienceMs / 2, stop.signal);
    using limit = timeLimit(stop.signal, options.patienceMs / 2);
    try {
      await channel.call(DurosAPI.method.getVersion, {}, { ...options, signal: limit.signal });
    } catch (error) {
      stop.signal.throwIfAborted();
      // Any answer is a sign of life. When the connection is lost, the change itself fails.
      if (!(error instanceof CallError)) stop.abort(new DOMException("no sign of life", "TimeoutError"));
    }
  }
}

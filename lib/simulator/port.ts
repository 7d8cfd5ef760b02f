/**
 * Free TCP ports that stay free: below the range from which the kernel takes ports for outgoing connections and for port 0.
 * A server that stops can start again on such a port; a port from the kernel's range may have been taken meanwhile.
 */
import { hasCode } from "../error.ts";

const lowest = 10_240;
/** Where the kernel's range starts by default. */
const usualEnd = 32_768;
const mostTries = 100;

/** Calls `listen` with random ports until one is free, or once with `port` when that is not 0. */
export async function onFreePort<T>(port: number, listen: (port: number) => Promise<T>): Promise<T> {
  if (port !== 0) return await listen(port);
  const end = Math.max(lowest + 1000, Math.min(usualEnd, kernelRangeStart()));
  for (let tries = 1;; tries++) {
    try {
      return await listen(lowest + Math.floor(Math.random() * (end - lowest)));
    } catch (error) {
      // The error of a port that is in use.
      if (!hasCode(error, "FAILED_PRECONDITION") || tries === mostTries) throw error;
    }
  }
}

function kernelRangeStart(): number {
  try {
    return Number.parseInt(Deno.readTextFileSync("/proc/sys/net/ipv4/ip_local_port_range")) || usualEnd;
  } catch {
    return usualEnd;
  }
}

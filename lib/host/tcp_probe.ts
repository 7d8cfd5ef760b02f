/** Tests the network from this machine, without NVMe: for `lbcsi doctor`. */
import net from "node:net";
import { hostname, networkInterfaces } from "node:os";
import { messageOf } from "../error.ts";
import type { TransportAddress } from "../namespace.ts";

/**
 * Connects over TCP and disconnects at once; nothing is sent.
 *
 * @returns undefined when a server listens there, or why the connection failed; `no answer` when `signal` aborts first
 */
export function connectProblem(
  { traddr, trsvcid }: TransportAddress,
  signal: AbortSignal,
): Promise<string | undefined> {
  return new Promise((resolve) => {
    if (signal.aborted) return resolve("no answer");
    const socket = net.connect({ host: traddr, port: Number(trsvcid) });
    const end = (problem: string | undefined) => {
      signal.removeEventListener("abort", giveUp);
      socket.destroy();
      resolve(problem);
    };
    const giveUp = () => end("no answer");
    signal.addEventListener("abort", giveUp, { once: true });
    socket.once("connect", () => end(undefined));
    socket.on("error", (error) => end(codeOf(error)));
  });
}

function codeOf(error: unknown): string {
  const code = (error as { code?: unknown } | undefined)?.code;
  return typeof code === "string" ? code : messageOf(error);
}

/** This machine's network addresses and its host name. */
export function ownNames(): { readonly addresses: ReadonlySet<string>; readonly hostname: string } {
  const all = Object.values(networkInterfaces()).flatMap((addresses) => addresses ?? []);
  return { addresses: new Set(all.map(({ address }) => address)), hostname: hostname() };
}

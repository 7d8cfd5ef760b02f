/** Addresses of host names in entries, by the machine's own resolver. */
import { backgroundContext } from "../context.ts";
import { messageOf } from "../error.ts";
import type { Host } from "../host/host.ts";
import type { Logger } from "../log.ts";
import type { TransportAddress } from "../namespace.ts";
import { type Entry, isIpAddress } from "./entries.ts";
import type { ProblemLog } from "./tasks.ts";

const resolvedMs = 60_000;
const unresolvedMs = 5000;
const lookupLimitMs = 5000;

export interface ResolverOptions {
  readonly host: Host;
  readonly log: Logger;
  readonly problems: ProblemLog;
  readonly signal: AbortSignal;
  /** A clock in milliseconds. */
  readonly now: () => number;
}

/** Resolves host names, and remembers each answer for a while. */
export class NameResolver {
  readonly #options: ResolverOptions;
  readonly #known = new Map<string, { readonly address: string | undefined; readonly until: number }>();

  constructor(options: ResolverOptions) {
    this.#options = options;
  }

  /** The addresses of entries; entries whose host name has no address now are absent. */
  async addressesOf(entries: Iterable<Entry>): Promise<Map<Entry, TransportAddress>> {
    const addresses = new Map<Entry, TransportAddress>();
    for (const entry of entries) {
      const { traddr, trsvcid } = entry;
      const address = isIpAddress(traddr) ? traddr : await this.#resolve(traddr);
      if (address !== undefined) addresses.set(entry, { traddr: address, trsvcid });
    }
    return addresses;
  }

  async #resolve(name: string): Promise<string | undefined> {
    const { host, log, problems, signal, now } = this.#options;
    const known = this.#known.get(name);
    if (known !== undefined && known.until > now()) return known.address;
    const ctx = backgroundContext(`resolve "${name}"`, log, lookupLimitMs, signal);
    let found: string | undefined;
    let problem: string | undefined;
    try {
      const { stdout } = await host.run("getent", ["ahosts", name], { signal: ctx.signal, onAbort: "kill", log });
      found = /^(\S+)\s+STREAM/m.exec(stdout)?.[1];
      if (found === undefined) problem = "it has no address";
    } catch (error) {
      problem = messageOf(error);
    }
    if (problem === undefined) problems.clear(`name ${name}`);
    else problems.report(`name ${name}`, problem, "cannot resolve a host name", { name });
    // The last known address may still be right, which is better than none.
    const address = found ?? known?.address;
    this.#known.set(name, { address, until: now() + (found === undefined ? unresolvedMs : resolvedMs) });
    return address;
  }
}

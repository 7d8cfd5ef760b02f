/** Injected faults of a simulated management API, and the number of calls of each RPC. */
import { unlessAborted } from "../timing.ts";
import type { StatusCode } from "../error.ts";

/** A fault: what happens to calls of an RPC. */
export interface FaultRule {
  /** Name of the RPC, `*` for every one. */
  readonly rpc: string;
  /** Number of calls that it affects; 0: every call until it is cleared. */
  readonly count: number;
  /** Number of calls that pass before the first affected one. */
  readonly skip?: number | undefined;
  /** Delay before anything else. */
  readonly delayMs?: number | undefined;
  /** Answer with this code. */
  readonly code?: StatusCode | undefined;
  readonly message?: string | undefined;
  /** PoseidonOS: answer with this event, for example `VOL_MGR_BUSY`; `panic`: HTTP status 500 without a body. */
  readonly event?: string | undefined;
  /** End the connections of the endpoint instead of answering. */
  readonly drop?: boolean | undefined;
  /** Hold the call at `when` until it is released, or its caller is gone. */
  readonly hold?: boolean | undefined;
  /** `before` the call has any effect, or `after` it: the answer is lost. */
  readonly when: "before" | "after";
  /** Only calls to this endpoint, `host:port`. */
  readonly endpoint?: string | undefined;
}

/** Calls of one RPC. */
export interface CallCount {
  total: number;
  /** Calls by `host:port` of the endpoint that served them. */
  readonly endpoints: Record<string, number>;
}

/** A call that a rule holds. */
export interface HeldCall {
  readonly rpc: string;
  readonly endpoint: string;
  readonly when: "before" | "after";
}

/** A call begins or has ended. */
export interface CallEvent {
  readonly phase: "begin" | "end";
  readonly rpc: string;
  /** UUID of the object of the call, or its name while it has no UUID; empty when the call has no object. */
  readonly subject: string;
}

/** The rules and counters of one simulator. */
export interface Faults {
  /** Counts one call. */
  count(rpc: string, endpoint: string): void;
  /** Calls since the last reset, by RPC. */
  calls(): Readonly<Record<string, CallCount>>;
  resetCalls(): void;
  add(rule: FaultRule): void;
  clear(): void;
  /** The oldest rule that applies to this call, if any; reduces its count. */
  take(rpc: string, endpoint: string): FaultRule | undefined;
  /** Holds a call until `release`; rejects with the reason of `signal` when that aborts first. */
  hold(call: HeldCall, signal: AbortSignal): Promise<void>;
  /** The calls that are held, oldest first. */
  held(): readonly HeldCall[];
  /** Releases all held calls. */
  release(): void;
  /** Passes every call to `listener` until the result is disposed. */
  watch(listener: (event: CallEvent) => void): Disposable;
  /** Passes an event to the listeners. */
  report(event: CallEvent): void;
}

/** The rules and counters of a new simulator: none. */
export function createFaults(): Faults {
  let counts: Record<string, CallCount> = {};
  let rules: { readonly rule: FaultRule; left: number; toSkip: number }[] = [];
  const held = new Map<HeldCall, () => void>();
  const watchers = new Set<(event: CallEvent) => void>();
  const release = () => {
    for (const resume of held.values()) resume();
  };
  return {
    count(rpc, endpoint) {
      const count = counts[rpc] ??= { total: 0, endpoints: {} };
      count.total++;
      count.endpoints[endpoint] = (count.endpoints[endpoint] ?? 0) + 1;
    },
    calls: () => structuredClone(counts),
    resetCalls: () => {
      counts = {};
    },
    add: (rule) => {
      rules.push({ rule, left: rule.count === 0 ? Infinity : rule.count, toSkip: rule.skip ?? 0 });
    },
    clear: () => {
      rules = [];
      release();
    },
    async hold(call, signal) {
      const { promise, resolve } = Promise.withResolvers<void>();
      held.set(call, resolve);
      try {
        await unlessAborted(promise, signal);
      } finally {
        held.delete(call);
      }
    },
    held: () => [...held.keys()],
    release,
    watch(listener) {
      // A wrapper, so that one function can watch twice.
      const watcher = (event: CallEvent) => listener(event);
      watchers.add(watcher);
      return { [Symbol.dispose]: () => void watchers.delete(watcher) };
    },
    report: (event) => {
      for (const watcher of watchers) watcher(event);
    },
    take(rpc, endpoint) {
      const met = rules.find((entry) => {
        const { rule } = entry;
        if (rule.rpc !== "*" && rule.rpc !== rpc) return false;
        if (rule.endpoint !== undefined && rule.endpoint !== endpoint) return false;
        return entry.toSkip-- <= 0;
      });
      if (met === undefined) return undefined;
      met.left--;
      rules = rules.filter(({ left }) => left > 0);
      return met.rule;
    },
  };
}

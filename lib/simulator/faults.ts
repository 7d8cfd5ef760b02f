/** What goes wrong on purpose in a simulated management API, and which of its RPCs were called. */
import { unlessAborted } from "../context.ts";
import type { StatusCode } from "../error.ts";

/** What is to happen to calls of an RPC. */
export interface FaultRule {
  /** Name of the RPC, `*` for every one. */
  readonly rpc: string;
  /** How many calls it takes; 0: every call until it is cleared. */
  readonly count: number;
  /** So many calls go by before it takes the first. */
  readonly skip?: number | undefined;
  /** Wait so long before anything else. */
  readonly delayMs?: number | undefined;
  /** Answer with this code. */
  readonly code?: StatusCode | undefined;
  readonly message?: string | undefined;
  /** PoseidonOS: answer with this event, `VOL_MGR_BUSY`; with `panic` DAgent answers HTTP status 500 and nothing else. */
  readonly event?: string | undefined;
  /** End the connections of the endpoint instead of an answer. */
  readonly drop?: boolean | undefined;
  /** Keep the call waiting at `when` until it is let go, or its caller is gone. */
  readonly hold?: boolean | undefined;
  /** `before` the call has had any effect, or `after`: the answer is lost. */
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

/** A call that a rule keeps waiting. */
export interface HeldCall {
  readonly rpc: string;
  readonly endpoint: string;
  readonly when: "before" | "after";
}

/** A call begins or has ended, for who watches. */
export interface CallEvent {
  readonly phase: "begin" | "end";
  readonly rpc: string;
  /** UUID of the object that the call is about, or its name while it has none; empty when it is about none. */
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
  /** The rule that this call meets, if any; takes one off its count. The oldest rule comes first. */
  take(rpc: string, endpoint: string): FaultRule | undefined;
  /** Keeps a call waiting until `release`; rejects with the reason of `signal` when that comes first. */
  hold(call: HeldCall, signal: AbortSignal): Promise<void>;
  /** The calls that wait, oldest first. */
  held(): readonly HeldCall[];
  /** Lets all waiting calls go on. */
  release(): void;
  /** Tells `listener` of every call until it is disposed. */
  watch(listener: (event: CallEvent) => void): Disposable;
  /** For who serves the calls: tells the watchers. */
  report(event: CallEvent): void;
}

export function faults(): Faults {
  let counts: Record<string, CallCount> = {};
  let rules: { readonly rule: FaultRule; left: number; toSkip: number }[] = [];
  const held = new Map<HeldCall, () => void>();
  const watchers = new Set<(event: CallEvent) => void>();
  const release = () => {
    for (const letGo of held.values()) letGo();
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

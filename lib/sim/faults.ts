/** What goes wrong on purpose in a simulated management API, and how often each of its RPCs was called. */
import type { StatusCode } from "../error.ts";

/** What is to happen to calls of an RPC. */
export interface FaultRule {
  /** Name of the RPC, `*` for every one. */
  readonly rpc: string;
  /** How many calls it takes; 0: every call until it is cleared. */
  readonly count: number;
  /** Wait so long before anything else. */
  readonly delayMs?: number | undefined;
  /** Answer with this code. */
  readonly code?: StatusCode | undefined;
  readonly message?: string | undefined;
  /** End the connections of the endpoint instead of an answer. */
  readonly drop?: boolean | undefined;
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
}

export function faults(): Faults {
  let counts: Record<string, CallCount> = {};
  let rules: { readonly rule: FaultRule; left: number }[] = [];
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
      rules.push({ rule, left: rule.count === 0 ? Infinity : rule.count });
    },
    clear: () => {
      rules = [];
    },
    take(rpc, endpoint) {
      const met = rules.find(({ rule }) =>
        (rule.rpc === "*" || rule.rpc === rpc) && (rule.endpoint === undefined || rule.endpoint === endpoint)
      );
      if (met === undefined) return undefined;
      met.left--;
      rules = rules.filter(({ left }) => left > 0);
      return met.rule;
    },
  };
}

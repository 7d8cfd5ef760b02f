/** What tests of storage backends share: the context of a call, its errors, and backends at simulators. */
import { match, ok, strictEqual } from "node:assert/strict";
import { createLogger, type RequestContext, requestContext, Secrets } from "../../lib/context.ts";
import { type StatusCode, StatusError } from "../../lib/error.ts";
import { lightosBackend } from "../../lib/storage/lightos/backend.ts";
import type { LightosOptions } from "../../lib/storage/lightos/cluster.ts";
import type { TestSimulator } from "./simulator.ts";

export const mib = 1n << 20n;
export const gib = 1n << 30n;

/** A logger that writes nothing. */
export const quiet = createLogger("error", "json", () => {});

/** The secrets of a call that brings none. */
export const none = new Secrets();

/** The context of a call whose caller waits for `ms`. */
export function within(ms: number): RequestContext {
  const aborted = new AbortController();
  const timer = setTimeout(() => aborted.abort(new StatusError("DEADLINE_EXCEEDED", "too slow")), ms);
  Deno.unrefTimer(timer);
  return requestContext(aborted.signal, new Date(Date.now() + ms), quiet);
}

/** For `rejects` and `throws`: a StatusError with this code, whose message matches each pattern. */
export function refuses(code: StatusCode, ...messages: readonly RegExp[]) {
  return (error: unknown) => {
    ok(error instanceof StatusError, String(error));
    strictEqual(error.code, code, error.message);
    for (const message of messages) match(error.message, message);
    return true;
  };
}

/** The options of a LightOS backend in tests: no token, no certificates, no output. */
export const lightosOptions: LightosOptions = {
  log: quiet,
  globalJwt: () => undefined,
  globalJwtPath: "/etc/lb-csi/jwt",
  globalJwtFor: "any endpoint",
  ca: undefined,
  verifyTls: true,
  userAgent: "lbcsi/test",
};

/** A LightOS backend with the token of a simulator. */
export function openLightos(simulator: Pick<TestSimulator, "addresses">, changes: Partial<LightosOptions> = {}) {
  return lightosBackend({ ...lightosOptions, globalJwt: () => simulator.addresses.jwt, ...changes });
}

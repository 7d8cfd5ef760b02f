/**
 * Keeps Deno 2.9.4 to 2.9.6 alive when the peer of an HTTP/2 session sends GOAWAY, which Go clients do on every close.
 *
 * These versions free the native session when `close` or `destroy` is called while its GOAWAY frame is being handled, and
 * then continue to use it (denoland/deno#36788). So both calls are delayed until the frame has been handled.
 *
 * They also emit the events of two frames that arrive in one read without running microtasks in between. grpc-js starts to
 * listen for the loss of a connection in a microtask after SETTINGS. It missed a GOAWAY in the same read, treated the dead
 * session as a good one, and tried for ever to begin a call on it, in microtasks, so that nothing else ran. So `goaway` is
 * emitted one turn later.
 *
 * This module must be imported before anything that uses `node:http2`; it can go when the issue is closed and
 * tests/grpc/goaway_test.ts passes without it.
 */
import http2 from "node:http2";

const enhanceYourCalm = 11;
/** When each server (`host:port`) last ended a connection with GOAWAY ENHANCE_YOUR_CALM; ms of performance.now. */
const calmed = new Map<string, number>();

/** Whether a server has ended a connection with GOAWAY ENHANCE_YOUR_CALM since a time (ms of performance.now). */
export function wasCalmedSince(address: string, since: number): boolean {
  return (calmed.get(address) ?? -Infinity) >= since;
}

type AnyFunction = (...args: unknown[]) => unknown;
type SessionPrototype = Record<"close" | "destroy" | "emit", AnyFunction>;
type Emitter = { prependListener(event: string, listener: AnyFunction): unknown };

const handlingGoaway = new WeakSet<object>();
/** `host:port` of the servers that client sessions connect to. */
const addresses = new WeakMap<object, string>();
let guarded = false;

function guard(session: object): void {
  if (guarded) return;
  let prototype = Object.getPrototypeOf(session);
  while (prototype !== null && !Object.hasOwn(prototype, "destroy")) prototype = Object.getPrototypeOf(prototype);
  if (prototype === null) return;
  guarded = true;
  const methods = prototype as SessionPrototype;
  for (const name of ["close", "destroy"] as const) {
    const original = methods[name];
    methods[name] = function (this: object, ...args: unknown[]) {
      if (!handlingGoaway.has(this)) return Reflect.apply(original, this, args);
      setImmediate(() => Reflect.apply(original, this, args));
      return undefined;
    };
  }
  const emit = methods.emit;
  methods.emit = function (this: object, ...args: unknown[]) {
    if (args[0] === "goaway") {
      handlingGoaway.add(this);
      queueMicrotask(() => handlingGoaway.delete(this));
      const address = addresses.get(this);
      if (args[1] === enhanceYourCalm && address !== undefined) calmed.set(address, performance.now());
      setImmediate(() => Reflect.apply(emit, this, args));
      return true;
    }
    return Reflect.apply(emit, this, args);
  };
}

// grpc-js calls these three through the same module object.
const module = http2 as unknown as Record<"createServer" | "createSecureServer" | "connect", AnyFunction>;
const { createServer, createSecureServer, connect } = module;
const guardSession: AnyFunction = (session) => guard(session as object);
module.createServer = (...args) => (createServer(...args) as Emitter).prependListener("session", guardSession);
module.createSecureServer = (...args) =>
  (createSecureServer(...args) as Emitter).prependListener("session", guardSession);
module.connect = (...args) => {
  const session = connect(...args) as object;
  addresses.set(session, String(args[0]).replace(/^https?:\/\//, ""));
  guard(session);
  return session;
};

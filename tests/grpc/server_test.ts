import assert from "node:assert/strict";
import { linkSync, lstatSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import http from "node:http";
import net from "node:net";
import tls from "node:tls";
import { createLogger, sleep } from "../../lib/context.ts";
import { StatusError } from "../../lib/error.ts";
import { CallError, Channel } from "../../lib/grpc/client.ts";
import { type CallContext, type Handlers, serve, type ServeOptions, service } from "../../lib/grpc/server.ts";
import type { Listen } from "../../lib/grpc/listener.ts";
import { shownCertificate, type Trust } from "../../lib/grpc/tls.ts";
import { type Certificate, selfSigned } from "../../lib/simulator/certificate.ts";
import { Identity, type ProbeResponse, SnapshotMetadata } from "../../proto/gen/csi_pb.ts";
import { answerHttp2, type Http2Answer } from "../support/http2_answers.ts";
import { frame, frames, preface, RawClient } from "../support/raw_http2.ts";

type IdentityHandlers = Handlers<typeof Identity>;
type MetadataHandlers = Handlers<typeof SnapshotMetadata>;
interface Line {
  readonly level: string;
  readonly event: string;
  readonly [field: string]: unknown;
}
interface Setup {
  readonly path: string;
  readonly channel: Channel;
  readonly lines: readonly Line[];
  readonly stop: (graceMs: number) => Promise<void>;
  readonly dropConnections: () => void;
}

const ready = () => Promise.resolve({ ready: true });
const patient = () => AbortSignal.timeout(20_000);

async function withDirectory(body: (directory: string) => Promise<void>): Promise<void> {
  const directory = mkdtempSync("/tmp/lbcsi-rpc-");
  try {
    await body(directory);
  } finally {
    rmSync(directory, { recursive: true });
  }
}

/** Serves on a unix socket and calls from this process. */
async function withServer(
  identity: IdentityHandlers,
  body: (setup: Setup) => Promise<void>,
  more: Partial<ServeOptions> & { readonly metadata?: MetadataHandlers } = {},
): Promise<void> {
  await withDirectory(async (directory) => {
    const path = `${directory}/csi.sock`;
    const lines: Line[] = [];
    const { metadata = {}, ...options } = more;
    const server = await serve({
      listen: { path },
      log: createLogger("debug", "json", (line) => lines.push(JSON.parse(line))),
      services: [service(Identity, identity), service(SnapshotMetadata, metadata)],
      ...options,
    });
    using channel = new Channel({ address: `unix://${path}` });
    try {
      await body({ path, channel, lines, stop: server.stop, dropConnections: server.dropConnections });
    } finally {
      await server.stop(1000);
    }
  });
}

async function until(condition: () => boolean, what: string): Promise<void> {
  const signal = AbortSignal.timeout(10_000);
  while (!condition()) await sleep(5, signal).catch(() => assert.fail(`never: ${what}`));
}

function probe(
  channel: Channel,
  options: { readonly deadline?: Date; readonly signal?: AbortSignal } = {},
): Promise<ProbeResponse> {
  return channel.call(Identity.method.probe, {}, { signal: patient(), ...options });
}

const soon = (ms: number) => new Date(Date.now() + ms);

// ------------------------------------------------------------------------------------------------------- the socket

function listenOn(path: string): ReturnType<typeof serve> {
  return serve({ listen: { path }, log: createLogger("error"), services: [service(Identity, { probe: ready })] });
}

Deno.test("serve removes a socket that a killed process has left, and its own when it stops", async () => {
  await withDirectory(async (directory) => {
    const path = `${directory}/csi.sock`;
    // A second name of a socket outlives its listener, as a killed process's socket does.
    const dead = net.createServer();
    await new Promise<void>((resolve) => dead.listen(`${directory}/dead.sock`, resolve));
    linkSync(`${directory}/dead.sock`, path);
    await new Promise<void>((resolve) => dead.close(() => resolve()));
    assert.ok(lstatSync(path).isSocket());

    const server = await listenOn(path);
    try {
      using channel = new Channel({ address: `unix://${path}` });
      assert.equal((await probe(channel)).ready, true);
    } finally {
      await server.stop(1000);
    }
    assert.equal(lstatSync(path, { throwIfNoEntry: false }), undefined);
  });
});

Deno.test("serve refuses a socket on which another process answers, and leaves it working", async () => {
  await withServer({ probe: ready }, async ({ path, channel }) => {
    await assert.rejects(listenOn(path), {
      code: "FAILED_PRECONDITION",
      message: `Cannot listen on ${path}: another process is listening there`,
    });

    assert.equal((await probe(channel)).ready, true);
  });
});

Deno.test("serve refuses a path where something else than a socket is, and leaves it there", async () => {
  await withDirectory(async (directory) => {
    writeFileSync(`${directory}/csi.sock`, "mine");

    await assert.rejects(listenOn(`${directory}/csi.sock`), {
      code: "FAILED_PRECONDITION",
      message: `Cannot listen on ${directory}/csi.sock: something that is not a socket is there`,
    });

    assert.equal(Deno.readTextFileSync(`${directory}/csi.sock`), "mine");
  });
});

Deno.test("serve lets owner and group connect and nobody else, whatever the umask", async () => {
  await withDirectory(async (directory) => {
    const before = Deno.umask(0);
    try {
      const path = `${directory}/csi.sock`;
      const server = await listenOn(path);

      assert.equal(((await Deno.stat(path)).mode ?? 0) & 0o777, 0o660);
      await server.stop(100);
    } finally {
      Deno.umask(before);
    }
  });
});

Deno.test("serve refuses a directory where everybody may replace its socket, and takes one with the sticky bit", async () => {
  await withDirectory(async (directory) => {
    const path = `${directory}/csi.sock`;
    await Deno.chmod(directory, 0o777);
    await assert.rejects(listenOn(path), {
      code: "FAILED_PRECONDITION",
      message:
        `Cannot listen on ${path}: every user of the machine may replace files in ${directory}, take that right ` +
        "away (chmod o-w)",
    });
    assert.deepEqual([...Deno.readDirSync(directory)], []);

    await Deno.chmod(directory, 0o1777);
    const server = await listenOn(path);
    await server.stop(100);
  });
});

Deno.test("serve refuses a socket path of more than 107 bytes, and takes one of 107", async () => {
  await withDirectory(async (directory) => {
    const longest = `${directory}/${"x".repeat(107 - directory.length - 1)}`;

    await assert.rejects(listenOn(`${longest}x`), {
      code: "FAILED_PRECONDITION",
      message: `Cannot listen on ${longest}x: the path has more than 107 bytes`,
    });

    const server = await listenOn(longest);
    await server.stop(1000);
  });
});

Deno.test("serve makes a directory for its socket where everybody may write, as in an emptyDir of Kubernetes", async () => {
  await withDirectory(async (directory) => {
    // As kubelet makes it for a pod with an fsGroup.
    await Deno.chmod(directory, 0o2777);
    const path = `${directory}/lbcsi/csi.sock`;

    for (const _ of ["made", "there from the last time"]) {
      const server = await listenOn(path);
      assert.equal((Deno.statSync(`${directory}/lbcsi`).mode ?? 0) & 0o777, 0o750);
      assert.equal((Deno.statSync(path).mode ?? 0) & 0o777, 0o660);
      await server.stop(1000);
    }
  });
});

Deno.test("serve refuses a path whose directory is missing or is a file", async () => {
  await withDirectory(async (directory) => {
    writeFileSync(`${directory}/file`, "");
    for (const parent of [`${directory}/missing/deeper`, `${directory}/file`, `${directory}/file/deeper`]) {
      await assert.rejects(listenOn(`${parent}/csi.sock`), {
        code: "FAILED_PRECONDITION",
        message: `Cannot listen on ${parent}/csi.sock: its directory is missing, create ${parent} first`,
      });
    }
  });
});

Deno.test("serve refuses a TCP port that is taken", async () => {
  const taken = net.createServer();
  await new Promise<void>((resolve) => taken.listen(0, "127.0.0.1", resolve));
  const address = taken.address();
  assert.ok(typeof address === "object" && address !== null);
  try {
    const listen: Listen = { host: "127.0.0.1", port: address.port };
    await assert.rejects(serve({ listen, log: createLogger("error"), services: [] }), {
      code: "FAILED_PRECONDITION",
      message: new RegExp(`^Cannot listen on 127\\.0\\.0\\.1:${address.port}: .*EADDRINUSE`),
    });
  } finally {
    taken.close();
  }
});

// ------------------------------------------------------------------------------------------------- stopping, idling

Deno.test("stop lets a running call end well, refuses new ones, and then closes", async () => {
  const mayEnd = Promise.withResolvers<void>();
  let started = false;
  const slow = async () => {
    started = true;
    await mayEnd.promise;
    return { ready: true };
  };
  await withServer(
    { probe: slow, getPluginInfo: () => Promise.resolve({ name: "x" }) },
    async ({ path, channel, stop }) => {
      const running = probe(channel);
      await until(() => started, "the call starts");

      const stopped = stop(10_000);

      await assert.rejects(channel.call(Identity.method.getPluginInfo, {}, { signal: patient() }), {
        code: "UNAVAILABLE",
        message: "Cannot start GetPluginInfo: the driver is shutting down",
      });
      mayEnd.resolve();
      assert.equal((await running).ready, true);
      await stopped;
      assert.equal(lstatSync(path, { throwIfNoEntry: false }), undefined);
    },
  );
});

Deno.test("stop waits no longer than its grace for a call that does not end", async () => {
  const mayEnd = Promise.withResolvers<void>();
  let started = false;
  const stuck = async () => {
    started = true;
    await mayEnd.promise;
    return {};
  };
  await withServer({ probe: stuck }, async ({ channel, stop }) => {
    const running = assert.rejects(probe(channel), CallError);
    await until(() => started, "the call starts");

    const begun = performance.now();
    await stop(100);

    assert.ok(performance.now() - begun < 5000);
    await running;
    mayEnd.resolve();
  });
});

Deno.test("serve neither closes nor pings an idle connection", async () => {
  await withServer({ probe: ready }, async ({ path }) => {
    using client = new RawClient(path);
    await client.send(Buffer.concat([preface, frame(frames.settings, 0, 0)]));
    await client.settings;
    // The acknowledgement of our SETTINGS is the last thing to come.
    await new Promise((resolve) => setTimeout(resolve, 100));
    let ended = false;
    client.ended.then(() => ended = true);
    const before = client.socket.bytesRead;

    await new Promise((resolve) => setTimeout(resolve, 1500));

    assert.equal(ended, false);
    assert.equal(client.socket.bytesRead, before);
  });
});

// ------------------------------------------------------------------------------------- deadlines, callers that leave

Deno.test("promise 20: a call that is too slow gets our DEADLINE_EXCEEDED before its own deadline, and its work goes on", async () => {
  const mayEnd = Promise.withResolvers<void>();
  let reason: unknown;
  let abortedAt = 0;
  let ended = false;
  const stubborn = async (_request: unknown, call: CallContext) => {
    call.signal.addEventListener("abort", () => {
      reason = call.signal.reason;
      abortedAt = Date.now();
    });
    await mayEnd.promise;
    ended = true;
    return { ready: true };
  };
  await withServer({ probe: stubborn }, async ({ channel, lines }) => {
    const deadline = soon(1500);

    await assert.rejects(probe(channel, { deadline }), (error) => {
      assert.ok(error instanceof CallError);
      assert.equal(error.code, "DEADLINE_EXCEEDED");
      assert.match(
        error.message,
        /^Cannot finish Probe within the caller's deadline of [\d.]+ s: the work goes on, repeat$/,
      );
      return true;
    });

    assert.ok(Date.now() < deadline.getTime());
    assert.ok(abortedAt > 0 && abortedAt < deadline.getTime());
    assert.ok(reason instanceof StatusError && reason.code === "DEADLINE_EXCEEDED");
    assert.equal(ended, false);
    mayEnd.resolve();
    await until(
      () => lines.some(({ event }) => event === "ended a call after its caller had left"),
      "the late end is logged",
    );
    assert.equal(ended, true);
    assert.deepEqual(lines.map(({ code }) => code), ["DEADLINE_EXCEEDED", "OK"]);
  });
});

Deno.test("promise 20: a handler that reacts to its signal says itself what was slow", async () => {
  const attentive = async (_request: unknown, call: CallContext) => {
    try {
      await sleep(60_000, call.signal);
    } catch (cause) {
      throw new StatusError("DEADLINE_EXCEEDED", "Cannot stage v: mkfs is still running", { cause });
    }
    return {};
  };
  await withServer({ probe: attentive }, async ({ channel }) => {
    await assert.rejects(probe(channel, { deadline: soon(1000) }), {
      code: "DEADLINE_EXCEEDED",
      message: "Cannot stage v: mkfs is still running",
    });
  });
});

Deno.test("a handler sees its caller's deadline", async () => {
  let seen: Date | undefined;
  const handler = (_request: unknown, call: CallContext) => {
    seen = call.deadline;
    return ready();
  };
  await withServer({ probe: handler }, async ({ channel }) => {
    const deadline = soon(30_000);

    await probe(channel, { deadline });

    assert.ok(seen !== undefined && Math.abs(seen.getTime() - deadline.getTime()) < 1000);
    // Without one, there still is an end.
    await probe(channel);
    assert.ok(seen.getTime() > Date.now() && seen.getTime() < Date.now() + 11 * 60_000);
  });
});

Deno.test("a caller that cancels aborts the handler's signal with CANCELLED, and gets its own reason", async () => {
  let reason: unknown;
  let started = false;
  const handler = async (_request: unknown, call: CallContext) => {
    started = true;
    await sleep(60_000, call.signal).catch((error) => reason = error);
    return {};
  };
  await withServer({ probe: handler }, async ({ channel }) => {
    const caller = new AbortController();
    const running = probe(channel, { signal: caller.signal });
    await until(() => started, "the call starts");
    const why = new StatusError("ABORTED", "changed my mind");

    caller.abort(why);

    await assert.rejects(running, (error) => error === why);
    await until(() => reason !== undefined, "the handler notices");
    assert.ok(reason instanceof StatusError);
    assert.equal(reason.code, "CANCELLED");
    assert.equal(reason.message, "Probe was given up by its caller");
  });
});

Deno.test("a connection that breaks aborts the handler's signal with CANCELLED", async () => {
  let reason: unknown;
  let started = false;
  const handler = async (_request: unknown, call: CallContext) => {
    started = true;
    await sleep(60_000, call.signal).catch((error) => reason = error);
    return {};
  };
  await withServer({ probe: handler }, async ({ channel, dropConnections }) => {
    const running = assert.rejects(
      probe(channel),
      (error) => error instanceof CallError && error.origin === "no answer",
    );
    await until(() => started, "the call starts");

    dropConnections();

    await running;
    await until(() => reason !== undefined, "the handler notices");
    assert.ok(reason instanceof StatusError && reason.code === "CANCELLED");
  });
});

Deno.test("the signal of a call that was answered never aborts", async () => {
  const signals: AbortSignal[] = [];
  const handler = (_request: unknown, call: CallContext) => {
    signals.push(call.signal);
    return ready();
  };
  await withServer({ probe: handler }, async ({ channel, dropConnections }) => {
    await probe(channel, { deadline: soon(300) });

    dropConnections();
    await new Promise((resolve) => setTimeout(resolve, 500));

    assert.deepEqual(signals.map(({ aborted }) => aborted), [false]);
  });
});

// ------------------------------------------------------------------------------------------------ errors and the log

Deno.test("promise 20: a StatusError reaches the caller with its code and words", async () => {
  const codes = [
    "CANCELLED",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "UNAUTHENTICATED",
  ] as const;
  let next = 0;
  const failing = () => {
    const code = codes[next++];
    assert.ok(code !== undefined);
    return Promise.reject(new StatusError(code, `Cannot do it: größe "${code}"`));
  };
  await withServer({ probe: failing }, async ({ channel }) => {
    for (const code of codes) {
      await assert.rejects(probe(channel), {
        name: "CallError",
        code,
        message: `Cannot do it: größe "${code}"`,
        origin: "server",
      });
    }
  });
});

Deno.test("an unforeseen error becomes INTERNAL without its stack, which goes to the log", async () => {
  await withServer(
    { probe: () => Promise.reject(new TypeError("x is not a function")) },
    async ({ channel, lines }) => {
      await assert.rejects(probe(channel), (error) => {
        assert.ok(error instanceof CallError);
        assert.equal(error.code, "INTERNAL");
        assert.match(error.message, /Probe/);
        assert.doesNotMatch(error.message, /\.ts|\n| at /);
        return true;
      });

      const line = lines.find(({ event }) => event === "failed in an unforeseen way");
      assert.equal(line?.level, "error");
      assert.match(String(line?.["error"]), /TypeError: x is not a function\n.*at .*server_test\.ts/);
    },
  );
});

Deno.test("a handler that throws at once, and a thrown value that is no error, become INTERNAL too", async () => {
  const throwing = () => {
    throw "just text";
  };
  await withServer({ probe: throwing }, async ({ channel }) => {
    await assert.rejects(probe(channel), { code: "INTERNAL" });
    await assert.rejects(probe(channel), { code: "INTERNAL" });
  });
});

Deno.test("a method without a handler answers UNIMPLEMENTED", async () => {
  await withServer({}, async ({ channel }) => {
    await assert.rejects(probe(channel), {
      code: "UNIMPLEMENTED",
      message: "Cannot serve Probe: this driver does not announce it",
    });
  });
});

Deno.test("serve writes one line per call at its end, with its facts", async () => {
  const handlers: IdentityHandlers = {
    getPluginInfo: () => Promise.resolve({ name: "x" }),
    getPluginCapabilities: () => Promise.reject(new StatusError("NOT_FOUND", "Cannot find it")),
  };
  await withServer(handlers, async ({ channel, lines }) => {
    await channel.call(Identity.method.getPluginInfo, {}, { signal: patient() });
    await assert.rejects(channel.call(Identity.method.getPluginCapabilities, {}, { signal: patient() }));

    const [first, second, ...rest] = lines;
    assert.deepEqual(rest, []);
    assert.deepEqual(
      { ...first, ts: 0, ms: 0 },
      { ts: 0, level: "info", event: "answered", rpc: "GetPluginInfo", call: 1, volume: "v", code: "OK", ms: 0 },
    );
    assert.equal(second?.["rpc"], "GetPluginCapabilities");
    assert.equal(second?.["call"], 2);
    assert.equal(second?.["code"], "NOT_FOUND");
    assert.equal(second?.["error"], "Cannot find it");
  }, { describe: () => ({ volume: "v" }) });
});

Deno.test("serve logs quiet calls at debug, their failures as loud as any", async () => {
  let fail = false;
  const handler = () => fail ? Promise.reject(new StatusError("UNAVAILABLE", "down")) : ready();
  await withServer({ probe: handler }, async ({ channel, lines }) => {
    await probe(channel);
    fail = true;
    await assert.rejects(probe(channel));

    assert.equal(lines[0]?.level, "debug");
    assert.notEqual(lines[1]?.level, "debug");
  }, { quiet: ({ name }) => name === "Probe" });
});

Deno.test("serve answers a request that cannot be described", async () => {
  const describe = () => {
    throw new Error("odd request");
  };
  await withServer({ probe: ready }, async ({ channel, lines }) => {
    assert.equal((await probe(channel)).ready, true);

    assert.equal(lines[0]?.event, "failed to describe a request");
    assert.equal(lines[0]?.["error"], "odd request");
  }, { describe });
});

Deno.test("before may refuse a call by throwing, and sees its headers", async () => {
  const before: ServeOptions["before"] = (_method, _request, call) => {
    if (call.header("authorization") !== "Bearer t") throw new StatusError("UNAUTHENTICATED", "who are you");
  };
  await withServer({ probe: ready }, async ({ channel }) => {
    await assert.rejects(probe(channel), { code: "UNAUTHENTICATED", message: "who are you" });

    const headers = { authorization: "Bearer t" };
    const answer = await channel.call(Identity.method.probe, {}, { signal: patient(), headers });
    assert.equal(answer.ready, true);
  }, { before });
});

// -------------------------------------------------------------------------------------------------------- streaming

Deno.test("a server stream arrives whole and in order", async () => {
  const metadata: MetadataHandlers = {
    getMetadataAllocated: async function* ({ startingOffset }) {
      for (let i = 0n; i < 100n; i++) {
        if (i === 50n) await new Promise((resolve) => setTimeout(resolve, 1));
        yield { volumeCapacityBytes: startingOffset + i };
      }
    },
  };
  await withServer({}, async ({ channel, lines }) => {
    const got: bigint[] = [];
    const request = { startingOffset: 7n };
    for await (
      const { volumeCapacityBytes } of channel.stream(SnapshotMetadata.method.getMetadataAllocated, request, {
        signal: patient(),
      })
    ) {
      got.push(volumeCapacityBytes);
    }

    assert.deepEqual(got, Array.from({ length: 100 }, (_, i) => 7n + BigInt(i)));
    assert.deepEqual(lines.map(({ event, code }) => [event, code]), [["answered", "OK"]]);
  }, { metadata });
});

Deno.test("a server stream is not made faster than its caller reads, and leaving it ends the handler", async () => {
  let made = 0;
  let left = false;
  const metadata: MetadataHandlers = {
    getMetadataAllocated: async function* () {
      const blockMetadata = Array.from(
        { length: 10_000 },
        (_, i) => ({ byteOffset: BigInt(i) << 32n, sizeBytes: 4096n }),
      );
      try {
        for (;;) {
          made++;
          yield { blockMetadata };
        }
      } finally {
        left = true;
      }
    },
  };
  await withServer({}, async ({ channel, lines }) => {
    const stream = channel.stream(SnapshotMetadata.method.getMetadataAllocated, {}, { signal: patient() });
    const first = await stream.next();
    assert.equal(first.value?.blockMetadata.length, 10_000);
    // The maker stops by itself once the windows and buffers are full: a message has some 100 KiB.
    let before = -1;
    while (before !== made) {
      before = made;
      assert.ok(made < 200, `${made} messages were made`);
      await new Promise((resolve) => setTimeout(resolve, 250));
    }

    await stream.return(undefined);

    await until(() => left, "the handler ends");
    await until(() => lines.length > 0, "its end is logged");
    assert.deepEqual(lines.map(({ code }) => code), ["CANCELLED"]);
  }, { metadata });
});

Deno.test("a server stream that fails half-way ends with the StatusError, after what came before", async () => {
  const metadata: MetadataHandlers = {
    getMetadataAllocated: async function* () {
      yield { volumeCapacityBytes: 1n };
      await Promise.resolve();
      throw new StatusError("OUT_OF_RANGE", "Cannot read beyond the end");
    },
  };
  await withServer({}, async ({ channel }) => {
    const got: bigint[] = [];
    const read = async () => {
      for await (
        const { volumeCapacityBytes } of channel.stream(SnapshotMetadata.method.getMetadataAllocated, {}, {
          signal: patient(),
        })
      ) {
        got.push(volumeCapacityBytes);
      }
    };

    await assert.rejects(read(), { name: "CallError", code: "OUT_OF_RANGE", message: "Cannot read beyond the end" });
    assert.deepEqual(got, [1n]);
  }, { metadata });
});

Deno.test("aborting the signal of a stream throws its reason and ends the handler", async () => {
  let reason: unknown;
  const metadata: MetadataHandlers = {
    getMetadataAllocated: async function* (_request, call) {
      yield { volumeCapacityBytes: 1n };
      await sleep(60_000, call.signal).catch((error) => reason = error);
    },
  };
  await withServer({}, async ({ channel }) => {
    const caller = new AbortController();
    const why = new Error("enough");
    const read = async () => {
      for await (
        const _ of channel.stream(SnapshotMetadata.method.getMetadataAllocated, {}, { signal: caller.signal })
      ) {
        caller.abort(why);
      }
    };

    await assert.rejects(read(), (error) => error === why);
    await until(() => reason !== undefined, "the handler notices");
    assert.ok(reason instanceof StatusError && reason.code === "CANCELLED");
  }, { metadata });
});

// ---------------------------------------------------------------------------------------------------------- calling

Deno.test("Channel connects again after a lost connection", async () => {
  await withServer({ probe: ready }, async ({ channel, dropConnections }) => {
    await probe(channel);

    dropConnections();

    let answer: ProbeResponse | undefined;
    for (let attempt = 0; answer === undefined && attempt < 50; attempt++) {
      answer = await probe(channel).catch((error) => {
        assert.ok(error instanceof CallError && error.code === "UNAVAILABLE", String(error));
        return undefined;
      });
    }
    assert.equal(answer?.ready, true);
  });
});

const page = "<!DOCTYPE html><html><h1>Bad Gateway</h1></html>";
const html = (status: number, body: string): Http2Answer => ({
  headers: { ":status": status, "content-type": "text/html" },
  body,
});
const grpcHeaders = { ":status": 200, "content-type": "application/grpc" };
const emptyAnswer = new Uint8Array(5);

for (
  const [what, answer, words] of [
    ...[400, 401, 403, 404, 429, 500, 502, 503, 504].flatMap((status) => [
      [`HTTP status ${status} with a page`, html(status, page), `HTTP status ${status}`] as const,
      [`HTTP status ${status} without a body`, html(status, ""), `HTTP status ${status}`] as const,
    ]),
    ["a page with HTTP status 200", html(200, page), "content of type text/html"],
    ["a short page with HTTP status 200", html(200, "no"), "content of type text/html"],
    ["a page without a type", { headers: { ":status": 200 }, body: page }, "something instead of a gRPC answer"],
    ["headers alone", { headers: grpcHeaders }, ""],
    ["a message without a status", { headers: grpcHeaders, body: emptyAnswer }, ""],
    ["trailers without a status", { headers: grpcHeaders, body: emptyAnswer, trailers: { "x-more": "1" } }, ""],
    ["a status that is no number", { headers: grpcHeaders, trailers: { "grpc-status": "bad" } }, ""],
    ["status OK without a message", { headers: grpcHeaders, trailers: { "grpc-status": "0" } }, ""],
    ["a message of another schema", {
      headers: grpcHeaders,
      body: Uint8Array.of(0, 0, 0, 0, 2, 0xff, 0xff),
      trailers: { "grpc-status": "0" },
    }, ""],
    ["a compression that nobody asked for", {
      headers: { ...grpcHeaders, "grpc-encoding": "snappy" },
      body: Uint8Array.of(1, 0, 0, 0, 1, 7),
      trailers: { "grpc-status": "0" },
    }, ""],
    ["a compressed message that is none", {
      headers: { ...grpcHeaders, "grpc-encoding": "gzip" },
      body: Uint8Array.of(1, 0, 0, 0, 1, 7),
      trailers: { "grpc-status": "0" },
    }, ""],
    ...[1, 2, 7, 8, 11, 12].map((code) => [`RST_STREAM ${code}`, { headers: grpcHeaders, end: code }, ""] as const),
    ["GOAWAY because of too many pings", { headers: grpcHeaders, end: "too many pings" }, "too many pings"],
    ["HTTP status 503 in headers alone", { ...html(503, ""), end: "headers" }, "HTTP status 503"],
    ["a connection that ends after the headers", { headers: grpcHeaders, end: "lost connection" }, ""],
    ["a connection that ends within the message", {
      headers: grpcHeaders,
      body: Uint8Array.of(0, 0, 0, 0, 9, 1),
      end: "lost connection",
    }, ""],
  ] as [string, Http2Answer, string][]
) {
  Deno.test(`promise 30: Channel does not take ${what} for the server's answer`, async () => {
    await using server = await answerHttp2(() => answer);
    using channel = new Channel({ address: server.address });

    await assert.rejects(probe(channel, { signal: patient() }), (error) => {
      assert.ok(error instanceof CallError, String(error));
      assert.deepEqual([error.code, error.origin], ["UNAVAILABLE", "no answer"], error.message);
      assert.ok(error.message.includes(words), error.message);
      return true;
    });
  });
}

Deno.test("Channel tells an answer that is larger than it takes from a page", async () => {
  const head = Uint8Array.of(0, 0x40, 0, 0, 0);
  await using server = await answerHttp2(() => ({ headers: grpcHeaders, body: head }));
  using channel = new Channel({ address: server.address });

  await assert.rejects(probe(channel), (error) => {
    assert.ok(error instanceof CallError, String(error));
    assert.deepEqual([error.code, error.origin], ["UNAVAILABLE", "too large"]);
    assert.equal(error.message, "an answer of more than 8 MiB");
    return true;
  });
});

for (
  const [what, answer] of [
    ["in trailers", { headers: grpcHeaders, trailers: { "grpc-status": "8", "grpc-message": "full" } }],
    ["after a message", {
      headers: grpcHeaders,
      body: emptyAnswer,
      trailers: { "grpc-status": "8", "grpc-message": "full" },
    }],
    ["in headers alone", { headers: { ...grpcHeaders, "grpc-status": "8", "grpc-message": "full" }, end: "headers" }],
  ] as [string, Http2Answer][]
) {
  Deno.test(`Channel takes a status ${what} for the server's answer`, async () => {
    await using server = await answerHttp2(() => answer);
    using channel = new Channel({ address: server.address });

    await assert.rejects(probe(channel), (error) => {
      assert.ok(error instanceof CallError, String(error));
      assert.deepEqual([error.code, error.origin, error.message], ["RESOURCE_EXHAUSTED", "server", "full"]);
      return true;
    });
  });
}

Deno.test("Channel says that it is not connected when nobody listens", async () => {
  const free = net.createServer();
  await new Promise<void>((resolve) => free.listen(0, "127.0.0.1", resolve));
  const address = free.address();
  assert.ok(typeof address === "object" && address !== null);
  await new Promise<void>((resolve) => free.close(() => resolve()));

  for (const target of [`127.0.0.1:${address.port}`, "unix:///nowhere/csi.sock"]) {
    using channel = new Channel({ address: target });
    await assert.rejects(probe(channel), (error) => {
      assert.ok(error instanceof CallError);
      assert.equal(error.code, "UNAVAILABLE");
      assert.equal(error.origin, "not connected");
      return true;
    });
  }
});

Deno.test("Channel gives up after connectTimeoutMs on a server that accepts and says nothing", async () => {
  const sockets: net.Socket[] = [];
  const mute = net.createServer((socket) => sockets.push(socket));
  await new Promise<void>((resolve) => mute.listen(0, "127.0.0.1", resolve));
  const address = mute.address();
  assert.ok(typeof address === "object" && address !== null);
  try {
    using channel = new Channel({ address: `127.0.0.1:${address.port}` });
    const begun = performance.now();

    const call = channel.call(Identity.method.probe, {}, {
      signal: patient(),
      deadline: soon(2000),
      connectTimeoutMs: 300,
    });
    await assert.rejects(call, (error) => {
      assert.ok(error instanceof CallError);
      // TCP stands, HTTP/2 may count as connected: then the deadline ends it, and the request may have been received.
      assert.match(error.code, /^(UNAVAILABLE|DEADLINE_EXCEEDED)$/);
      assert.equal(error.origin, error.code === "UNAVAILABLE" ? "not connected" : "no answer");
      return true;
    });
    assert.ok(performance.now() - begun < 5000);
  } finally {
    for (const socket of sockets) socket.destroy();
    mute.close();
  }
});

Deno.test("Channel does not wait for a connection beyond the deadline of the call", async () => {
  // An address of the documentation range: nothing answers, or a network says at once that it cannot be reached.
  using channel = new Channel({ address: "192.0.2.1:443" });
  const begun = performance.now();

  const call = channel.call(Identity.method.probe, {}, { signal: patient(), deadline: soon(300) });
  await assert.rejects(call, (error) => error instanceof CallError);
  assert.ok(performance.now() - begun < 2000);
});

Deno.test("Channel rejects with the signal's reason when it has aborted before, or aborts while connecting", async () => {
  using channel = new Channel({ address: "192.0.2.1:443" });
  const why = new Error("enough");
  await assert.rejects(probe(channel, { signal: AbortSignal.abort(why) }), (error) => error === why);

  const caller = new AbortController();
  const pending = probe(channel, { signal: caller.signal });
  setTimeout(() => caller.abort(why), 20);
  await assert.rejects(
    pending,
    (error) => error === why || error instanceof CallError && error.origin === "not connected",
  );
});

Deno.test("Channel ignores the environment's proxies", async () => {
  let asked = 0;
  const proxy = http.createServer((_request, response) => {
    asked++;
    response.end();
  });
  proxy.on("connect", (_request, socket) => {
    asked++;
    socket.destroy();
  });
  await new Promise<void>((resolve) => proxy.listen(0, "127.0.0.1", resolve));
  const address = proxy.address();
  assert.ok(typeof address === "object" && address !== null);
  const names = ["grpc_proxy", "http_proxy", "https_proxy"];
  const before = names.map((name) => [name, Deno.env.get(name)] as const);
  for (const name of names) Deno.env.set(name, `http://127.0.0.1:${address.port}`);
  const noProxy = ["no_proxy", "no_grpc_proxy"].map((name) => [name, Deno.env.get(name)] as const);
  for (const [name] of noProxy) Deno.env.delete(name);
  const server = await serve({
    listen: { host: "127.0.0.1", port: 0 },
    log: createLogger("error"),
    services: [service(Identity, { probe: ready })],
  });
  try {
    using channel = new Channel({ address: `127.0.0.1:${server.port}` });

    assert.equal((await probe(channel)).ready, true);
    assert.equal(asked, 0);
  } finally {
    await server.stop(1000);
    proxy.close();
    for (const [name, value] of [...before, ...noProxy]) {
      if (value === undefined) Deno.env.delete(name);
      else Deno.env.set(name, value);
    }
  }
});

// --------------------------------------------------------------------------------------------------------------- TLS

let certificates: Promise<readonly [Certificate, Certificate]> | undefined;
function twoCertificates(): Promise<readonly [Certificate, Certificate]> {
  return certificates ??= Promise.all([selfSigned([]), selfSigned([])]);
}

async function withTls(body: (port: number, ca: string, otherCa: string) => Promise<void>): Promise<void> {
  const [{ key, cert, ca }, other] = await twoCertificates();
  const server = await serve({
    // All addresses, so that one which is not in the certificate can be tried.
    listen: { host: "0.0.0.0", port: 0, tls: { key, cert } },
    log: createLogger("error"),
    services: [service(Identity, { probe: ready })],
  });
  try {
    await body(server.port, ca, other.ca);
  } finally {
    await server.stop(1000);
  }
}

function probeTls(address: string, tls: { readonly ca?: string; readonly verify: boolean }): Promise<ProbeResponse> {
  const channel = new Channel({ address, tls });
  return probe(channel).finally(() => channel[Symbol.dispose]());
}

Deno.test("promise 11: Channel accepts a server by name and by IP address when the given CA has signed for it", async () => {
  await withTls(async (port, ca) => {
    assert.equal((await probeTls(`localhost:${port}`, { ca, verify: true })).ready, true);
    assert.equal((await probeTls(`127.0.0.1:${port}`, { ca, verify: true })).ready, true);
  });
});

const notConnected = (error: unknown) => {
  assert.ok(error instanceof CallError, String(error));
  assert.equal(error.code, "UNAVAILABLE");
  assert.equal(error.origin, "not connected");
  return true;
};

Deno.test("promise 11: Channel refuses a server whose CA is another one, and one that no CA was given for", async () => {
  await withTls(async (port, _ca, otherCa) => {
    await assert.rejects(probeTls(`localhost:${port}`, { ca: otherCa, verify: true }), notConnected);
    await assert.rejects(probeTls(`127.0.0.1:${port}`, { ca: otherCa, verify: true }), notConnected);
    await assert.rejects(probeTls(`localhost:${port}`, { verify: true }), notConnected);
  });
});

Deno.test("promise 11: Channel refuses an IP address that is not in the certificate", async () => {
  await withTls(async (port, ca) => {
    await assert.rejects(probeTls(`127.0.0.2:${port}`, { ca, verify: true }), notConnected);
    // It is the address that is refused: without verification the same server answers there.
    assert.equal((await probeTls(`127.0.0.2:${port}`, { ca, verify: false })).ready, true);
  });
});

Deno.test("promise 11: Channel accepts any certificate when verification is turned off, and only then", async () => {
  await withTls(async (port, _ca, otherCa) => {
    assert.equal((await probeTls(`127.0.0.1:${port}`, { ca: otherCa, verify: false })).ready, true);
    assert.equal((await probeTls(`localhost:${port}`, { verify: false })).ready, true);
  });
});

Deno.test("Channel without TLS gets no answer from a server with TLS, and the other way round", async () => {
  await withTls(async (port) => {
    using plain = new Channel({ address: `127.0.0.1:${port}` });
    await assert.rejects(probe(plain, { deadline: soon(3000) }), CallError);
  });
  const server = await serve({
    listen: { host: "127.0.0.1", port: 0 },
    log: createLogger("error"),
    services: [service(Identity, { probe: ready })],
  });
  try {
    await assert.rejects(probeTls(`127.0.0.1:${server.port}`, { verify: false }), notConnected);
  } finally {
    await server.stop(1000);
  }
});

Deno.test("promise 28: shownCertificate shows what its server shows, and not what another one has shown before", async () => {
  const days = [10, 3650];
  const servers = await Promise.all(days.map(async (days) => {
    const certificate = await selfSigned(["lightos.example"], days);
    const server = await serve({
      listen: { host: "127.0.0.1", port: 0, tls: certificate },
      log: createLogger("error"),
      services: [service(Identity, { probe: ready })],
    });
    return { server, ca: certificate.ca, address: `127.0.0.1:${server.port}` };
  }));
  try {
    // Connections that live until the server has given them a session to resume, which it does before it says anything.
    for (const servername of ["lightos.example", "ip-address.invalid"]) {
      await new Promise<void>((resolve, reject) => {
        const port = servers[0]?.server.port ?? 0;
        const options = { host: "127.0.0.1", port, servername, ALPNProtocols: ["h2"], rejectUnauthorized: false };
        const socket = tls.connect(options, () => socket.write(preface));
        socket.once("error", reject);
        socket.once("data", () => {
          socket.destroy();
          resolve();
        });
      });
    }
    for (const serverName of [undefined, "lightos.example", "127.0.0.2"]) {
      for (let turn = 0; turn < 3; turn++) {
        for (const [at, { address, ca }] of servers.entries()) {
          const trust = { ca, verify: turn !== 1, ...(serverName === undefined ? {} : { serverName }) };
          const { validTo } = await shownCertificate(address, trust, patient());
          const left = (validTo.getTime() - Date.now()) / 86_400_000;
          assert.ok(Math.abs(left - (days[at] ?? 0)) < 1, `${address}, turn ${turn}: ${left} days`);
        }
      }
    }
  } finally {
    await Promise.all(servers.map(({ server }) => server.stop(0)));
  }
});

Deno.test("promise 28: connections to IP addresses share no TLS session with other endpoints, nor with other trust", async () => {
  const { ca } = await selfSigned([]);
  const ways: readonly Trust[] = [
    { verify: true },
    { verify: false },
    { verify: true, ca },
    { verify: true, pins: ["sha256//x"] },
    { verify: true, serverName: "127.0.0.2" },
  ];
  /** The names that connections to a server of its own send, each way tried twice. */
  const namesSent = async (): Promise<ReadonlySet<string>> => {
    const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const names = new Set<string>();
    const address = `127.0.0.1:${(listener.addr as Deno.NetAddr).port}`;
    const accepting = (async () => {
      for await (const connection of listener) {
        // The hello of TLS fits into it; nobody answers.
        const bytes = new Uint8Array(16_384);
        const length = await connection.read(bytes).catch(() => null) ?? 0;
        const hello = new TextDecoder("latin1").decode(bytes.subarray(0, length));
        names.add(/[\w.-]*\.invalid/.exec(hello)?.[0] ?? "none");
        connection.close();
      }
    })();
    for (const trust of [...ways, ...ways]) {
      using channel = new Channel({ address, tls: trust });
      await assert.rejects(channel.call(Identity.method.probe, {}, { signal: patient() }), CallError);
    }
    listener.close();
    await accepting;
    return names;
  };

  const [first, second] = [await namesSent(), await namesSent()];

  assert.equal(first.size, ways.length);
  assert.equal(first.union(second).size, 2 * ways.length);
  for (const name of first.union(second)) assert.match(name, /^ip-address-[0-9a-f]{16}\.invalid$/);
});

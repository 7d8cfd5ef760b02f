import assert from "node:assert/strict";
import { lstatSync } from "node:fs";
import { sleep } from "../../lib/timing.ts";
import { StatusError } from "../../lib/error.ts";
import { CallError } from "../../lib/grpc/client.ts";
import type { CallContext, ServeOptions } from "../../lib/grpc/server.ts";
import { Identity, SnapshotMetadata } from "../../proto/gen/csi_pb.ts";
import { frame, frames, preface, RawClient } from "../support/raw_http2.ts";
import {
  type IdentityHandlers,
  type MetadataHandlers,
  patient,
  probe,
  ready,
  soon,
  until,
  withServer,
} from "../support/rpc.ts";

// ------------------------------------------------------------------------------------------------- stopping, idling

Deno.test("stop lets a running call end, rejects new ones, and then closes", async () => {
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

Deno.test("promise 20: a handler that reacts to its signal reports what was slow", async () => {
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

Deno.test("promise 20: a StatusError arrives at the caller with its code and message", async () => {
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

Deno.test("serve logs quiet calls at debug, and their failures like all others", async () => {
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

Deno.test("before can reject a call by throwing, and sees its headers", async () => {
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
    // The handler pauses once the windows and buffers are full: a message has some 100 KiB.
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

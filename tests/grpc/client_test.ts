import assert from "node:assert/strict";
import http from "node:http";
import net from "node:net";
import tls from "node:tls";
import { CallError, Channel } from "../../lib/grpc/client.ts";
import { serve, service } from "../../lib/grpc/server.ts";
import { shownCertificate, type Trust } from "../../lib/grpc/tls.ts";
import { createLogger } from "../../lib/log.ts";
import { type Certificate, selfSigned } from "../../lib/simulator/certificate.ts";
import { Identity, type ProbeResponse } from "../../proto/gen/csi_pb.ts";
import { answerHttp2, type Http2Answer } from "../support/http2_answers.ts";
import { preface } from "../support/raw_http2.ts";
import { patient, probe, ready, soon, withServer } from "../support/rpc.ts";

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
    ["a compression that was not requested", {
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

Deno.test("Channel distinguishes an answer that is too large from a page", async () => {
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

Deno.test("Channel reports that it is not connected when no server listens", async () => {
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

Deno.test("promise 11: Channel rejects a server of another CA, and a server without a given CA", async () => {
  await withTls(async (port, _ca, otherCa) => {
    await assert.rejects(probeTls(`localhost:${port}`, { ca: otherCa, verify: true }), notConnected);
    await assert.rejects(probeTls(`127.0.0.1:${port}`, { ca: otherCa, verify: true }), notConnected);
    await assert.rejects(probeTls(`localhost:${port}`, { verify: true }), notConnected);
  });
});

Deno.test("promise 11: Channel rejects an IP address that is not in the certificate", async () => {
  await withTls(async (port, ca) => {
    await assert.rejects(probeTls(`127.0.0.2:${port}`, { ca, verify: true }), notConnected);
    // The address is the reason: without verification the same server answers there.
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
        // The TLS ClientHello fits into it, and no answer follows.
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

import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { mkdtempSync, rmSync } from "node:fs";
import http2 from "node:http2";
import net from "node:net";
import type { Duplex } from "node:stream";
import { acceptAnyAuthority, AuthorityFilter } from "../../lib/grpc/authority.ts";
import { HpackDecoder } from "../../lib/grpc/hpack.ts";
import { serve, service } from "../../lib/grpc/server.ts";
import { createLogger } from "../../lib/log.ts";
import { Identity } from "../../proto/gen/csi_pb.ts";
import {
  emptyMessage,
  type Encoding,
  flags,
  frame,
  frames,
  type Header,
  preface,
  RawClient,
  RawEncoder,
  type RawHeader,
  type Reply,
} from "../support/raw_http2.ts";

const probePath = "/csi.v1.Identity/Probe";

/** The headers of a Probe call, with `authority` where `:authority` belongs; undefined leaves it out. */
function probeHeaders(
  authority: string | RawHeader | undefined,
  extra: readonly Header[] = [],
): readonly (Header | RawHeader)[] {
  return [
    [":method", "POST"],
    [":scheme", "http"],
    [":path", probePath],
    ...(authority === undefined
      ? []
      : [typeof authority === "string" ? [":authority", authority] as const : authority]),
    ["content-type", "application/grpc"],
    ["user-agent", "grpc-go/1.27.0"],
    ["te", "trailers"],
    ...extra,
  ];
}

/** Serves Identity on a socket of its own; `mark` is the header that each Probe carried, in their order. */
async function withServer(body: (path: string, marks: (string | undefined)[]) => Promise<void>): Promise<void> {
  const directory = mkdtempSync("/tmp/lbcsi-authority-");
  const marks: (string | undefined)[] = [];
  const server = await serve({
    listen: { path: `${directory}/csi.sock` },
    log: createLogger("error"),
    services: [service(Identity, {
      probe: (_request, call) => {
        marks.push(call.header("x-mark"));
        return Promise.resolve({ ready: true });
      },
      getPluginInfo: () => Promise.resolve({ name: "a driver", manifest: { filler: "x".repeat(1 << 20) } }),
    })],
  });
  try {
    await body(`${directory}/csi.sock`, marks);
  } finally {
    await server.stop(1000);
    rmSync(directory, { recursive: true });
  }
}

const settings = frame(frames.settings, 0, 0);

async function connect(path: string): Promise<RawClient> {
  const client = new RawClient(path);
  // As grpc-go does: nothing is sent before the server's SETTINGS are here.
  await client.send(Buffer.concat([preface, settings]));
  await client.settings;
  return client;
}

function request(stream: number, headerBlock: Uint8Array): Buffer {
  return Buffer.concat([
    frame(frames.headers, flags.endHeaders, stream, headerBlock),
    frame(frames.data, flags.endStream, stream, emptyMessage),
  ]);
}

function assertServed(reply: Reply): void {
  assert.equal(reply.headers.get(":status"), "200");
  assert.equal(reply.trailers.get("grpc-status"), "0");
  assert.equal(reply.body.subarray(5).toString("hex"), "0a020801"); // ProbeResponse { ready { value: true } }
}

const forms: readonly (readonly [what: string, authority: string | RawHeader | undefined])[] = [
  ["the path of the socket", "/csi/csi.sock"],
  ["a long path", "/var/lib/kubelet/plugins/csi.lightbitslabs.com/csi.sock"],
  ["a unix URL", "unix:///csi/csi.sock"],
  ["a passthrough URL", "passthrough:///unix:///csi/csi.sock"],
  ["a name with @", "user@host"],
  ["a name with a space", "no host"],
  ["a name with bytes above 127", "h\xf6st"],
  ["an empty one", ""],
  ["an empty one as static index 1", Buffer.of(0x81)],
  ["none", undefined],
  ["the percent-encoded path", "%2Fcsi%2Fcsi.sock"],
  ["localhost", "localhost"],
];

for (const [what, authority] of forms) {
  for (const encoding of ["plain", "huffman", "indexed"] satisfies readonly Encoding[]) {
    Deno.test(`acceptAnyAuthority serves three calls on one connection with ${what} as :authority, ${encoding}`, async () => {
      await withServer(async (path, marks) => {
        using client = await connect(path);

        for (const stream of [1, 3, 5]) {
          const reply = client.reply(stream);
          const headers = probeHeaders(authority, [["x-mark", `call-${stream}`]]);
          await client.send(request(stream, client.encoder.encode(headers, encoding)));
          assertServed(await reply);
        }

        assert.deepEqual(marks, ["call-1", "call-3", "call-5"]);
      });
    });
  }
  Deno.test(`acceptAnyAuthority serves ${what} as :authority when every byte arrives on its own`, async () => {
    await withServer(async (path, marks) => {
      using client = new RawClient(path);
      const reply = client.reply(1);
      const headers = probeHeaders(authority, [["x-mark", "slow"]]);
      const bytes = Buffer.concat([preface, settings, request(1, client.encoder.encode(headers, "indexed"))]);

      await client.send(bytes, "bytes");

      assertServed(await reply);
      assert.deepEqual(marks, ["slow"]);
    });
  });
}

Deno.test("acceptAnyAuthority leaves alone only what node:http2 accepts by itself, for every single character", async () => {
  const directory = mkdtempSync("/tmp/lbcsi-authority-");
  const server = http2.createServer((_request, response) => response.end("served"));
  await new Promise<void>((resolve) => server.listen(`${directory}/plain.sock`, resolve));
  const served = async (authority: string | RawHeader | undefined) => {
    using client = await connect(`${directory}/plain.sock`);
    const reply = client.reply(1).then(() => true, () => false);
    await client.send(request(1, client.encoder.encode(probeHeaders(authority), "plain")));
    return await reply;
  };
  const touched = (authority: string) => {
    const bytes = Buffer.concat([preface, request(1, new RawEncoder().encode(probeHeaders(authority), "plain"))]);
    return !Buffer.concat(new AuthorityFilter().push(bytes)).equals(bytes);
  };
  try {
    for (let code = 0; code < 256; code++) {
      const authority = `a${String.fromCharCode(code)}b`;
      if (!touched(authority)) assert.ok(await served(authority), `character ${code}`);
    }
    // And the rewriting is needed: none of the forms above is served without it, but for the last two.
    for (const [what, authority] of forms.slice(0, -2)) assert.equal(await served(authority), false, what);
    assert.equal(touched("localhost"), false);
    assert.equal(touched("%2Fcsi%2Fcsi.sock"), false);
    assert.equal(touched("[::1]:50051"), false);
  } finally {
    await new Promise<void>((resolve) => server.close(() => resolve()));
    rmSync(directory, { recursive: true });
  }
});

Deno.test("acceptAnyAuthority serves a request with padding, priority, CONTINUATION frames and never-indexed headers", async () => {
  await withServer(async (path, marks) => {
    using client = await connect(path);
    const secret = Buffer.concat([Buffer.of(0x10, 13), Buffer.from("authorization"), Buffer.of(3), Buffer.from("abc")]);
    const headers = [...probeHeaders("/csi/csi.sock", [["x-mark", "in pieces"]]), secret];
    const block = client.encoder.encode(headers, "indexed");
    const first = Buffer.concat([
      Buffer.of(7), // bytes of padding
      Buffer.of(0, 0, 0, 0, 15), // priority: depends on stream 0, weight 16
      block.subarray(0, 10),
      Buffer.alloc(7),
    ]);
    const reply = client.reply(1);

    await client.send(Buffer.concat([
      frame(frames.ping, 0, 0, Buffer.alloc(8)),
      frame(frames.headers, flags.padded | flags.priority, 1, first),
      frame(frames.continuation, 0, 1),
      frame(frames.continuation, 0, 1, block.subarray(10, 30)),
      frame(frames.continuation, flags.endHeaders, 1, block.subarray(30)),
      frame(frames.data, flags.endStream, 1, emptyMessage),
    ]));

    assertServed(await reply);
    assert.deepEqual(marks, ["in pieces"]);
  });
});

Deno.test("acceptAnyAuthority follows table size updates and evictions of the client", async () => {
  await withServer(async (path, marks) => {
    using client = await connect(path);
    const mark = (value: string) => new RawEncoder().encode([["x-mark", value]], "indexed");
    const plain = new RawEncoder().encode(probeHeaders("/csi/csi.sock"), "plain");
    const blocks = [
      [plain, mark("first")],
      // The table shrinks to nothing and grows again, so that 62 is the entry which this block adds.
      [Buffer.of(0x20, 0x3f, 0xe1, 0x1f), plain, mark("second")],
      [plain, Buffer.of(0x80 | 62)],
    ];

    for (const [index, block] of blocks.entries()) {
      const reply = client.reply(2 * index + 1);
      await client.send(request(2 * index + 1, Buffer.concat(block)));
      assertServed(await reply);
    }

    assert.deepEqual(marks, ["first", "second", "second"]);
  });
});

Deno.test("acceptAnyAuthority serves calls that overlap on one connection, with 1 MiB replies", async () => {
  await withServer(async (path) => {
    using client = await connect(path);
    // Windows of 16 MiB for the connection and each stream: the client never has to give more.
    const window = Buffer.alloc(4);
    window.writeUInt32BE(16 << 20);
    await client.send(frame(8, 0, 0, window));
    const info = probeHeaders("unix:///csi/csi.sock").map((header) =>
      header instanceof Uint8Array || header[1] !== probePath
        ? header
        : [":path", "/csi.v1.Identity/GetPluginInfo"] as const
    );
    const streams = [1, 3, 5, 7, 9];
    const replies = streams.map((stream) => client.reply(stream));

    for (const stream of streams) {
      await client.send(Buffer.concat([
        frame(frames.headers, flags.endHeaders, stream, client.encoder.encode(info, "indexed")),
        frame(8, 0, stream, window),
        frame(frames.data, flags.endStream, stream, emptyMessage),
      ]));
    }

    for (const reply of await Promise.all(replies)) {
      assert.equal(reply.trailers.get("grpc-status"), "0");
      assert.ok(reply.body.length > 1 << 20);
    }
  });
});

Deno.test("acceptAnyAuthority leaves it to the server to reject what is not HTTP/2", async () => {
  await withServer(async (path) => {
    using client = new RawClient(path);

    await client.send(Buffer.from("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"));

    assert.match(await client.ended, /^(GOAWAY 1|GOAWAY 2|closed)$/);
  });
});

const badFirstRequests: readonly (readonly [what: string, bytes: Buffer, end: RegExp])[] = [
  ["a header block that cannot be decoded", request(1, Buffer.of(0x80 | 100)), /^(GOAWAY 9|closed)$/],
  [
    "DATA in the middle of a header block",
    Buffer.concat([
      frame(frames.headers, 0, 1, new RawEncoder().encode(probeHeaders("/x"), "plain")),
      frame(frames.data, flags.endStream, 1, emptyMessage),
    ]),
    /^(GOAWAY 1|closed)$/,
  ],
  [
    "CONTINUATION without HEADERS",
    frame(frames.continuation, flags.endHeaders, 1, Buffer.alloc(1)),
    /^(GOAWAY 1|closed)$/,
  ],
  [
    "a HEADERS frame above 16 KiB",
    frame(frames.headers, flags.endHeaders, 1, Buffer.alloc(16_385)),
    /^(GOAWAY 6|closed)$/,
  ],
  [
    "more padding than frame",
    frame(frames.headers, flags.endHeaders | flags.padded, 1, Buffer.of(9)),
    /^(GOAWAY 1|closed)$/,
  ],
  [
    "an endless header block",
    Buffer.concat([
      frame(frames.headers, 0, 1),
      ...Array.from({ length: 17 }, () => frame(frames.continuation, 0, 1, Buffer.alloc(16_384))),
    ]),
    /^(GOAWAY \d+|closed)$/,
  ],
];

for (const [what, bytes, end] of badFirstRequests) {
  Deno.test(`acceptAnyAuthority ends a connection that begins with ${what}, and serves the next`, async () => {
    await withServer(async (path) => {
      using bad = await connect(path);
      await bad.send(bytes);
      assert.match(await bad.ended, end);

      using good = await connect(path);
      const reply = good.reply(1);
      await good.send(request(1, good.encoder.encode(probeHeaders("/csi/csi.sock"), "plain")));
      assertServed(await reply);
    });
  });
}

Deno.test("acceptAnyAuthority ends a connection whose later header block is malformed, and serves the next", async () => {
  await withServer(async (path) => {
    using bad = await connect(path);
    const first = bad.reply(1);
    await bad.send(request(1, bad.encoder.encode(probeHeaders("/csi/csi.sock"), "indexed")));
    assertServed(await first);
    await bad.send(request(3, Buffer.of(0x80 | 100)));
    assert.equal(await bad.ended, "closed");

    using good = await connect(path);
    const reply = good.reply(1);
    await good.send(request(1, good.encoder.encode(probeHeaders("/csi/csi.sock"), "plain")));
    assertServed(await reply);
  });
});

Deno.test("acceptAnyAuthority survives callers that hang up at every byte of their first request", async () => {
  await withServer(async (path) => {
    const bytes = Buffer.concat([preface, settings, request(1, new RawEncoder().encode(probeHeaders("/x"), "plain"))]);
    for (let length = 0; length <= bytes.length; length += 3) {
      using client = new RawClient(path);
      await client.send(bytes.subarray(0, length));
      client.socket.end();
      // Each is closed: our side keeps no half-closed connection.
      await client.ended;
    }

    using good = await connect(path);
    const reply = good.reply(1);
    await good.send(request(1, good.encoder.encode(probeHeaders("/csi/csi.sock"), "plain")));
    assertServed(await reply);
  });
});

// ------------------------------------------------------------------------------------- the filter and the stream alone

/** The header blocks in `bytes`, decoded each by a decoder of its own: they must not depend on each other. */
function decodeAlone(bytes: Buffer): { type: number; flags: number; stream: number; fields: Map<string, string> }[] {
  const out = [];
  let at = bytes.subarray(0, preface.length).equals(preface) ? preface.length : 0;
  let block = Buffer.alloc(0);
  let begin = { flags: 0, type: 0 };
  for (; at < bytes.length;) {
    const length = bytes.readUIntBE(at, 3);
    const [type, bits, stream] = [bytes.readUInt8(at + 3), bytes.readUInt8(at + 4), bytes.readUInt32BE(at + 5)];
    const payload = bytes.subarray(at + 9, at + 9 + length);
    at += 9 + length;
    assert.ok(length <= 16_384);
    if (type !== frames.headers && type !== frames.continuation) continue;
    if (type === frames.headers) {
      begin = { flags: bits, type };
      block = Buffer.from(payload.subarray(bits & flags.priority ? 5 : 0));
      assert.equal(bits & flags.padded, 0);
    } else {
      block = Buffer.concat([block, payload]);
    }
    if (!(bits & flags.endHeaders)) continue;
    const fields = new HpackDecoder().decode(block, 1 << 20);
    out.push({ ...begin, stream, fields: new Map(fields.map(({ name, value }) => [name, value])) });
  }
  return out;
}

Deno.test("AuthorityFilter answers the same bytes however the input is cut", () => {
  const encoder = new RawEncoder();
  const input = Buffer.concat([
    preface,
    settings,
    ...[1, 3, 5].map((stream) => request(stream, encoder.encode(probeHeaders("/csi/csi.sock"), "indexed"))),
    frame(frames.goaway, 0, 0, Buffer.alloc(8)),
  ]);
  const whole = Buffer.concat(new AuthorityFilter().push(input));
  assert.deepEqual(decodeAlone(whole).map(({ fields }) => fields.get(":authority")), Array(3).fill("localhost"));

  for (let first = 0; first <= input.length; first++) {
    const filter = new AuthorityFilter();
    const parts = [...filter.push(input.subarray(0, first)), ...filter.push(input.subarray(first))];
    assert.ok(Buffer.concat(parts).equals(whole), `cut at ${first}`);
  }
  for (const size of [1, 2, 3, 7, 9, 64]) {
    const filter = new AuthorityFilter();
    const parts: Buffer[] = [];
    for (let at = 0; at < input.length; at += size) parts.push(...filter.push(input.subarray(at, at + size)));
    assert.ok(Buffer.concat(parts).equals(whole), `pieces of ${size}`);
  }
});

Deno.test("AuthorityFilter passes SETTINGS and the bytes of an acceptable client on as they come", () => {
  const filter = new AuthorityFilter();
  const encoder = new RawEncoder();
  const opening = Buffer.concat([preface, settings]);
  assert.ok(Buffer.concat(filter.push(opening)).equals(opening));

  for (const stream of [1, 3]) {
    const bytes = request(stream, encoder.encode(probeHeaders("localhost"), "indexed"));
    assert.ok(Buffer.concat(filter.push(bytes)).equals(bytes));
  }
  const garbage = randomBytes(100);
  assert.ok(Buffer.concat(filter.push(garbage)).equals(garbage));
});

Deno.test("AuthorityFilter leaves trailers and their END_STREAM alone", () => {
  const encoder = new RawEncoder();
  const filter = new AuthorityFilter();
  const input = Buffer.concat([
    preface,
    frame(frames.headers, flags.endHeaders, 1, encoder.encode(probeHeaders(""), "indexed")),
    frame(frames.data, 0, 1, emptyMessage),
    frame(frames.headers, flags.endHeaders | flags.endStream, 1, encoder.encode([["x-end", "1"]], "indexed")),
  ]);

  const blocks = decodeAlone(Buffer.concat(filter.push(input)));

  assert.equal(blocks.length, 2);
  assert.deepEqual(blocks[1]?.fields, new Map([["x-end", "1"]]));
  assert.equal(blocks[1]?.flags, flags.endHeaders | flags.endStream);
});

Deno.test("AuthorityFilter puts the authority after the other pseudo headers and drops a host header", () => {
  const block = new RawEncoder().encode([...probeHeaders("/x"), ["host", "/x"]], "plain");

  const [request] = decodeAlone(Buffer.concat(
    new AuthorityFilter().push(Buffer.concat([
      preface,
      frame(frames.headers, flags.endHeaders, 1, block),
    ])),
  ));

  const names = [...request?.fields.keys() ?? []];
  assert.deepEqual(names, [":method", ":scheme", ":path", ":authority", "content-type", "user-agent", "te"]);
});

Deno.test("AuthorityFilter splits a large header block into frames of 16 KiB", () => {
  const encoder = new RawEncoder();
  const large = Array.from({ length: 200 }, (_, i) => [`x-${i}`, "v".repeat(200)] as const);
  const block = encoder.encode([...probeHeaders("/x"), ...large], "plain");
  const cut = [block.subarray(0, 10_000), block.subarray(10_000, 26_000), block.subarray(26_000)];

  const out = Buffer.concat(
    new AuthorityFilter().push(Buffer.concat([
      preface,
      frame(frames.headers, flags.endStream, 1, cut[0]),
      frame(frames.continuation, 0, 1, cut[1]),
      frame(frames.continuation, flags.endHeaders, 1, cut[2]),
    ])),
  );

  const [request] = decodeAlone(out);
  assert.equal(request?.flags, flags.endStream);
  assert.equal(request?.fields.get(":authority"), "localhost");
  for (const [name, value] of large) assert.equal(request?.fields.get(name), value);
});

Deno.test("AuthorityFilter rejects a header block of more than 256 KiB", () => {
  const filter = new AuthorityFilter();
  filter.push(preface);
  filter.push(frame(frames.headers, 0, 1));

  assert.throws(() => {
    for (let i = 0; i < 17; i++) filter.push(frame(frames.continuation, 0, 1, Buffer.alloc(16_384)));
  }, { message: "Cannot read a client's headers: they have more than 262144 bytes" });
});

Deno.test("AuthorityFilter rejects a small header block that expands to more than 256 KiB", () => {
  const filter = new AuthorityFilter();
  const encoder = new RawEncoder();
  filter.push(
    Buffer.concat([preface, request(1, encoder.encode(probeHeaders("/x", [["x", "v".repeat(250)]]), "indexed"))]),
  );

  assert.throws(
    () => filter.push(request(3, Buffer.alloc(2000, 0x80 | 62))),
    { message: "Cannot read a client's headers: the header fields have more than 262144 bytes" },
  );
});

/** Both ends of a unix socket, the server's behind acceptAnyAuthority. */
async function withPair(body: (client: net.Socket, server: Duplex, inner: net.Socket) => Promise<void>): Promise<void> {
  const directory = mkdtempSync("/tmp/lbcsi-authority-");
  const accepted = Promise.withResolvers<net.Socket>();
  const listener = net.createServer({ allowHalfOpen: true }, accepted.resolve);
  await new Promise<void>((resolve) => listener.listen(`${directory}/pair.sock`, resolve));
  const client = net.connect({ path: `${directory}/pair.sock`, allowHalfOpen: true });
  const inner = await accepted.promise;
  const server = acceptAnyAuthority(inner);
  try {
    await body(client, server, inner);
  } finally {
    client.destroy();
    server.destroy();
    await new Promise<void>((resolve) => listener.close(() => resolve()));
    rmSync(directory, { recursive: true });
  }
}

Deno.test("acceptAnyAuthority carries 32 MiB both ways at once, unchanged, and ends each way on its own", async () => {
  await withPair(async (client, server) => {
    const payload = randomBytes(32 << 20);
    const opening = Buffer.concat([preface, request(1, new RawEncoder().encode(probeHeaders("localhost"), "plain"))]);
    const up = Buffer.concat([opening, payload]);
    const digest = async (stream: Duplex) => {
      const hash = createHash("sha256");
      for await (const chunk of stream.iterator({ destroyOnReturn: false })) hash.update(chunk as Buffer);
      return hash.digest("hex");
    };

    const [atServer, atClient] = [digest(server), digest(client)];
    client.end(up);
    assert.equal(await atServer, createHash("sha256").update(up).digest("hex"));
    // The client's way has ended; ours is still open.
    server.end(payload);

    assert.equal(await atClient, createHash("sha256").update(payload).digest("hex"));
  });
});

Deno.test("acceptAnyAuthority passes our own end on while the client still sends", async () => {
  await withPair(async (client, server) => {
    const received: Buffer[] = [];
    server.on("data", (chunk: Buffer) => received.push(chunk));
    let ended = false;
    client.once("end", () => ended = true);
    client.resume();

    server.end("bye");
    await until(() => ended);
    client.end(preface);

    await until(() => Buffer.concat(received).equals(preface));
  });
});

Deno.test("acceptAnyAuthority stops reading from a client while our side does not read", async () => {
  await withPair(async (client, server, inner) => {
    const total = 32 << 20;
    let flushed = false;
    client.write(Buffer.concat([preface, frame(99, 0, 0), Buffer.alloc(total)]), () => flushed = true);
    server.once("readable", () => {});
    server.read(1);
    let before = 0;
    while (before === 0 || before !== inner.bytesRead) {
      before = inner.bytesRead;
      assert.ok(before < total / 2);
      await new Promise((resolve) => setTimeout(resolve, 250));
    }

    assert.ok(before < 2 << 20, `${before} bytes were read ahead`);
    assert.equal(flushed, false);

    server.resume();
    await until(() => flushed);
  });
});

Deno.test("acceptAnyAuthority holds a writer back while the client does not read", async () => {
  await withPair(async (client, server) => {
    client.pause();
    const wrote = server.write(Buffer.alloc(8 << 20));
    assert.equal(wrote, false);
    let drained = false;
    server.once("drain", () => drained = true);
    await new Promise((resolve) => setTimeout(resolve, 100));
    assert.equal(drained, false);

    client.resume();
    await until(() => drained);
  });
});

Deno.test("acceptAnyAuthority closes when the client is gone, and destroys the socket when it is destroyed", async () => {
  await withPair(async (client, server) => {
    const closed = new Promise<void>((resolve) => server.once("close", () => resolve()));
    server.on("error", () => {});
    server.resume();
    client.destroy();
    server.end();
    await closed;
  });
  await withPair(async (client, server, inner) => {
    const closed = new Promise<void>((resolve) => client.once("close", () => resolve()));
    client.on("error", () => {});
    client.resume();
    server.destroy();
    client.end();
    await closed;
    assert.equal(inner.destroyed, true);
  });
});

async function until(condition: () => boolean): Promise<void> {
  const deadline = Date.now() + 10_000;
  while (!condition()) {
    assert.ok(Date.now() < deadline, `still not: ${condition}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

import assert from "node:assert/strict";
import net from "node:net";
import { fate, support } from "../support/goaway.ts";
import { frame, frames } from "../support/raw_http2.ts";

Deno.test("serve lives through clients that send GOAWAY when they close", async () => {
  assert.deepEqual(await fate((path) => [support("probe_server.ts"), path], 2, 50), { end: "alive", served: 2 });
});

Deno.test("the tests above notice a server without the guard of lib/grpc/goaway.ts", async () => {
  // When this fails after an upgrade of Deno, denoland/deno#36788 may be fixed, and the guard can go.
  const { end } = await fate((path) => [support("unguarded_probe_server.ts"), path], 3, 50);

  assert.match(end, /^SIG(SEGV|ABRT|BUS|ILL)$/);
});

Deno.test("promise 27: a server that says GOAWAY together with its first SETTINGS does not stop the process", async () => {
  // As a server does that stops while a connection is being made: both frames come in one read.
  const server = net.createServer((socket) => {
    socket.on("error", () => {});
    socket.once("data", () => socket.end(Buffer.concat([frame(frames.settings, 0, 0), goaway(0, "")])));
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as net.AddressInfo;
  try {
    // A process of its own: one that hangs cannot say so.
    const child = new Deno.Command(Deno.execPath(), {
      args: ["run", "-A", "--no-check", "--quiet", support("failing_client.ts"), `127.0.0.1:${port}`, "3"],
      stdout: "null",
      stderr: "null",
    }).spawn();
    const killer = setTimeout(() => child.kill("SIGKILL"), 60_000);
    const status = await child.status;
    clearTimeout(killer);

    assert.deepEqual([status.code, status.signal], [0, null]);
  } finally {
    server.close();
  }
});

for (const delayMs of [0, 5, 25, 100]) {
  Deno.test(`promise 27: a server that says GOAWAY ${delayMs} ms after the connection, to calls that give up, stops no process`, async () => {
    const server = net.createServer((socket) => {
      socket.on("error", () => {});
      const both = Buffer.concat([frame(frames.settings, 0, 0), goaway(0, "")]);
      socket.once("data", () => setTimeout(() => socket.end(both), delayMs));
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const { port } = server.address() as net.AddressInfo;
    try {
      const child = new Deno.Command(Deno.execPath(), {
        args: ["run", "-A", "--no-check", "--quiet", support("failing_client.ts"), `127.0.0.1:${port}`, "10", "20"],
        env: { MALLOC_PERTURB_: "165" },
        stdout: "null",
        stderr: "null",
      }).spawn();
      const killer = setTimeout(() => child.kill("SIGKILL"), 60_000);
      const status = await child.status;
      clearTimeout(killer);

      assert.deepEqual([status.code, status.signal], [0, null]);
    } finally {
      server.close();
    }
  });
}

function goaway(code: number, words: string): Buffer {
  const head = Buffer.alloc(8);
  head.writeUInt32BE(code, 4);
  return frame(frames.goaway, 0, 0, Buffer.concat([head, Buffer.from(words)]));
}

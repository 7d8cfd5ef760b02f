import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { serve, service } from "../../lib/grpc/server.ts";
import { createLogger } from "../../lib/log.ts";
import { Identity } from "../../proto/gen/csi_pb.ts";
import { unlessGoLacks } from "../support/go.ts";
import { needs } from "../support/needs.ts";

/** Builds a program under tests/go and gives its path. */
async function build(name: string, directory: string): Promise<string> {
  const binary = `${directory}/${name}`;
  const { success, stderr } = await new Deno.Command("go", {
    args: ["build", "-o", binary, "."],
    cwd: fileURLToPath(new URL(`../go/${name}`, import.meta.url)),
    env: { GOFLAGS: "-mod=readonly -buildvcs=false", GOWORK: "off", GOTOOLCHAIN: "local" },
    stdout: "null",
    stderr: "piped",
  }).output();
  if (!success) throw new Error(`tests/go/${name} is not built: ${new TextDecoder().decode(stderr)}`);
  return binary;
}

/** Runs a client against a server in this process; `:authority` as the server saw it cannot be asked, its calls can. */
async function run(name: string, calls: number, connections: number): Promise<void> {
  const directory = mkdtempSync("/tmp/lbcsi-go-");
  try {
    const binary = await unlessGoLacks(() => build(name, directory));
    if (binary === undefined) return;
    const path = `${directory}/csi.sock`;
    let probes = 0;
    const agents = new Set<string | undefined>();
    const server = await serve({
      listen: { path },
      log: createLogger("error"),
      services: [service(Identity, {
        probe: (_request, call) => {
          probes++;
          agents.add(call.header("user-agent"));
          return Promise.resolve({ ready: true });
        },
      })],
    });
    try {
      const client = await new Deno.Command(binary, {
        args: [path, String(calls), String(connections)],
        stdout: "piped",
        stderr: "piped",
      }).output();

      assert.equal(new TextDecoder().decode(client.stderr), "");
      assert.equal(client.code, 0);
      const lines = new TextDecoder().decode(client.stdout).trim().split("\n");
      assert.equal(lines.length, calls * connections);
      // ProbeResponse { ready { value: true } }
      for (const line of lines) assert.match(line, /: 0a020801$/);
      assert.equal(probes, calls * connections);
      assert.match([...agents].join(), /^grpc-go\//);
    } finally {
      await server.stop(1000);
    }
  } finally {
    rmSync(directory, { recursive: true });
  }
}

Deno.test({
  name: "serve answers an old Go client whose :authority is the socket path, over one connection and over new ones",
  ignore: !needs("go"),
  fn: async () => {
    await run("old_client", 10, 1);
    await run("old_client", 3, 20);
  },
});

Deno.test({
  name: "serve answers a Go client of today, which sends GOAWAY on each close",
  ignore: !needs("go"),
  fn: async () => {
    await run("new_client", 10, 1);
    await run("new_client", 3, 50);
  },
});

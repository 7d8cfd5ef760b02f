/** An uncaught exception ends only the work that it came from; a process that cannot serve ends. */
import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert/strict";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { Testbed } from "../../lib/demo/testbed.ts";
import { CallError, Channel } from "../../lib/grpc/client.ts";
import { Controller, Identity, VolumeCapability_AccessMode_Mode as Mode } from "../../proto/gen/csi_pb.ts";
import { mainPath } from "../support/lbcsi.ts";
import { eventually } from "../support/simulator.ts";

function run(...args: readonly string[]) {
  const directory = mkdtempSync("/tmp/lbcsi-uncaught-");
  const path = `${directory}/csi.sock`;
  const child = new Deno.Command(Deno.execPath(), {
    args: [
      "run",
      "-A",
      "--no-check",
      "--quiet",
      fileURLToPath(new URL("../support/throwing_server.ts", import.meta.url)),
    ]
      .concat(path, ...args),
    stdout: "null",
    stderr: "piped",
  }).spawn();
  let isEnded = false;
  const output = child.output().finally(() => isEnded = true);
  return {
    path,
    kill: () => isEnded ? undefined : child.kill("SIGKILL"),
    output: output.then(({ code, signal, stderr }) => ({ code, signal, stderr: new TextDecoder().decode(stderr) })),
    async [Symbol.asyncDispose]() {
      if (!isEnded) child.kill("SIGKILL");
      await output;
      rmSync(directory, { recursive: true });
    },
  };
}

Deno.test("promise 27: a process that serves continues after exceptions in callbacks, and logs each", async () => {
  await using server = await run("after");
  await eventually("the server listens", () => existsSync(server.path), 60_000);
  using channel = new Channel({ address: `unix://${server.path}` });

  await eventually("all exceptions are thrown, and it answers", async () => {
    return (await channel.call(Identity.method.probe, {}, { signal: AbortSignal.timeout(20_000) })).ready;
  }, 60_000);

  server.kill();
  const { stderr } = await server.output;
  const lines = stderr.trim().split("\n").map((line) => JSON.parse(line));
  deepStrictEqual(
    lines.map(({ event, error }) => [event, String(error).split("\n")[0]]).sort(),
    ["Error: out of a callback", "Error: that no code handles", "Uncaught null"].map((error) => [
      "continues after an uncaught exception",
      error,
    ]),
  );
});

Deno.test("a process that throws before it serves ends with a failure status", async () => {
  await using server = await run("before");

  const { code, signal } = await server.output;

  deepStrictEqual([code, signal], [1, null]);
});

Deno.test("a process that cannot serve after an exception ends with a failure status", async () => {
  await using server = await run("after", "deaf");

  const { code, signal, stderr } = await server.output;

  deepStrictEqual([code, signal], [1, null]);
  match(stderr, /cannot serve after an uncaught exception, exits/);
});

Deno.test("promise 27: a Secret with a damaged certificate fails its own calls, and the controller continues to serve", async () => {
  const home = await Deno.makeTempDir({ prefix: "lbcsi-pem-" });
  const testbed = new Testbed(home, [
    Deno.execPath(),
    "run",
    "-A",
    mainPath,
  ]);
  const patience = AbortSignal.timeout(120_000);
  try {
    await testbed.startSimulator("none", patience);
    await testbed.startService("controller", [], patience);
    const good = testbed.addresses.ca ?? "";
    ok(good);
    const create = (ca: string) =>
      testbed.controller.call(Controller.method.createVolume, {
        name: "pvc-1",
        capacityRange: { requiredBytes: 1n << 30n },
        volumeCapabilities: [{
          accessType: { case: "block", value: {} },
          accessMode: { mode: Mode.SINGLE_NODE_WRITER },
        }],
        parameters: testbed.parameters,
        secrets: { ...testbed.secrets, "mgmt-ca.crt": ca },
      }, { signal: patience, deadline: new Date(Date.now() + 30_000) });

    for (const body of ["", "AAAA", "!!!!"]) {
      const bad = `${good}-----BEGIN CERTIFICATE-----\n${body}\n-----END CERTIFICATE-----\n`;
      await rejects(create(bad), (error) => {
        ok(error instanceof CallError, String(error));
        deepStrictEqual([error.code, error.origin], ["INVALID_ARGUMENT", "server"], error.message);
        match(error.message, /^Cannot use the secrets of this call: mgmt-ca\.crt: has a bad block: certificate 2 /);
        return true;
      });
    }

    strictEqual((await create(good)).volume?.capacityBytes, 1n << 30n);
  } finally {
    await testbed.stopAll();
    await testbed.cleanUp(false);
  }
});

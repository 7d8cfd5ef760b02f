/** Which CAs a process takes that was given none: the machine's. */
import { match, ok, rejects, strictEqual } from "node:assert/strict";
import { join } from "node:path";
import { permissionsWith } from "../../k8s/image/permissions.ts";
import { Testbed } from "../../lib/demo/testbed.ts";
import { CallError } from "../../lib/grpc/client.ts";
import { Controller, VolumeCapability_AccessMode_Mode as Mode } from "../../proto/gen/csi_pb.ts";
import { mainPath } from "../support/lbcsi.ts";

Deno.test("promise 11: without --mgmt-ca, a controller trusts the CAs in SSL_CERT_FILE, and not any other", async () => {
  const home = await Deno.makeTempDir({ prefix: "lbcsi-ca-" });
  const program = [Deno.execPath(), "run", "-A", mainPath];
  const testbed = new Testbed(home, program);
  const patience = AbortSignal.timeout(60_000);
  try {
    await testbed.startSimulator("none", patience);
    const ca = join(home, "machine.pem");
    await Deno.writeTextFile(ca, testbed.addresses.ca ?? "");
    const create = () =>
      testbed.controller.call(Controller.method.createVolume, {
        name: "pvc-1",
        capacityRange: { requiredBytes: 1n << 30n },
        volumeCapabilities: [{
          accessType: { case: "block", value: {} },
          accessMode: { mode: Mode.SINGLE_NODE_WRITER },
        }],
        parameters: testbed.parameters,
        secrets: testbed.secrets,
      }, { signal: patience, deadline: new Date(Date.now() + 10_000) });

    await testbed.startService("controller", [], patience);
    await rejects(create(), (error) => {
      ok(error instanceof CallError && /certificate/i.test(error.message), String(error));
      return true;
    });
    await testbed.running("controller")?.end("SIGTERM", 10_000);
    await testbed.startService("controller", [], patience, { SSL_CERT_FILE: ca });
    const { volume } = await create();

    strictEqual(volume?.capacityBytes, 1n << 30n);
  } finally {
    await testbed.stopAll();
    await testbed.cleanUp(false);
  }
});

Deno.test("lbcsi-controller starts although it may not read the file in SSL_CERT_FILE, which some images set", async () => {
  const home = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-ca-" }));
  const program = [Deno.execPath(), "run", "--no-check", ...permissionsWith([home], [home]), mainPath];
  const testbed = new Testbed(home, program);
  try {
    const env = { SSL_CERT_FILE: "/usr/share/nowhere/ca.pem" };
    const { log } = await testbed.startService(
      "controller",
      ["--jwt-path", join(home, "jwt")],
      AbortSignal.timeout(60_000),
      env,
    );

    match(await Deno.readTextFile(log), /SSL_CERT_FILE","role":"controller","path":"\/usr\/share\/nowhere\/ca\.pem"/);
  } finally {
    await testbed.stopAll();
    await testbed.cleanUp(false);
  }
});

Deno.test("promise 27: a damaged certificate among those of the machine is skipped with a warning", async () => {
  const home = await Deno.makeTempDir({ prefix: "lbcsi-ca-" });
  const program = [Deno.execPath(), "run", "-A", mainPath];
  const testbed = new Testbed(home, program);
  const patience = AbortSignal.timeout(60_000);
  try {
    await testbed.startSimulator("none", patience);
    const ca = join(home, "machine.pem");
    const damaged = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    await Deno.writeTextFile(ca, `${damaged}${testbed.addresses.ca}`);

    const { log } = await testbed.startService("controller", [], patience, { SSL_CERT_FILE: ca });
    const { volume } = await testbed.controller.call(Controller.method.createVolume, {
      name: "pvc-1",
      capacityRange: { requiredBytes: 1n << 30n },
      volumeCapabilities: [{
        accessType: { case: "block", value: {} },
        accessMode: { mode: Mode.SINGLE_NODE_WRITER },
      }],
      parameters: testbed.parameters,
      secrets: testbed.secrets,
    }, { signal: patience, deadline: new Date(Date.now() + 20_000) });

    strictEqual(volume?.capacityBytes, 1n << 30n);
    match(
      await Deno.readTextFile(log),
      /"warning","event":"skips a certificate to trust".*machine\.pem","error":"certificate 1 cannot be read as a/,
    );
  } finally {
    await testbed.stopAll();
    await testbed.cleanUp(false);
  }
});

Deno.test("a controller does not start with a file in --mgmt-ca that has a damaged certificate, or none", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-ca-" });
  try {
    for (
      const [text, words] of [
        ["token", "holds no PEM certificate"],
        ["-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", "has a bad block: certificate 1 is empty"],
      ] as const
    ) {
      const ca = join(directory, "ca.pem");
      await Deno.writeTextFile(ca, text);
      const { code, stderr } = await new Deno.Command(Deno.execPath(), {
        args: [
          "run",
          "-A",
          mainPath,
          "controller",
          "--endpoint",
          `unix://${directory}/csi.sock`,
          "--mgmt-ca",
          ca,
        ],
      }).output();

      strictEqual(code, 2);
      match(new TextDecoder().decode(stderr), new RegExp(`--mgmt-ca "${ca}": ${words}`));
    }
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});

/** TLS of the management API of LightOS: which certificates are trusted, and what errors say. */
import { rejects, strictEqual } from "node:assert/strict";
import { Secrets } from "../../../lib/secrets.ts";
import { parseVolumeId } from "../../../lib/volume_id.ts";
import { failsWith, none, startLightos, within } from "../../support/backends.ts";
import type { TestSimulator } from "../../support/simulator.ts";

const overTls = (simulator: TestSimulator) => ({
  "mgmt-endpoint": simulator.addresses.grpcs.join(","),
  "mgmt-scheme": "grpcs",
});

Deno.test("promise 11: a management certificate of an unknown CA is refused, with the reason", async () => {
  await using env = await startLightos();

  await rejects(
    env.backend.createVolume(within(4000), none, env.request({}, overTls(env.simulator))),
    failsWith(
      "UNAVAILABLE",
      /no LightOS management endpoint answers \((127\.0\.0\.1:\d+(, |: )){3}self-signed certificate in certificate chain\); give the cluster's CA: mgmt-ca\.crt in the Secret, ca in the cluster file, or --mgmt-ca$/,
    ),
  );
});

for (
  const [what, scheme, endpoints, message] of [
    [
      "grpc is said of ports that speak TLS",
      "grpc",
      "grpcs",
      /\((127\.0\.0\.1:\d+(, |: )){3}the connection was closed before HTTP\/2 began\); check the port; if the cluster speaks TLS, mgmt-scheme has to be grpcs$/,
    ],
    [
      "grpcs is said of ports in clear text",
      "grpcs",
      "grpc",
      /\((127\.0\.0\.1:\d+(, |: )){3}what answers does not speak TLS\); check the port; if the cluster is to be reached in clear text, mgmt-scheme has to be grpc$/,
    ],
  ] as const
) {
  Deno.test(`promise 20: when ${what}, the error says so and what to do, and the repeat says the same`, async () => {
    await using env = await startLightos();
    const request = env.request({}, {
      "mgmt-scheme": scheme,
      "mgmt-endpoint": env.simulator.addresses[endpoints].join(","),
    });
    const said: string[] = [];
    for (let i = 0; i < 2; i++) {
      await rejects(env.backend.createVolume(within(8000), none, request), (error: unknown) => {
        said.push((error as Error).message);
        return failsWith("UNAVAILABLE", message)(error);
      });
    }
    strictEqual(said[0], said[1]);
  });
}

Deno.test("promise 11: a CA in the call's secrets makes its certificate trusted", async () => {
  await using env = await startLightos();
  const secrets = new Secrets({ jwt: env.simulator.addresses.jwt, "mgmt-ca.crt": env.simulator.addresses.ca ?? "" });

  const volume = await env.backend.createVolume(within(5000), secrets, env.request({}, overTls(env.simulator)));

  strictEqual(parseVolumeId(volume.id).scheme, "grpcs");
});

Deno.test("promise 11: verification is off only when the process says so", async () => {
  await using env = await startLightos({}, { verifyTls: false });

  const volume = await env.backend.createVolume(within(5000), none, env.request({}, overTls(env.simulator)));

  strictEqual(parseVolumeId(volume.id).scheme, "grpcs");
});

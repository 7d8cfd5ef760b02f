/** StorageClass parameters of LightOS volumes, and the length of volume IDs. */
import { deepStrictEqual, rejects, strictEqual } from "node:assert/strict";
import { lightosBackend } from "../../../lib/storage/lightos/backend.ts";
import { failsWith, gib, lightosOptions, none, startLightos, within } from "../../support/backends.ts";

for (
  const [changes, message] of [
    [{ "mgmt-endpoint": undefined }, /"mgmt-endpoint" is missing, give host:port/],
    [{ "mgmt-endpoint": "10.0.0.1" }, /"mgmt-endpoint" "10\.0\.0\.1" is not host:port/],
    [{ "mgmt-endpoint": "10.0.0.1:443, 10.0.0.2:443" }, /10\.0\.0\.2:443": " 10\.0\.0\.2:443" is not host:port/],
    [{ "mgmt-endpoint": "10.0.0.1:70000" }, /"mgmt-endpoint" port 70000 of "10\.0\.0\.1:70000" is above/],
    [{ "mgmt-scheme": "https" }, /"mgmt-scheme" "https" is not one of grpc, grpcs/],
    [{ "replica-count": undefined }, /"replica-count" is missing, give 1, 2 or 3/],
    [{ "replica-count": "two" }, /"replica-count" "two" is not a number from 1 to 128/],
    [{ "replica-count": "0" }, /"replica-count" "0" is not a number/],
    [{ "replica-count": "129" }, /"replica-count" "129" is not a number/],
    [{ compression: "on" }, /"compression" "on" is not "enabled" or "disabled"/],
    [{ "project-name": "" }, /"project-name" "" is not a project name/],
    [{ "project-name": "Team_A" }, /"project-name" "Team_A" is not a project name/],
    [{ "host-encryption": "yes" }, /"host-encryption" "yes" is not "enabled" or "disabled"/],
    [
      { "replica-cout": "3" },
      /"replica-cout" \(did you mean "replica-count"\?\) unknown \(known: mgmt-endpoint, .*, mkfs-options\)/,
    ],
  ] as const
) {
  const what = Object.entries(changes).map(([key, value]) =>
    value === undefined ? `without ${key}` : `${key}=${value}`
  );
  Deno.test(`createVolume refuses parameters ${what.join()} with INVALID_ARGUMENT`, async () => {
    await using backend = lightosBackend(lightosOptions);
    const all: Record<string, string | undefined> = {
      "mgmt-endpoint": "192.0.2.1:443",
      "replica-count": "3",
      ...changes,
    };
    const parameters = Object.fromEntries(
      Object.entries(all).filter((entry): entry is [string, string] => entry[1] !== undefined),
    );
    const request = { name: "pvc-1", requiredBytes: gib, limitBytes: 0n, parameters };

    await rejects(
      backend.createVolume(within(1000), none, request),
      failsWith("INVALID_ARGUMENT", /^Cannot create volume "pvc-1": StorageClass parameter /, message),
    );
  });
}

Deno.test("createVolume refuses endpoints whose volume ID no other call would take, before anything is made", async () => {
  await using env = await startLightos();
  const names = Array.from({ length: 41 }, (_, at) => `management-${at}.storage.example.internal:443`);
  const endpoints = [...env.simulator.addresses.grpc, ...names];

  await rejects(
    env.backend.createVolume(within(5000), none, env.request({}, { "mgmt-endpoint": endpoints.join(",") })),
    failsWith(
      "INVALID_ARGUMENT",
      /^Cannot create volume "pvc-1": StorageClass parameter "mgmt-endpoint" has 44 endpoints, with which a volume ID has up to \d+ bytes and 1024 are allowed; name fewer/,
    ),
  );

  deepStrictEqual(env.simulator.control.calls(), {});
});

Deno.test("the longest volume ID that is made is one that every call takes", async () => {
  await using env = await startLightos();
  const [address = ""] = env.simulator.addresses.grpc;
  const fixed = `mgmt:${address},|nguid:0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10|proj:default|scheme:grpc`.length;
  const pad = (bytes: number) => `z${"z".repeat(bytes - 3)}:1`;

  const { id } = await env.backend.createVolume(
    within(5000),
    none,
    env.request({}, { "mgmt-endpoint": `${address},${pad(1024 - fixed)}` }),
  );
  strictEqual(id.length, 1024);
  await env.backend.deleteVolume(within(5000), none, id);

  await rejects(
    env.backend.createVolume(
      within(5000),
      none,
      env.request({}, { "mgmt-endpoint": `${address},${pad(1024 - fixed + 1)}` }),
    ),
    failsWith("INVALID_ARGUMENT", /up to 1025 bytes/),
  );
});

Deno.test("createVolume with host encryption and compression answers FAILED_PRECONDITION", async () => {
  await using env = await startLightos();

  await rejects(
    env.backend.createVolume(
      within(5000),
      none,
      env.request({}, { "host-encryption": "enabled", compression: "enabled" }),
    ),
    failsWith("FAILED_PRECONDITION", /"host-encryption" and "compression" are both enabled/),
  );
});

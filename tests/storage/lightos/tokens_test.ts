/** Tokens of calls to LightOS: where they come from, and what is said of bad ones. */
import { rejects, strictEqual } from "node:assert/strict";
import { Secrets } from "../../../lib/secrets.ts";
import { failsWith, none, startLightos, within } from "../../support/backends.ts";

Deno.test("promise 10: the error about a rejected token says where it came from, and never its text", async () => {
  await using env = await startLightos();
  const expired = env.simulator.control.token(undefined, -1000);

  await rejects(
    env.backend.createVolume(within(4000), new Secrets({ jwt: expired }), env.request()),
    (error: Error) => {
      failsWith("UNAUTHENTICATED", /; JWT: key "jwt" of the call's secrets, which expired \d{4}-\d\d-\d\dT[\d:.]+Z$/)(
        error,
      );
      strictEqual(error.message.includes(expired), false);
      return true;
    },
  );
  strictEqual(env.lines.join("").includes(expired), false);
});

Deno.test("a token that ends in a newline is used without it", async () => {
  await using env = await startLightos();

  await env.backend.createVolume(within(5000), new Secrets({ jwt: `${env.simulator.addresses.jwt}\n` }), env.request());
});

Deno.test("the error without any token says that there is none", async () => {
  await using env = await startLightos({}, { globalJwt: () => undefined });

  await rejects(
    env.backend.createVolume(within(4000), none, env.request()),
    failsWith(
      "UNAUTHENTICATED",
      /JWT: none was given: no key "jwt" in the secrets, and none that can be read in \/etc\/lb-csi\/jwt/,
    ),
  );
});

Deno.test("a token with control characters is rejected before it is sent", async () => {
  await using env = await startLightos();

  await rejects(
    env.backend.createVolume(within(4000), new Secrets({ jwt: "a\nb" }), env.request()),
    failsWith("INVALID_ARGUMENT", /key "jwt" of the call's secrets: it holds blanks or control characters/),
  );
});

Deno.test("a token for another project is answered PERMISSION_DENIED", async () => {
  await using env = await startLightos({ projects: ["default", "other"] });
  const other = env.simulator.control.token(["other"]);

  await rejects(
    env.backend.createVolume(within(4000), new Secrets({ jwt: other }), env.request()),
    failsWith("PERMISSION_DENIED", /answered CreateVolume with PERMISSION_DENIED/),
  );
});

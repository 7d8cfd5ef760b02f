/** Secrets that LightOS repeats are in no error and no log line. */
import { ok, rejects } from "node:assert/strict";
import { DhchapKey } from "../../../lib/auth_key.ts";
import { Secrets } from "../../../lib/secrets.ts";
import { VersionSchema } from "../../../proto/gen/lightos_pb.ts";
import { failsWith, hostA, none, startCluster, within } from "../../support/backends.ts";
import { answerHttp2, grpcAnswer } from "../../support/http2_answers.ts";

Deno.test("promise 10: a token or key that a server repeats is in no error and no log line", async () => {
  await using env = await startCluster(1, [], { inBandAuth: true });
  const { jwt } = env.simulator.addresses;
  const { id } = await env.backend.createVolume(within(5000), none, env.request("pvc-1"));
  env.simulator.control.fail({ rpc: "GetVolume", count: 0, code: "UNAUTHENTICATED", message: `who is Bearer ${jwt}?` });
  const key = DhchapKey.generate().reveal();
  env.simulator.control.fail({ rpc: "SetTrustedHostSecret", count: 0, code: "INTERNAL", message: `bad key ${key}` });

  await rejects(env.backend.getVolume(within(5000), none, id), (error: unknown) => {
    failsWith("UNAUTHENTICATED", /who is Bearer \[token\]\?; JWT: /)(error);
    ok(!String(error).includes(jwt));
    return true;
  });
  const grant = { hostNqn: hostA, shared: false, volumeContext: { "in-band-auth": "unidirectional" } };
  await rejects(
    env.backend.grantAccess(within(5000), new Secrets({ "dhchap-key": key }), id, grant),
    (error: unknown) => {
      failsWith("INTERNAL", /bad key \[key\]$/)(error);
      return true;
    },
  );
  ok(env.lines.every((line) => !line.includes(jwt) && !line.includes(key)));
});

for (
  const [form, write] of [
    ["percent-encoded", (token: string) => encodeURIComponent(token)],
    ["in base64", (token: string) => btoa(token)],
    ["in base64 without padding", (token: string) => btoa(token).replace(/=+$/, "")],
    ["without padding", (token: string) => token.replace(/=+$/, "")],
    ["by its last part, percent-encoded", (token: string) => encodeURIComponent(token.split(".")[2] ?? "")],
    ["by its last part", (token: string) => token.split(".")[2] ?? ""],
  ] as const
) {
  Deno.test(`promise 10: a token that a server repeats ${form} is in no error and no log line`, async () => {
    const token = "first+part/of=a.second+part/of=a.third+part/of+the+token==";
    await using server = await answerHttp2(() => ({
      headers: { ":status": 200, "content-type": "application/grpc" },
      body: "",
      trailers: { "grpc-status": "16", "grpc-message": encodeURI(`who is ${write(token)}?`) },
    }));
    await using env = await startCluster(1);
    const { backend, request } = env.open([server.address]);

    await rejects(
      backend.createVolume(within(5000), new Secrets({ jwt: token }), request("pvc-1")),
      failsWith("UNAUTHENTICATED", /who is \[token\]=*\?; JWT: /),
    );
    ok(env.lines.every((line) => !line.includes(write(token))));
  });
}

Deno.test("promise 10: a token that a server repeats in its API version is in no error and no log line", async () => {
  const token = "a-token-of-some-length";
  await using server = await answerHttp2(() => grpcAnswer(VersionSchema, { apiVersion: `v1 for Bearer ${token}` }));
  await using env = await startCluster(1);
  const { backend, request } = env.open([server.address]);

  await rejects(
    backend.createVolume(within(5000), new Secrets({ jwt: token }), request("pvc-1")),
    failsWith("FAILED_PRECONDITION", /speaks management API "v1 for Bearer \[token\]", this driver speaks/),
  );
  ok(env.lines.every((line) => !line.includes(token)));
});

Deno.test("a long text of a server is cut short in the error", async () => {
  await using env = await startCluster(1);
  const { id } = await env.backend.createVolume(within(5000), none, env.request("pvc-1"));
  const message = "no ".repeat(3000);
  env.simulator.control.fail({ rpc: "GetVolume", count: 0, code: "PERMISSION_DENIED", message });

  await rejects(env.backend.getVolume(within(5000), none, id), (error: unknown) => {
    failsWith("PERMISSION_DENIED", /answered GetVolume with PERMISSION_DENIED: no no .* …; JWT: /)(error);
    ok((error as Error).message.length < 2500);
    return true;
  });
});

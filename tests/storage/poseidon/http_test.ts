/** Answers in place of DAgent's own: proxies, pages, and answers that are cut off. */
import { deepStrictEqual, ok, rejects, strictEqual } from "node:assert/strict";
import { failsWith, startPoseidonBackend } from "../../support/backends.ts";

Deno.test("the error about a server that is not a DAgent says so", async () => {
  await using t = await startPoseidonBackend();
  const { hostname, port } = new URL(t.sim.addresses.control);

  const created = t.create("pvc-1", { provisionerIP: hostname, provisionerPort: port });

  await rejects(
    created,
    failsWith("UNAVAILABLE", /HTTP status 404 and no envelope of DAgent: a proxy in between, or there is no DAgent/),
  );
});

/** A proxy in front of DAgent that forwards requests, and answers some of them itself afterwards. */
async function proxyOf(dagent: string, answer: (method: string, path: string) => Response | undefined) {
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, async (request) => {
    const { pathname } = new URL(request.url);
    const body = request.method === "GET" ? {} : { body: await request.text() };
    const passed = await fetch(`http://${dagent}${pathname}`, {
      method: request.method,
      headers: request.headers,
      ...body,
    });
    const text = await passed.text();
    return answer(request.method, pathname) ?? new Response(text, { status: passed.status, headers: passed.headers });
  });
  await Promise.resolve();
  return {
    parameters: { provisionerIP: server.addr.hostname, provisionerPort: String(server.addr.port) },
    [Symbol.asyncDispose]: () => server.shutdown(),
  };
}

const html = "<!DOCTYPE html><html><h1>Bad Gateway</h1></html>";

const half = '{"rid":"x","result":{"status":{"code":0,"descr';

for (
  const [what, answer] of [
    ...[200, 401, 403, 404, 429, 500, 502, 503, 504].map((status) =>
      [`a page of HTTP status ${status}`, () => new Response(html, { status })] as const
    ),
    ["a cut answer", () => new Response(half)],
    ["an empty answer", () => new Response("")],
    ["a redirect", () => new Response("", { status: 302, headers: { location: "http://127.0.0.1:9/" } })],
    ["JSON of something else", () => Response.json({ error: "not found" }, { status: 404 })],
    ["9 MiB of blanks", () => new Response(" ".repeat(9 << 20))],
  ] as [string, () => Response][]
) {
  Deno.test(`promise 30: CreateVolume on PoseidonOS finds what it made although ${what} came as the answer`, async () => {
    await using t = await startPoseidonBackend();
    let answered = 0;
    await using proxy = await proxyOf(
      t.sim.addresses.dagent,
      (method, path) => method === "POST" && path.endsWith("/volumes") && answered++ === 0 ? answer() : undefined,
    );

    await t.create("pvc-1", proxy.parameters);

    deepStrictEqual([answered, t.volumes().length], [1, 1]);
  });

  Deno.test(`promise 30: ${what} in place of PoseidonOS' answers is UNAVAILABLE, which is not final`, async () => {
    await using t = await startPoseidonBackend();
    await using proxy = await proxyOf(t.sim.addresses.dagent, answer);

    await rejects(t.create("pvc-1", proxy.parameters), failsWith("UNAVAILABLE"));
  });
}

for (
  const [what, change, message] of [
    [
      "a UUID that is a path",
      { uuid: "../../../etc" },
      /volume "pvc-1" with "\.\.\/\.\.\/\.\.\/etc", which is not a UUID/,
    ],
    ["the nil UUID", { uuid: "00000000-0000-0000-0000-000000000000" }, /which is not a UUID/],
    ["a name with a separator of IDs", { name: "a|uuid:b" }, /volume "a\|uuid:b", which is not the name of a volume/],
  ] as const
) {
  Deno.test(`promise 28: PoseidonOS that lists a volume with ${what} is not believed`, async () => {
    await using t = await startPoseidonBackend();
    const { id } = await t.create();
    const [volume] = t.volumes();
    ok(volume);
    Object.assign(volume, change);

    await rejects(t.get(id), failsWith("INTERNAL", message));
    await rejects(t.create(), failsWith("INTERNAL", message));
    strictEqual(t.volumes().length, 1);
  });
}

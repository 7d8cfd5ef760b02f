import assert from "node:assert/strict";
import { gunzipSync } from "node:zlib";
import { tarGzip } from "../../k8s/tar.ts";

Deno.test("entries are sorted by path, and each is padded to blocks of 512 bytes", () => {
  const entry = (path: string, bytes: number) => ({ path, content: new Uint8Array(bytes) });

  const archive = gunzipSync(tarGzip([entry("b", 512), entry("a", 1), entry("B", 0)]));

  // A block for each header, one for the content of `a` and one for that of `b`, and two at the end.
  assert.equal(archive.length, (3 + 2 + 2) * 512);
  assert.deepEqual([0, 1, 3].map((block) => String.fromCharCode(archive[block * 512] ?? 0)), ["B", "a", "b"]);
});

Deno.test("a path of more than 100 bytes is an error that names it", () => {
  const path = "ä".repeat(51);

  assert.throws(() => tarGzip([{ path, content: new Uint8Array() }]), {
    message: `Cannot pack "${path}": its name is over 100 bytes`,
  });
});

import assert from "node:assert/strict";
import { join } from "node:path";
import { canonicalPath } from "../../lib/host/mount_point.ts";
import { fakeDisk } from "../support/fake_disk.ts";
import { FakeHost } from "../support/fake_host.ts";

Deno.test("canonicalPath resolves the links above a path, and never the path itself", async () => {
  const directory = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-path-" }));
  try {
    await Deno.mkdir(join(directory, "real"));
    await Deno.symlink("real", join(directory, "link"));
    await Deno.symlink("/", join(directory, "real/last"));
    const { host } = await fakeDisk();
    const linux = {
      ...host,
      roots: host.roots,
      realPath: (path: string) => Deno.realPath(path).catch(() => undefined),
    };

    const paths = ["link/last/", "link/none", "none/x"].map((path) =>
      canonicalPath(linux as FakeHost, join(directory, path))
    );

    assert.deepEqual(await Promise.all(paths), [join(directory, "real/last"), join(directory, "real/none"), undefined]);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});

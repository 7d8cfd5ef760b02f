import assert from "node:assert/strict";
import { join } from "node:path";
import { createDiscoveryClientAttacher, discoveryFile } from "../../../lib/host/attach/discovery_client.ts";
import { createLinuxHost } from "../../../lib/host/linux_host.ts";
import { createLogger } from "../../../lib/log.ts";
import type { RemoteNamespace } from "../../../lib/namespace.ts";
import { callContext, rejects } from "../../support/node_calls.ts";

const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";

const other = "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e";

const nqn = "nqn.2019-09.com.example:cluster:1";

const hostNqn = "nqn.2019-09.com.lightbitslabs:host:n1.node";

const namespace: RemoteNamespace = {
  uuid,
  subsystemNqn: nqn,
  addresses: [{ traddr: "192.0.2.1", trsvcid: "4420" }, { traddr: "192.0.2.2", trsvcid: "4420" }],
  discovery: [
    { traddr: "192.0.2.2", trsvcid: "8009" },
    { traddr: "192.0.2.10", trsvcid: "8009" },
    { traddr: "2001:db8::1", trsvcid: "8009" },
    { traddr: "192.0.2.2", trsvcid: "8009" },
  ],
};

async function withDirectory(
  act: (attacher: ReturnType<typeof createDiscoveryClientAttacher>, directory: string, log: string[]) => Promise<void>,
): Promise<void> {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-attach-" });
  try {
    const log: string[] = [];
    const host = createLinuxHost({ log: createLogger("error") });
    await act(createDiscoveryClientAttacher({ host, directory, hostNqn }), directory, log);
  } finally {
    await Deno.remove(directory, { recursive: true }).catch(() => {});
  }
}

Deno.test("discoveryFile has one line per discovery controller, sorted by text, without brackets or duplicates", () => {
  const line = (address: string) => `-t tcp -a ${address} -s 8009 -q ${hostNqn} -n ${nqn}\n`;

  assert.equal(discoveryFile(namespace, hostNqn), line("192.0.2.10") + line("192.0.2.2") + line("2001:db8::1"));
});

Deno.test("Discovery-Client attach writes one file named after the namespace, and no temporary one stays", async () => {
  await withDirectory(async (attacher, directory) => {
    await attacher.attach(callContext(), namespace);

    assert.deepEqual([...Deno.readDirSync(directory)].map((entry) => entry.name), [uuid]);
    assert.equal(await Deno.readTextFile(join(directory, uuid)), discoveryFile(namespace, hostNqn));
  });
});

Deno.test("Discovery-Client attach leaves a file alone that is right, and replaces one that is wrong", async () => {
  await withDirectory(async (attacher, directory) => {
    const path = join(directory, uuid);
    await attacher.attach(callContext(), namespace);
    const { ino } = await Deno.stat(path);

    await attacher.attach(callContext(), namespace);
    assert.equal((await Deno.stat(path)).ino, ino);
    const moved = { ...namespace, discovery: [{ traddr: "192.0.2.77", trsvcid: "8009" }] };
    await attacher.attach(callContext(), moved);

    assert.equal(await Deno.readTextFile(path), discoveryFile(moved, hostNqn));
    assert.notEqual((await Deno.stat(path)).ino, ino);
  });
});

Deno.test("the Discovery-Client attacher takes the temporary file of a driver that was killed while it wrote", async () => {
  for (const next of ["attach", "detach"] as const) {
    await withDirectory(async (attacher, directory) => {
      await Deno.writeTextFile(join(directory, `tmp.dc.${uuid}`), "-t tcp -a 192.0.2");
      if (next === "attach") await attacher.attach(callContext(), namespace);
      await attacher.detach(callContext(), uuid);

      assert.deepEqual([...Deno.readDirSync(directory)], []);
    });
  }
});

Deno.test("Discovery-Client attach without the daemon's directory says what to install", async () => {
  await withDirectory(async (attacher, directory) => {
    await Deno.remove(directory);

    await rejects(
      attacher.attach(callContext(), namespace),
      "FAILED_PRECONDITION",
      /is missing, the LightOS Discovery-Client has to be installed on this node/,
    );
    await attacher.detach(callContext(), uuid);
  });
});

Deno.test("Discovery-Client attach writes into a directory that is a symbolic link", async () => {
  await withDirectory(async (_, directory) => {
    await Deno.mkdir(join(directory, "real"));
    await Deno.symlink("real", join(directory, "link"));
    const host = createLinuxHost({ log: createLogger("error") });
    const attacher = createDiscoveryClientAttacher({ host, directory: join(directory, "link"), hostNqn });

    await attacher.attach(callContext(), namespace);
    assert.equal(await Deno.readTextFile(join(directory, "real", uuid)), discoveryFile(namespace, hostNqn));
    await attacher.detach(callContext(), uuid);

    assert.deepEqual([...Deno.readDirSync(join(directory, "real"))], []);
    await Deno.symlink("nowhere", join(directory, "dangling"));
    await rejects(
      createDiscoveryClientAttacher({ host, directory: join(directory, "dangling"), hostNqn }).attach(
        callContext(),
        namespace,
      ),
      "FAILED_PRECONDITION",
      /dangling is missing, the LightOS Discovery-Client has to be installed/,
    );
  });
});

Deno.test("Discovery-Client attach without a discovery controller answers FAILED_PRECONDITION", async () => {
  await withDirectory(async (attacher) => {
    const attached = attacher.attach(callContext(), { ...namespace, discovery: [] });

    await rejects(attached, "FAILED_PRECONDITION", /the publish context names no discovery controller of nqn/);
  });
});

Deno.test("Discovery-Client detach removes the file of this namespace only, also a second time", async () => {
  await withDirectory(async (attacher, directory) => {
    await attacher.attach(callContext(), namespace);
    await attacher.attach(callContext(), { ...namespace, uuid: other });

    await attacher.detach(callContext(), uuid);
    await attacher.detach(callContext(), uuid);

    assert.deepEqual([...Deno.readDirSync(directory)].map((entry) => entry.name), [other]);
  });
});

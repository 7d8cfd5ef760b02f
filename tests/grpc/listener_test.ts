import assert from "node:assert/strict";
import { linkSync, lstatSync, writeFileSync } from "node:fs";
import net from "node:net";
import { Channel } from "../../lib/grpc/client.ts";
import type { Listen } from "../../lib/grpc/listener.ts";
import { serve, service } from "../../lib/grpc/server.ts";
import { createLogger } from "../../lib/log.ts";
import { Identity } from "../../proto/gen/csi_pb.ts";
import { probe, ready, withDirectory, withServer } from "../support/rpc.ts";

function listenOn(path: string): ReturnType<typeof serve> {
  return serve({ listen: { path }, log: createLogger("error"), services: [service(Identity, { probe: ready })] });
}

Deno.test("serve removes a socket that a killed process has left, and its own when it stops", async () => {
  await withDirectory(async (directory) => {
    const path = `${directory}/csi.sock`;
    // A second name of a socket outlives its listener, as a killed process's socket does.
    const dead = net.createServer();
    await new Promise<void>((resolve) => dead.listen(`${directory}/dead.sock`, resolve));
    linkSync(`${directory}/dead.sock`, path);
    await new Promise<void>((resolve) => dead.close(() => resolve()));
    assert.ok(lstatSync(path).isSocket());

    const server = await listenOn(path);
    try {
      using channel = new Channel({ address: `unix://${path}` });
      assert.equal((await probe(channel)).ready, true);
    } finally {
      await server.stop(1000);
    }
    assert.equal(lstatSync(path, { throwIfNoEntry: false }), undefined);
  });
});

Deno.test("serve rejects a socket on which another process listens, which goes on", async () => {
  await withServer({ probe: ready }, async ({ path, channel }) => {
    await assert.rejects(listenOn(path), {
      code: "FAILED_PRECONDITION",
      message: `Cannot listen on ${path}: another process is listening there`,
    });

    assert.equal((await probe(channel)).ready, true);
  });
});

Deno.test("serve rejects a path where something else than a socket is, and leaves it there", async () => {
  await withDirectory(async (directory) => {
    writeFileSync(`${directory}/csi.sock`, "mine");

    await assert.rejects(listenOn(`${directory}/csi.sock`), {
      code: "FAILED_PRECONDITION",
      message: `Cannot listen on ${directory}/csi.sock: something that is not a socket is there`,
    });

    assert.equal(Deno.readTextFileSync(`${directory}/csi.sock`), "mine");
  });
});

Deno.test("serve lets only owner and group connect, with any umask", async () => {
  await withDirectory(async (directory) => {
    const before = Deno.umask(0);
    try {
      const path = `${directory}/csi.sock`;
      const server = await listenOn(path);

      assert.equal(((await Deno.stat(path)).mode ?? 0) & 0o777, 0o660);
      await server.stop(100);
    } finally {
      Deno.umask(before);
    }
  });
});

Deno.test("serve rejects a directory where every user may replace its socket, and accepts one with the sticky bit", async () => {
  await withDirectory(async (directory) => {
    const path = `${directory}/csi.sock`;
    await Deno.chmod(directory, 0o777);
    await assert.rejects(listenOn(path), {
      code: "FAILED_PRECONDITION",
      message:
        `Cannot listen on ${path}: every user of the machine may replace files in ${directory}, take that right ` +
        "away (chmod o-w)",
    });
    assert.deepEqual([...Deno.readDirSync(directory)], []);

    await Deno.chmod(directory, 0o1777);
    const server = await listenOn(path);
    await server.stop(100);
  });
});

Deno.test("serve rejects a socket path of more than 107 bytes, and accepts one of 107", async () => {
  await withDirectory(async (directory) => {
    const longest = `${directory}/${"x".repeat(107 - directory.length - 1)}`;

    await assert.rejects(listenOn(`${longest}x`), {
      code: "FAILED_PRECONDITION",
      message: `Cannot listen on ${longest}x: the path has more than 107 bytes`,
    });

    const server = await listenOn(longest);
    await server.stop(1000);
  });
});

Deno.test("serve makes a directory for its socket below one that every user may write to, such as an emptyDir of Kubernetes", async () => {
  await withDirectory(async (directory) => {
    // As kubelet makes it for a pod with an fsGroup.
    await Deno.chmod(directory, 0o2777);
    const path = `${directory}/lbcsi/csi.sock`;

    for (const _ of ["made", "there from the last time"]) {
      const server = await listenOn(path);
      assert.equal((Deno.statSync(`${directory}/lbcsi`).mode ?? 0) & 0o777, 0o750);
      assert.equal((Deno.statSync(path).mode ?? 0) & 0o777, 0o660);
      await server.stop(1000);
    }
  });
});

Deno.test("serve rejects a path whose directory is missing or is a file", async () => {
  await withDirectory(async (directory) => {
    writeFileSync(`${directory}/file`, "");
    for (const parent of [`${directory}/missing/deeper`, `${directory}/file`, `${directory}/file/deeper`]) {
      await assert.rejects(listenOn(`${parent}/csi.sock`), {
        code: "FAILED_PRECONDITION",
        message: `Cannot listen on ${parent}/csi.sock: its directory is missing, create ${parent} first`,
      });
    }
  });
});

Deno.test("serve rejects a TCP port that is taken", async () => {
  const taken = net.createServer();
  await new Promise<void>((resolve) => taken.listen(0, "127.0.0.1", resolve));
  const address = taken.address();
  assert.ok(typeof address === "object" && address !== null);
  try {
    const listen: Listen = { host: "127.0.0.1", port: address.port };
    await assert.rejects(serve({ listen, log: createLogger("error"), services: [] }), {
      code: "FAILED_PRECONDITION",
      message: new RegExp(`^Cannot listen on 127\\.0\\.0\\.1:${address.port}: .*EADDRINUSE`),
    });
  } finally {
    taken.close();
  }
});

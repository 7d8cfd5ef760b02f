/** attachVolume and detachVolume, interrupted and repeated, on a fake machine and with simulated clusters. */
import assert from "node:assert/strict";
import type { AttachRequest } from "../../lib/cli/attach_volume.ts";
import { createLogger } from "../../lib/log.ts";
import { hostNqn } from "../../lib/namespace.ts";
import { Secrets } from "../../lib/secrets.ts";
import { lightosBackend } from "../../lib/storage/lightos/backend.ts";
import { poseidonBackend } from "../../lib/storage/poseidon/backend.ts";
import { CutOff, FakeHost } from "../support/fake_host.ts";
import {
  createFakeMachine,
  knownPlace,
  mountPath,
  mountRequest,
  namespaceUuid,
  ownHostNqn,
} from "../support/fake_machine.ts";
import { createAvailableVolume } from "../support/lightos_volume.ts";
import { callContext, rejects } from "../support/node_calls.ts";
import { poseidonParameters, startPoseidon } from "../support/poseidon.ts";
import { startSimulator, type TestSimulator } from "../support/simulator.ts";

Deno.test("attachVolume connects to a known namespace and returns its device, also when repeated", async () => {
  const { host, attach } = createFakeMachine();

  const { device, mount } = await attach();
  const again = await attach();

  assert.equal(device.path, "/dev/nvme0n1");
  assert.equal(device.uuid, namespaceUuid);
  assert.equal(mount, undefined);
  assert.deepEqual(again, { device, mount });
  assert.deepEqual(host.controllers.map(({ traddr, hostNqn }) => [traddr, hostNqn]), [
    ["192.0.2.1", ownHostNqn],
    ["192.0.2.2", ownHostNqn],
  ]);
});

Deno.test("attachVolume formats a blank volume only when --format asks for it", async () => {
  const { host, namespace, attach } = createFakeMachine();

  await rejects(
    attach(knownPlace, { ...mountRequest, format: false }),
    "FAILED_PRECONDITION",
    /^Cannot mount namespace .* at "\/staging": \/dev\/nvme0n1 is blank, and none is made unless it is asked for$/,
  );
  assert.equal(namespace.content, undefined);
  assert.deepEqual(host.mounts, []);
  const { mount } = await attach(knownPlace, mountRequest);

  assert.deepEqual(mount, { path: mountPath, fsType: "ext4", readOnly: false });
  assert.deepEqual(namespace.content, { fsType: "ext4", fsBytes: namespace.sizeBytes });
});

Deno.test("promise 1: attachVolume with --format mounts an existing file system and does not change it", async () => {
  const { host, namespace, attach } = createFakeMachine();
  namespace.content = { fsType: "ext4", fsBytes: namespace.sizeBytes };

  await attach(knownPlace, mountRequest);

  assert.deepEqual(host.commands.filter((command) => command.startsWith("mkfs")), []);
  assert.equal(host.mounts[0]?.path, mountPath);
});

Deno.test("attachVolume rejects a file system other than the one of --fs", async () => {
  const { namespace, attach } = createFakeMachine();
  namespace.content = { fsType: "ext4", fsBytes: namespace.sizeBytes };

  await rejects(
    attach(knownPlace, { ...mountRequest, fsType: "xfs" }),
    "FAILED_PRECONDITION",
    /\/dev\/nvme0n1 holds ext4, the request wants xfs; it is never formatted again/,
  );
});

Deno.test("attachVolume does nothing when the directory to mount at is missing", async () => {
  const { host, attach } = createFakeMachine();

  await rejects(
    attach(knownPlace, { ...mountRequest, path: "/staging/none" }),
    "FAILED_PRECONDITION",
    /^Cannot mount at "\/staging\/none": there is no such directory$/,
  );

  assert.deepEqual(host.commands, []);
});

for (const kind of ["direct", "discovery-client"] as const) {
  Deno.test(`detachVolume (${kind}) undoes attachVolume, also when repeated, and with nothing to undo`, async () => {
    const { host, attach, detach } = createFakeMachine(kind);
    await detach(knownPlace, mountPath);
    await attach(knownPlace, mountRequest);

    await detach(knownPlace, mountPath);
    await detach(knownPlace, mountPath);

    assert.deepEqual(host.leftovers(), []);
    if (kind === "direct") assert.deepEqual(host.controllers, []);
  });

  Deno.test(`promise 8: attachVolume and detachVolume (${kind}), interrupted at any call, converge when repeated`, async () => {
    let cuts = 0;
    for (const when of ["before", "after"] as const) {
      for (let at = 1;; at++) {
        const { host, namespace, attach, detach } = createFakeMachine(kind);
        const attached = await survives(host, at, when, () => attach(knownPlace, mountRequest));
        const { device } = await attach(knownPlace, mountRequest);

        assert.equal(device.path, "/dev/nvme0n1");
        assert.deepEqual(host.mounts.map((mount) => mount.path), [mountPath]);
        assert.ok(host.commands.filter((command) => command.startsWith("mkfs")).length <= 1);

        const detached = await survives(host, at, when, () => detach(knownPlace, mountPath));
        await detach(knownPlace, mountPath);

        assert.deepEqual(host.leftovers(), []);
        assert.ok(namespace.content);
        if (attached && detached) break;
        cuts++;
      }
    }
    assert.ok(cuts > 60, `${cuts}`);
  });
}

/** Whether `act` succeeds when the machine stops at its `at`-th call. Other errors are thrown. */
async function survives(host: FakeHost, at: number, when: "before" | "after", act: () => Promise<unknown>) {
  const last = host.calls + at;
  host.cut = { at: last, when };
  try {
    await act();
    return true;
  } catch (error) {
    if (!(error instanceof CutOff) && host.calls < last) throw error;
    return false;
  } finally {
    host.cut = undefined;
  }
}

function backendOf(simulator: TestSimulator) {
  return lightosBackend({
    log: createLogger("error"),
    globalJwt: () => simulator.addresses.jwt,
    globalJwtPath: "/nowhere",
    globalJwtFor: "any endpoint",
    ca: undefined,
    verifyTls: true,
    userAgent: "test",
    clusters: undefined,
  });
}

Deno.test("attachVolume gets access from the cluster and detachVolume gives it back, interrupted anywhere", async () => {
  await using simulator = await startSimulator();
  await using backend = backendOf(simulator);
  const { volume, id } = await createAvailableVolume(simulator);
  const request: AttachRequest = { backend, volumeId: id, volumeContext: {}, secrets: new Secrets() };

  for (let at = 1, whole = false; !whole; at += 3) {
    const { host, attach, detach } = createFakeMachine();
    host.addNamespace(volume.uuid, simulator.addresses.subsystemNqn);
    const attached = await survives(host, at, "after", () => attach(request, mountRequest));
    await attach(request, mountRequest);
    assert.deepEqual(volume.acl, [ownHostNqn]);

    const detached = await survives(host, at, "before", () => detach(request, mountPath));
    await detach(request, mountPath);
    assert.deepEqual(volume.acl.filter((nqn) => nqn === ownHostNqn), []);
    assert.deepEqual(host.leftovers(), []);
    whole = attached && detached;
  }
});

Deno.test("promise 7: attachVolume rejects a volume that another host may use, and names that host", async () => {
  await using simulator = await startSimulator();
  await using backend = backendOf(simulator);
  const { volume, id } = await createAvailableVolume(simulator);
  await simulator.control.cluster.updateVolume(
    { project: "default", uuid: volume.uuid },
    { acl: [hostNqn("n2.node")] },
    undefined,
  );
  const { host, attach } = createFakeMachine();

  await rejects(
    attach({ backend, volumeId: id, volumeContext: {}, secrets: new Secrets() }),
    "FAILED_PRECONDITION",
    /n2\.node/,
  );

  assert.deepEqual(host.commands, []);
});

Deno.test("attachVolume and detachVolume work with a volume of PoseidonOS, which is found by its attributes", async () => {
  await using simulator = await startPoseidon();
  await using backend = poseidonBackend({ log: createLogger("error") });
  const none = new Secrets();
  const volumeContext = poseidonParameters(simulator);
  const volumeRequest = { name: "pvc-1", requiredBytes: 1n << 30n, limitBytes: 0n, parameters: volumeContext };
  const volume = await backend.createVolume(callContext(), none, volumeRequest);
  const { host, machine, attach, detach } = createFakeMachine();
  const request: AttachRequest = { backend, volumeId: volume.id, volumeContext, secrets: none };
  const place = await backend.grantAccess(callContext(), none, volume.id, {
    hostNqn: ownHostNqn,
    shared: false,
    volumeContext,
  });
  host.addNamespace(volume.uuid, place.subsystemNqn);
  await backend.revokeAccess(callContext(), none, volume.id, ownHostNqn);

  const { device } = await attach(request, mountRequest);
  assert.equal(device.uuid, volume.uuid);
  assert.deepEqual((await backend.getVolume(callContext(), none, volume.id)).hosts, [machine.hostNqn]);
  await detach(request, mountPath);
  await detach(request, mountPath);

  assert.deepEqual((await backend.getVolume(callContext(), none, volume.id)).hosts, []);
  assert.deepEqual(host.leftovers(), []);
});

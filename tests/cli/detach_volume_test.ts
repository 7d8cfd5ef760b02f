import assert from "node:assert/strict";
import {
  createFakeMachine,
  knownPlace,
  mountPath,
  mountRequest,
  namespaceUuid,
  otherUuid,
  subsystemNqn,
} from "../support/fake_machine.ts";
import { rejects } from "../support/node_calls.ts";

Deno.test("detachVolume fails while the volume is mounted elsewhere, and names the mount", async () => {
  const { host, attach, detach } = createFakeMachine();
  await attach(knownPlace, mountRequest);
  const [mount] = host.mounts;
  assert.ok(mount);
  host.mounts.push({ ...mount, path: "/pods/one" });

  await rejects(detach(), "FAILED_PRECONDITION", /\/dev\/nvme0n1 is in use by the mount at "\/staging", the mount at/);
  await rejects(
    detach(knownPlace, mountPath),
    "FAILED_PRECONDITION",
    /^Cannot detach namespace .*: \/dev\/nvme0n1 is in use by the mount at "\/pods\/one"$/,
  );

  assert.deepEqual(host.mounts.map((mount) => mount.path), ["/pods/one"]);
  assert.equal(host.controllers.length, 2);
});

Deno.test("detachVolume (direct) leaves a connection that another volume needs", async () => {
  const { host, attach, detach } = createFakeMachine();
  host.addNamespace(otherUuid, subsystemNqn);
  await attach();

  await detach();

  assert.equal(host.controllers.length, 2);
});

Deno.test("detachVolume (direct) disconnects a controller without namespaces", async () => {
  const { host, attach, detach } = createFakeMachine();
  await attach();
  host.devices.splice(0);

  await detach();

  assert.deepEqual(host.controllers, []);
});

Deno.test("detachVolume (direct) rejects a volume that a Discovery-Client is asked for", async () => {
  const { host, attach, detach } = createFakeMachine();
  await attach();
  await host.replaceText(`${host.discoveryDirectory}/${namespaceUuid}`, "");

  await rejects(
    detach(),
    "FAILED_PRECONDITION",
    /asks the Discovery-Client to keep it connected.*--attach=discovery-c/,
  );

  assert.equal(host.devices.length, 1);
});

Deno.test("promise 4: detachVolume does not start an umount that would wait for a path", async () => {
  const { host, attach, detach } = createFakeMachine();
  await attach(knownPlace, mountRequest);
  for (const controller of host.controllers) controller.state = "connecting";

  await rejects(
    detach(knownPlace, mountPath),
    "UNAVAILABLE",
    /^Cannot detach namespace .*: \/dev\/nvme0n1 has no live path \(nvme0 connecting; nvme1 connecting\)/,
  );

  assert.deepEqual(host.commands.filter((command) => command.startsWith("umount")), []);
});

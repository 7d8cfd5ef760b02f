/** The keys that a node connects volumes with. */
import assert from "node:assert/strict";
import type { AuthKind, DhchapKeys } from "../../../lib/auth_key.ts";
import { createDiscoveryClientAttacher } from "../../../lib/host/attach/discovery_client.ts";
import { fromPublishContext, toPublishContext } from "../../../lib/namespace.ts";
import { Secrets } from "../../../lib/secrets.ts";
import type { Authentication } from "../../../lib/storage/backend.ts";
import { keyMachine, newKeys, nodeId, nodeNqn, place, revealKeys, uuid } from "../../support/key_machine.ts";
import { subsystemNqn as nqn } from "../../support/loop_machine.ts";
import { mountCapability, nodeCalls, rejects, volumeId } from "../../support/node_calls.ts";

/** A node service, and its stage of one volume that asks for authentication. */
function node(
  kind: AuthKind | undefined,
  demanded: DhchapKeys | undefined,
  authentication?: Authentication,
  strategy: "direct" | "discovery-client" = "direct",
) {
  const { host, attacher, demand, connected } = keyMachine(demanded);
  const calls = nodeCalls({
    host,
    attacher: strategy === "direct"
      ? attacher
      : createDiscoveryClientAttacher({ host, directory: host.discoveryDirectory, hostNqn: nodeNqn }),
    nodeId,
    ...(authentication === undefined ? {} : { authentication }),
  });
  const namespace = kind === undefined ? place : { ...place, inBandAuth: kind };
  return {
    host,
    demand,
    connected,
    stage: (secrets: Record<string, string> = {}) =>
      calls.stage({
        volumeId: volumeId(uuid),
        stagingTargetPath: "/staging",
        volumeCapability: mountCapability(),
        publishContext: toPublishContext(namespace),
        secrets,
      }),
  };
}

Deno.test("the publish context carries the kind of authentication, and old ones carry none", () => {
  assert.deepEqual(fromPublishContext(toPublishContext({ ...place, inBandAuth: "bidirectional" })), {
    ...place,
    inBandAuth: "bidirectional",
  });
  assert.equal("in-band-auth" in toPublishContext(place), false);
  assert.throws(() => fromPublishContext({ ...toPublishContext(place), "in-band-auth": "half" }), {
    code: "INVALID_ARGUMENT",
    message: "Cannot read the publish context: in-band-auth: is not one of unidirectional, bidirectional",
  });
});

Deno.test("NodeStageVolume connects with the keys of its secret, and asks no cluster", async () => {
  const keys = newKeys("bidirectional");
  const { stage, connected } = node("bidirectional", keys, {
    keysOf: () => Promise.reject(new Error("the cluster was asked")),
  });

  await stage({ "dhchap-key": keys.host.reveal(), "dhchap-ctrl-key": keys.controller?.reveal() ?? "" });

  assert.deepEqual(connected(), [["192.0.2.1", revealKeys(keys)], ["192.0.2.2", revealKeys(keys)]]);
});

Deno.test("NodeStageVolume asks the cluster for the keys that its secret lacks, with that secret", async () => {
  const keys = newKeys();
  const asked: unknown[] = [];
  const { stage, connected } = node("unidirectional", keys, {
    keysOf: (_ctx, secrets, ...rest) => {
      asked.push([secrets.constructor, ...rest]);
      return Promise.resolve(keys);
    },
  });

  await stage({ jwt: "token" });

  assert.deepEqual(asked, [[Secrets, volumeId(uuid), { hostNqn: nodeNqn, kind: "unidirectional" }]]);
  assert.deepEqual(connected().map(([, used]) => used), [revealKeys(keys), revealKeys(keys)]);
});

Deno.test("NodeStageVolume without authentication asks for no key", async () => {
  const { stage, connected } = node(undefined, undefined, {
    keysOf: () => Promise.reject(new Error("the cluster was asked")),
  });

  await stage({ "dhchap-key": "not even a key" });

  assert.deepEqual(connected().map(([, used]) => used), [undefined, undefined]);
});

for (
  const [what, secrets, code, message] of [
    [
      "no key and no cluster to ask",
      {},
      "FAILED_PRECONDITION",
      /stage the volume 0f2c.*: the node-stage secret of the call brings no key/,
    ],
    [
      "a damaged key",
      { "dhchap-key": "DHHC-1:00:AAAA:" },
      "INVALID_ARGUMENT",
      /stage the volume 0f2c.*dhchap-key: is not a key/,
    ],
  ] as const
) {
  Deno.test(`NodeStageVolume with ${what} answers ${code} and connects nothing`, async () => {
    const { stage, connected } = node("unidirectional", newKeys());

    await rejects(stage(secrets), code, message);

    assert.deepEqual(connected(), []);
  });
}

Deno.test("NodeStageVolume refuses a connection without keys that another program made to the subsystem", async () => {
  const keys = newKeys();
  const { host, stage } = node("unidirectional", keys);
  host.connect(nqn, "nqn.theirs", "192.0.2.9");

  await rejects(
    stage({ "dhchap-key": keys.host.reveal() }),
    "FAILED_PRECONDITION",
    /in-band-auth is "unidirectional", and the connection nvme0 of host nqn.theirs to nqn.* has no key; the program/,
  );
  assert.deepEqual(host.mounts, []);
});

Deno.test("NodeStageVolume with a Discovery-Client that has no keys refuses what it has connected", async () => {
  const { host, stage } = node("bidirectional", undefined, undefined, "discovery-client");

  await rejects(
    stage(),
    "FAILED_PRECONDITION",
    /nvme0 .* has no key; the program that makes the connections needs the keys \(with a/,
  );
  assert.deepEqual(host.mounts, []);
  const [controller] = host.controllers.splice(0);
  assert(controller);
  host.controllers.push({ ...controller, keys: revealKeys(newKeys()) });
  await rejects(stage(), "FAILED_PRECONDITION", /has no key to authenticate the controller with; the program/);
  host.controllers.splice(0);
  host.controllers.push({ ...controller, keys: revealKeys(newKeys("bidirectional")) });
  await stage();
  assert.equal(host.mounts.length, 1);
});

Deno.test("NodeStageVolume with a Discovery-Client on a kernel without keys says what the kernel lacks", async () => {
  const { host, stage } = node("unidirectional", undefined, undefined, "discovery-client");
  host.authenticates = false;

  await rejects(
    stage(),
    "FAILED_PRECONDITION",
    /stage the volume 0f2c.*: the kernel cannot authenticate NVMe connections/,
  );
});

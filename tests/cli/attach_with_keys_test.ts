import assert from "node:assert/strict";
import { attachVolume, type LocalMachine } from "../../lib/cli/attach_volume.ts";
import { Secrets } from "../../lib/secrets.ts";
import { authenticatedCluster } from "../support/authenticated_cluster.ts";
import { keyMachine, newKeys, nodeNqn, place, revealKeys } from "../support/key_machine.ts";
import { callContext } from "../support/node_calls.ts";

Deno.test("attachVolume of a volume ID takes the keys from the cluster, and with new ones changes them there and here", async () => {
  await using c = await authenticatedCluster("bidirectional");
  const { host, attacher, demand } = keyMachine(undefined);
  host.addNamespace(c.volume.uuid, c.simulator.addresses.subsystemNqn);
  const tools: LocalMachine = { host, attacher, hostNqn: nodeNqn, discoveryDirectory: undefined };
  const attach = async (secrets: Record<string, string>) =>
    await attachVolume(callContext(), tools, {
      backend: c.backend,
      volumeId: c.volume.id,
      volumeContext: { "in-band-auth": "bidirectional" },
      secrets: new Secrets(secrets),
    }, undefined);

  await attach({});
  const [made] = c.hosts();
  assert(host.controllers.length > 0);
  assert(
    host.controllers.every(({ keys }) => keys?.host === made?.hostSecret && keys?.controller === made?.targetSecret),
  );
  const keys = newKeys("bidirectional");
  demand(keys);
  await attach({ "dhchap-key": keys.host.reveal(), "dhchap-ctrl-key": keys.controller?.reveal() ?? "" });

  assert.deepEqual(revealKeys(await c.keysOf("bidirectional")), revealKeys(keys));
  assert(host.controllers.every(({ keys: used }) => used?.host === keys.host.reveal()));
});

Deno.test("attachVolume of a known place connects with the keys it is given", async () => {
  const keys = newKeys();
  const { host, attacher, connected } = keyMachine(keys);
  const tools: LocalMachine = { host, attacher, hostNqn: nodeNqn, discoveryDirectory: undefined };
  const request = { namespace: { ...place, inBandAuth: "unidirectional" } as const, keys };

  await attachVolume(callContext(), tools, request, undefined);

  assert.deepEqual(connected().map(([, used]) => used), [revealKeys(keys), revealKeys(keys)]);
});

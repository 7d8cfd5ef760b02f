/**
 * The node service is cut off at each single call to the machine, before and after its effect; the repeat must
 * converge.
 */
import assert from "node:assert/strict";
import { DhchapKey } from "../../../lib/auth_key.ts";
import type { Attacher } from "../../../lib/host/attach/attacher.ts";
import { createDirectAttacher } from "../../../lib/host/attach/direct.ts";
import { createDiscoveryClientAttacher } from "../../../lib/host/attach/discovery_client.ts";
import { KeyedLock } from "../../../lib/lock.ts";
import { CutOff, FakeHost } from "../../support/fake_host.ts";
import { subsystemNqn } from "../../support/loop_machine.ts";
import { blockCapability, mountCapability, nodeCalls, publishContext, volumeId } from "../../support/node_calls.ts";

const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
const strategies = ["discovery-client", "direct"] as const;
const kinds = [
  ...["mount", "mount read-only at the target", "block", "block read-only"],
  ...["encrypted mount", "encrypted block", "authenticated mount"],
] as const;
const key = DhchapKey.generate().reveal();

type Step = "stage" | "publish" | "unpublish" | "unstage";
const steps: readonly Step[] = ["stage", "publish", "unpublish", "unstage"];

/** One life of the driver: a node service that remembers nothing of the one before. */
function driver(host: FakeHost, strategy: typeof strategies[number], kind: typeof kinds[number]) {
  const locks = new KeyedLock();
  const attacher: Attacher = strategy === "direct"
    ? createDirectAttacher({ host, hostNqn: "nqn.host", hostId: "f4c1fb1c-0d56-4d0a-9d5d-9c36ed1ffa0c", locks })
    : createDiscoveryClientAttacher({ host, directory: host.discoveryDirectory, hostNqn: "nqn.host" });
  const calls = nodeCalls({ host, attacher, locks });
  const volumeCapability = kind.includes("block") ? blockCapability() : mountCapability();
  const isEncrypted = kind.startsWith("encrypted");
  const volume = { volumeId: `${volumeId(uuid)}${isEncrypted ? "|hostcrypto:luks2" : ""}` };
  const isAuthenticated = kind.startsWith("authenticated");
  const secrets: Record<string, string> = {
    ...(isEncrypted ? { "host-encryption-passphrase": "open sesame" } : {}),
    ...(isAuthenticated ? { "dhchap-key": key } : {}),
  };
  const context = { ...publishContext(uuid), ...(isAuthenticated ? { "in-band-auth": "unidirectional" } : {}) };
  const stagingTargetPath = "/staging";
  const targetPath = "/pods/target";
  const acts: Record<Step, () => Promise<unknown>> = {
    stage: () =>
      calls.stage({
        ...volume,
        stagingTargetPath,
        volumeCapability,
        secrets,
        publishContext: context,
      }),
    publish: () =>
      calls.publish({
        ...volume,
        stagingTargetPath,
        targetPath,
        volumeCapability,
        secrets,
        publishContext: context,
        readonly: kind.includes("read-only"),
      }),
    unpublish: () => calls.unpublish({ ...volume, targetPath }),
    unstage: () => calls.unstage({ ...volume, stagingTargetPath }),
  };
  return acts;
}

function machine(kind: typeof kinds[number]): FakeHost {
  const host = new FakeHost();
  host.addNamespace(uuid, subsystemNqn);
  if (kind.startsWith("authenticated")) {
    host.demands.set(subsystemNqn, { host: key, controller: undefined });
    host.daemonKeys = { host: key, controller: undefined };
  }
  return host;
}

function isFormat(command: string): boolean {
  return command.startsWith("mkfs") || command.startsWith("cryptsetup luksFormat");
}

/** What the machine looks like, for comparison. */
function state(host: FakeHost) {
  const mounts = host.mounts.map(({ path, isNode, readOnly }) => ({ path, isNode, readOnly }));
  const connected = { devices: host.devices.length, controllers: host.controllers.length };
  const encryption = host.remote.map(({ luks }) => luks === undefined ? undefined : [luks.label, luks.inner.content]);
  const content = host.remote.map((namespace) => namespace.content);
  // A device that comes back has another number.
  const leftovers = host.leftovers().map((text) => text.replace(/nvme0n\d+/, "nvme0nX"));
  return { mounts, connected, leftovers, content, encryption };
}

for (const strategy of strategies) {
  for (const kind of kinds) {
    Deno.test(`promise 8: a node (${strategy}, ${kind}) that is killed at any point of a volume's life ends as if it never was`, async () => {
      // The life without a kill shows how many points there are, and how each step must end.
      const model = machine(kind);
      const begins: number[] = [];
      const ends: unknown[] = [];
      for (const step of steps) {
        begins.push(model.calls);
        await driver(model, strategy, kind)[step]();
        ends.push(state(model));
      }
      assert.deepEqual(model.leftovers(), []);
      if (strategy === "direct") assert.deepEqual(state(model).connected, { devices: 0, controllers: 0 });
      let tried = 0;

      for (let at = 1; at <= model.calls; at++) {
        for (const when of ["before", "after"] as const) {
          const host = machine(kind);
          host.cut = { at, when };
          for (const [n, step] of steps.entries()) {
            try {
              await driver(host, strategy, kind)[step]();
            } catch (error) {
              if (!(error instanceof CutOff) && host.calls < at) throw error;
              tried++;
              host.cut = undefined;
              await driver(host, strategy, kind)[step]();
            }
            assert.deepEqual(state(host), ends[n], `${step} after a kill ${when} call ${at}`);
          }
          // Within an encryption that was never used, a file system may be begun again.
          const format = kind.startsWith("encrypted") ? "cryptsetup luksFormat" : "mkfs";
          const formats = host.commands.filter((command) => command.startsWith(format));
          assert(formats.length <= 1, `formatted twice: ${formats.join("; ")}`);
        }
      }

      assert(tried >= model.calls, `${tried} kills in ${model.calls} calls`);
    });

    Deno.test(`promise 8: publish (${strategy}, ${kind}) after an unpublish that was cut off anywhere publishes as before`, async () => {
      const model = machine(kind);
      const acts = driver(model, strategy, kind);
      await acts.stage();
      await acts.publish();
      const published = state(model);
      const from = model.calls + 1;
      await acts.unpublish();

      for (let at = from; at <= model.calls; at++) {
        for (const when of ["before", "after"] as const) {
          const host = machine(kind);
          const killed = driver(host, strategy, kind);
          await killed.stage();
          await killed.publish();
          host.cut = { at, when };
          await killed.unpublish().catch(() => {});
          host.cut = undefined;

          await driver(host, strategy, kind).publish();

          assert.deepEqual(state(host), published, `after a kill ${when} call ${at}`);
        }
      }
    });

    Deno.test(`promise 25: publish (${strategy}, ${kind}) repairs a volume whose device was lost and came back, killed at any point`, async () => {
      /** The pod has gone after the loss of all paths, and the next one on this node is about to come. */
      const broken = async () => {
        const host = machine(kind);
        const acts = driver(host, strategy, kind);
        await acts.stage();
        await acts.publish();
        const published = state(host);
        host.loseDevices();
        if (strategy === "discovery-client") host.connect(subsystemNqn);
        await acts.unpublish();
        return { host, published };
      };
      const model = await broken();
      const from = model.host.calls + 1;
      const formats = model.host.commands.filter(isFormat).length;
      await driver(model.host, strategy, kind).publish();
      assert.deepEqual(state(model.host), model.published);
      assert.equal(model.host.commands.filter(isFormat).length, formats);

      for (let at = from; at <= model.host.calls; at++) {
        for (const when of ["before", "after"] as const) {
          const { host, published } = await broken();
          host.cut = { at, when };
          await driver(host, strategy, kind).publish().catch(() => {});
          host.cut = undefined;
          const acts = driver(host, strategy, kind);

          await acts.publish();

          assert.deepEqual(state(host), published, `after a kill ${when} call ${at}`);
          await acts.unpublish();
          await acts.unstage();
          assert.deepEqual(host.leftovers(), [], `after a kill ${when} call ${at}`);
        }
      }
    });

    Deno.test(`promise 4: unpublish and unstage (${strategy}, ${kind}) undo a stage or publish that was cut off anywhere`, async () => {
      const model = machine(kind);
      await driver(model, strategy, kind).stage();
      await driver(model, strategy, kind).publish();

      for (let at = 1; at <= model.calls; at++) {
        for (const when of ["before", "after"] as const) {
          const host = machine(kind);
          host.cut = { at, when };
          const killed = driver(host, strategy, kind);
          // Only what is left distinguishes a command from the kill.
          await killed.stage().then(() => killed.publish()).catch(() => {});
          host.cut = undefined;
          const acts = driver(host, strategy, kind);

          await acts.unpublish();
          await acts.unstage();

          assert.deepEqual(host.leftovers(), [], `after a kill ${when} call ${at}`);
          if (strategy === "direct") assert.deepEqual(state(host).connected, { devices: 0, controllers: 0 });
        }
      }
    });
  }
}

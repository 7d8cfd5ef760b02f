/**
 * A node is cut off at each single call to the machine while it makes or removes an inline volume; the repeat
 * converges.
 */
import assert from "node:assert/strict";
import { CutOff, FakeHost } from "../../support/fake_host.ts";
import { inlineHost, inlineId, inlineNode, inlineRequest } from "../../support/inline_node.ts";
import { rejects } from "../../support/node_calls.ts";
import { eventually, type TestSimulator } from "../../support/simulator.ts";

/** A FakeHost that is shown the namespaces of a simulated cluster. */
class ClusterHost extends FakeHost {
  readonly #sim: TestSimulator;

  constructor(sim: TestSimulator) {
    super();
    this.#sim = sim;
  }

  override connect(subsystemNqn: string, hostNqn = inlineHost, traddr?: string, trsvcid?: string): void {
    this.#look(subsystemNqn);
    super.connect(subsystemNqn, hostNqn, traddr, trsvcid);
  }

  override run(program: string, args: readonly string[], options: { readonly signal: AbortSignal }) {
    // A connect fails where the subsystem shows nothing.
    this.#look(this.#sim.addresses.subsystemNqn);
    return super.run(program, args, options);
  }

  #look(subsystemNqn: string): void {
    for (const uuid of this.#sim.control.visible(inlineHost)) {
      if (!this.remote.some((namespace) => namespace.uuid === uuid)) this.addNamespace(uuid, subsystemNqn);
    }
  }

  /** Counts calls from zero again, and forgets the namespaces that the cluster does not show any more. */
  begin(cut?: FakeHost["cut"]): void {
    this.calls = 0;
    this.commands.length = 0;
    this.cut = cut;
    const visible = this.#sim.control.visible(inlineHost);
    this.remote.splice(0, Infinity, ...this.remote.filter(({ uuid }) => visible.includes(uuid)));
    this.devices.splice(0, Infinity, ...this.devices.filter(({ namespace }) => visible.includes(namespace.uuid)));
  }
}

const targetPath = "/pods/mount";

async function machine(strategy: "direct" | "discovery-client" = "discovery-client") {
  const hosts: ClusterHost[] = [];
  const node = await inlineNode({
    data: "none",
    strategy,
    host: (sim) => {
      const host = new ClusterHost(sim);
      hosts.push(host);
      return host;
    },
  });
  const [host] = hosts;
  assert(host !== undefined);
  return { node, host };
}

for (const [strategy, readonly] of [["discovery-client", false], ["direct", true]] as const) {
  const kind = `${strategy}, ${readonly ? "read-only" : "writable"}`;
  const request = { ...inlineRequest(targetPath), readonly };

  Deno.test(`promise 8: a node that is killed anywhere in the life of an inline volume (${kind}) ends as if it never was`, async () => {
    const { node, host } = await machine(strategy);
    await using n = node;
    const living = () =>
      n.sim.control.cluster.volumes.filter(({ state }) => state !== "Deleting").map(({ name, acl }) => ({ name, acl }));
    const steps = {
      publish: () => n.publish(request),
      unpublish: () => n.unpublish({ volumeId: inlineId(), targetPath }),
    };
    const ends = {
      publish: {
        mounts: [{ path: targetPath, readOnly: readonly }],
        volumes: [{ name: inlineId(), acl: [inlineHost] }],
      },
      unpublish: { mounts: [], volumes: [] },
    };
    const state = () => ({
      mounts: host.mounts.map(({ path, readOnly }) => ({ path, readOnly })),
      volumes: living(),
    });
    // A life without a kill shows how many calls there are.
    for (const [name, step] of Object.entries(steps)) {
      await step();
      assert.deepEqual(state(), ends[name as keyof typeof ends]);
    }
    const calls = host.calls;
    assert.deepEqual(host.leftovers(), []);
    let tried = 0;
    // A kill after a call leaves what one before the next call leaves. To see that once is enough.
    const whens = strategy === "direct" ? ["after"] as const : ["before", "after"] as const;

    for (let at = 1; at <= calls; at++) {
      for (const when of whens) {
        host.begin({ at, when });
        for (const [name, step] of Object.entries(steps)) {
          try {
            await step();
          } catch (error) {
            // The kill comes out as it is, or as the reason why a call failed.
            if (!(error instanceof CutOff) && host.calls < at) throw error;
            tried++;
            host.cut = undefined;
            await step();
          }
          assert.deepEqual(state(), ends[name as keyof typeof ends], `${name} after a kill ${when} call ${at}`);
        }
        host.cut = undefined;
        const formats = host.commands.filter((command) => command.startsWith("mkfs"));
        assert(formats.length <= 1, `formatted twice: ${formats.join("; ")}`);
        assert.deepEqual(host.leftovers(), [], `after a kill ${when} call ${at}`);
        if (strategy === "direct") assert.deepEqual(host.controllers, [], `after a kill ${when} call ${at}`);
      }
    }

    assert(tried >= calls, `${tried} kills in ${calls} calls`);
  });
}

Deno.test("promise 4: unpublish undoes an inline volume whose publish was cut off anywhere", async () => {
  const { node, host } = await machine();
  await using n = node;
  await n.publish(inlineRequest(targetPath));
  const calls = host.calls;
  await n.unpublish({ volumeId: inlineId(), targetPath });

  for (let at = 1; at <= calls; at++) {
    host.begin({ at, when: "after" });
    await n.publish(inlineRequest(targetPath)).catch(() => {});
    host.cut = undefined;

    await n.unpublish({ volumeId: inlineId(), targetPath });

    assert.deepEqual(host.leftovers(), [], `after a kill after call ${at}`);
    await eventually("the volume goes", () => n.sim.control.leftovers().volumes.length === 0);
  }
});

Deno.test("publish of an inline volume that is made and cannot be shown is UNAVAILABLE, so that it is removed in the end", async () => {
  const { node, host } = await machine();
  await using n = node;
  host.answers.set("mkfs.ext4", { code: 1, stderr: "mkfs.ext4: No space left on device\n" });

  await rejects(n.publish(inlineRequest(targetPath)), "UNAVAILABLE", /mkfs\.ext4/);
  host.answers.clear();
  host.answers.set("blkid", { code: 0, stdout: "DEVNAME=x\nPTTYPE=gpt\n" });
  await rejects(
    n.publish(inlineRequest(targetPath)),
    "UNAVAILABLE",
    /holds a partition table \(gpt\), it is left alone/,
  );
  host.answers.clear();
  await n.unpublish({ volumeId: inlineId(), targetPath });

  assert.deepEqual(host.leftovers(), []);
});

Deno.test("promise 4: without a live path neither publish nor unpublish of an inline volume starts what would hang", async () => {
  const { node, host } = await machine("direct");
  await using n = node;
  const setStates = (state: string) => host.controllers.forEach((controller) => controller.state = state);
  const [request, gone] = [inlineRequest(targetPath), { volumeId: inlineId(), targetPath }];
  await n.publish(request);
  setStates("connecting");
  host.begin();

  const noPath = /publish the inline volume csi-\w+: \/dev\/nvme0n1 has no live path \(nvme0 connecting/;
  await rejects(n.publish(request), "UNAVAILABLE", noPath);
  await rejects(n.unpublish(gone), "UNAVAILABLE", noPath);
  assert.deepEqual(host.commands, []);
  setStates("live");
  await n.unpublish(gone);

  assert.deepEqual(host.leftovers(), []);
});

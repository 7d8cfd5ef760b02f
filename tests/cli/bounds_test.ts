/** What a CSI call may cost at most, on the happy path. Counts only: times are the benchmark's. */
import assert from "node:assert/strict";
import { mainPath } from "../support/lbcsi.ts";
import { bounds, type Cost, firstVolume, type FsType, measureCalls } from "../support/measured_calls.ts";
import { needs } from "../support/needs.ts";

const program = [Deno.execPath(), "run", "-A", mainPath];
const machine = needs("root", "loop", "mkfs.ext4");
const fsTypes: readonly FsType[] = machine
  ? (["ext4", "xfs", "btrfs"] as const).filter((fsType) => needs(`mkfs.${fsType}`))
  : [];

// One run of the program serves all tests. The first test starts it, and continues when it has ended.
let running: Promise<readonly Cost[]> | undefined;

async function costsOf(of: (call: string) => boolean): Promise<readonly Cost[]> {
  const all = await (running ??= measureCalls(program, fsTypes, AbortSignal.timeout(120_000)));
  const found = all.filter(({ call }) => of(call));
  assert.notEqual(found.length, 0);
  return found;
}

for (const rpc of ["CreateVolume", "DeleteVolume", "ControllerPublishVolume", "ControllerUnpublishVolume"]) {
  const bound = bounds[rpc]?.managementCalls ?? 0;
  Deno.test(`${rpc} on a warm connection makes ${bound} management calls at most`, async () => {
    const found = await costsOf((call) => call.startsWith(`${rpc}, `) && call !== `${rpc}, ${firstVolume}`);

    for (const { call, managementCalls } of found) {
      assert.ok(managementCalls.length >= 1, `${call} made no management call`);
      assert.ok(managementCalls.length <= bound, `${call} made ${managementCalls.join(", ")}`);
    }
  });
}

Deno.test("a new connection costs one GetVersion, and the first publish one GetClusterInfo", async () => {
  const found = await costsOf((call) => call.endsWith(`, ${firstVolume}`));

  const extra = found.flatMap(({ managementCalls }) => managementCalls).filter((rpc) =>
    rpc.startsWith("GetV") || rpc.startsWith("GetC")
  );
  assert.deepEqual(extra.filter((rpc) => rpc !== "GetVolume").sort(), ["GetClusterInfo", "GetVersion"]);
});

Deno.test({
  name: "calls of the node make no management call",
  ignore: !machine,
  fn: async () => {
    const found = await costsOf((call) => call.startsWith("Node"));

    assert.deepEqual(found.filter(({ managementCalls }) => managementCalls.length > 0), []);
  },
});

Deno.test({
  name: "the node logs every program that it starts, and no other",
  ignore: !machine,
  fn: async () => {
    const found = await costsOf((call) => call.startsWith("Node"));

    for (const { call, programs, logged } of found) assert.deepEqual(logged, programs, call);
    assert.ok(found.some(({ programs }) => programs.includes("mkfs.ext4")));
  },
});

for (const fsType of ["ext4", "xfs", "btrfs"] as const) {
  const ignore = !fsTypes.includes(fsType);
  for (const state of ["new", "known"]) {
    Deno.test({
      name: `NodeStageVolume of a ${state} ${fsType} volume starts ${
        bounds["NodeStageVolume"]?.programs
      } programs at most, ${state === "new" ? "mkfs once" : "mkfs never"}`,
      ignore,
      fn: async () => {
        const found = await costsOf((call) => call === `NodeStageVolume, ${state} ${fsType} volume`);

        for (const { programs } of found) {
          assert.ok(programs.length <= (bounds["NodeStageVolume"]?.programs ?? 0), programs.join(", "));
          assert.ok(programs.includes("mount"), programs.join(", "));
          const made = programs.filter((name) => name.startsWith("mkfs"));
          assert.deepEqual(made, state === "new" ? [`mkfs.${fsType}`] : []);
        }
      },
    });
  }

  const single = { NodePublishVolume: "mount", NodeUnpublishVolume: "umount", NodeUnstageVolume: "umount" };
  for (const [rpc, name] of Object.entries(single)) {
    Deno.test({
      name: `${rpc} of ${fsType} starts ${name} and nothing else`,
      ignore,
      fn: async () => {
        const found = await costsOf((call) => call.startsWith(`${rpc}, `) && call.endsWith(` ${fsType} volume`));

        assert.deepEqual(found.map(({ programs }) => programs), [[name], [name]]);
      },
    });
  }

  Deno.test({
    name: `NodeGetVolumeStats of ${fsType} starts no program`,
    ignore,
    fn: async () => {
      const found = await costsOf((call) =>
        call.startsWith("NodeGetVolumeStats, ") && call.endsWith(` ${fsType} volume`)
      );

      assert.deepEqual(found.map(({ programs }) => programs), [[], []]);
    },
  });
}

Deno.test({
  name: "a raw block volume is staged and unstaged without a program, published and unpublished with one",
  ignore: !machine,
  fn: async () => {
    const found = await costsOf((call) => call.startsWith("Node") && call.endsWith(" block volume"));

    const once = [
      ["NodeStageVolume"],
      ["NodePublishVolume", "mount"],
      ["NodeGetVolumeStats"],
      ["NodeUnpublishVolume", "umount"],
      ["NodeUnstageVolume"],
    ];
    assert.deepEqual(found.map(({ call, programs }) => [call.split(",", 1)[0], ...programs]), [...once, ...once]);
  },
});

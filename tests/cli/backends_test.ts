import assert from "node:assert/strict";
import { attachMode, type BackendName, backendNames, isSubsystemOf, storageSystems } from "../../lib/cli/backends.ts";
import { poseidonNqnPrefix } from "../../lib/namespace.ts";
import type { StorageBackend } from "../../lib/storage/backend.ts";
import { lightosBackend } from "../../lib/storage/lightos/backend.ts";
import { poseidonBackend } from "../../lib/storage/poseidon/backend.ts";
import { lightosOptions, quiet } from "../support/backends.ts";

const open: Readonly<Record<BackendName, () => StorageBackend>> = {
  lightos: () => lightosBackend(lightosOptions),
  poseidon: () => poseidonBackend({ log: quiet, systems: undefined, metrics: undefined }),
};

for (const name of backendNames) {
  Deno.test(`the record of ${name} says the same about expansion as its backend`, async () => {
    await using backend = open[name]();

    assert.equal(backend.name, name);
    assert.equal(storageSystems[name].canExpand, backend.expansion !== undefined);
  });
}

Deno.test("each subsystem is of one storage system: a known prefix decides, LightOS has the others", () => {
  const subsystems = [`${poseidonNqnPrefix}0f2c:n1`, "nqn.2014-08.org.nvmexpress:NVMf:uuid:0f2c"];

  const owners = subsystems.map((nqn) => backendNames.filter((name) => isSubsystemOf(name)(nqn)));

  assert.deepEqual(owners, [["poseidon"], ["lightos"]]);
});

Deno.test("--attach decides how a node connects, and the storage system when it is absent", () => {
  assert.equal(attachMode({ backend: "lightos" }), "discovery-client");
  assert.equal(attachMode({ backend: "lightos", attach: "direct" }), "direct");
  assert.equal(attachMode({ backend: "poseidon", attach: undefined }), "direct");
});

import assert from "node:assert/strict";
import type { Scenario } from "./vm/scenario.ts";

const directory = new URL("./vm/scenarios/", import.meta.url);
const names: string[] = [];
for (const { name } of Deno.readDirSync(directory)) {
  const { scenario }: { scenario: Scenario } = await import(new URL(name, directory).href);
  names.push(...scenario.boots.flat().map((check) => check.name));
}

Deno.test("each check in a virtual machine has a name of its own, so that --only finds it", () => {
  assert.ok(names.length > 0);
  assert.deepEqual(names.filter((name, at) => names.indexOf(name) !== at), []);
});

Deno.test({
  name: `${names.length} checks of real NVMe/TCP in a virtual machine: run them with "deno task test:vm"`,
  ignore: true,
  fn: () => {},
});

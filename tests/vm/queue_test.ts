import assert from "node:assert/strict";
import { join } from "node:path";
import { type Item, lay, remaining, take } from "./queue.ts";
import type { Scenario } from "./scenario.ts";

const directory = new URL("./scenarios/", import.meta.url);
const names: string[] = [];
for (const { name } of Deno.readDirSync(directory)) {
  const { scenario }: { scenario: Scenario } = await import(new URL(name, directory).href);
  names.push(...scenario.boots.flat().map((check) => check.name));
}

Deno.test("each check in a virtual machine has a name of its own, so that --only finds it", () => {
  assert.ok(names.length > 0);
  assert.deepEqual(names.filter((name, at) => names.indexOf(name) !== at), []);
});

Deno.test("guests share a queue: each check runs once, and a guest continues its own group while others begin new ones", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-queue-" });
  try {
    const queue = join(directory, "queue");
    const items = [1, 1, 1, 2, 2, 3].map((group, at): Item => ({ group, file: "a.js", name: `check ${at}` }));
    await lay(queue, items);
    assert.deepEqual(await remaining(queue), items);
    const nameFor = (group: number | undefined) => take(queue, group)?.name;

    assert.deepEqual([nameFor(undefined), nameFor(undefined)], ["check 0", "check 3"]);
    assert.deepEqual([nameFor(1), nameFor(2), nameFor(2)], ["check 1", "check 4", "check 5"]);
    assert.deepEqual(await remaining(queue), items.slice(2, 3));
    assert.deepEqual([nameFor(3), nameFor(1), nameFor(undefined)], ["check 2", undefined, undefined]);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});

Deno.test({
  name: `${names.length} checks of real NVMe/TCP in a virtual machine: run them with "deno task test:vm"`,
  ignore: true,
  fn: () => {},
});

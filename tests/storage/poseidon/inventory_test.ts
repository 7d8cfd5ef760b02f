/** Lists of PoseidonOS that contradict themselves are not used. */
import { rejects } from "node:assert/strict";
import { failsWith, startPoseidonBackend } from "../../support/backends.ts";

Deno.test("promise 28: PoseidonOS that lists two volumes with one UUID is not believed", async () => {
  await using t = await startPoseidonBackend();
  const { id, uuid } = await t.create();
  await t.create("pvc-2");
  for (const volume of t.volumes()) volume.uuid = uuid;

  await rejects(t.get(id), failsWith("INTERNAL", /volumes "pvc-1" and "pvc-2" with the same UUID/));
});

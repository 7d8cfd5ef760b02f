import assert from "node:assert/strict";
import { addressOf, controllersOf } from "../../../lib/host/nvme/controllers.ts";
import { controllerAttributes, nqn, withSysfs } from "../../support/sysfs_tree.ts";

Deno.test("controllersOf reads state and address", async () => {
  await withSysfs(
    { ...controllerAttributes("nvme1", "live"), "class/nvme/nvme7/subsysnqn": "nqn.other" },
    async (host) => {
      const [only, ...rest] = await controllersOf(host, nqn);
      assert.deepEqual([only?.state, only?.hostNqn, rest.length], ["live", "nqn.host", 0]);
      assert.deepEqual(only === undefined ? undefined : addressOf(only), { traddr: "192.0.2.1", trsvcid: "4420" });
    },
  );
});

import assert from "node:assert/strict";
import { controllersOf } from "../../../lib/host/nvme/controllers.ts";
import { disconnectController } from "../../../lib/host/nvme/disconnect.ts";
import { connectedHost } from "../../support/fake_disk.ts";
import { callContext, rejects } from "../../support/node_calls.ts";
import { nqn } from "../../support/sysfs_tree.ts";

Deno.test("disconnectController fails when nvme-cli exits with 0 and says that it failed", async () => {
  const host = connectedHost();
  host.answers.set("nvme disconnect", { code: 0, stderr: "Failed to disconnect nvme0: Permission denied\n" });
  const [controller] = await controllersOf(host, nqn);
  assert(controller);

  await rejects(
    disconnectController(host, callContext(), controller),
    "UNAVAILABLE",
    /Cannot disconnect nvme0 from nqn.*: Failed to disconnect nvme0: Permission denied$/,
  );
});

Deno.test("disconnectController does nothing when the connection has gone before nvme-cli starts", async () => {
  const host = connectedHost();
  const [controller] = await controllersOf(host, nqn);
  assert(controller);
  host.run = () => {
    host.controllers.splice(0);
    return Promise.resolve({ code: 1, stdout: "", stderr: "Did not find device nvme0\n" });
  };

  await disconnectController(host, callContext(), controller);
});

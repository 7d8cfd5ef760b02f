import assert from "node:assert/strict";
import { rescanNamespaces } from "../../../lib/host/nvme/rescan.ts";
import { connectedHost } from "../../support/fake_disk.ts";
import { callContext } from "../../support/node_calls.ts";
import { nqn } from "../../support/sysfs_tree.ts";

Deno.test("rescanNamespaces rescans one live controller, and a failure does no harm", async () => {
  const host = connectedHost();
  host.connect(nqn, "nqn.host", "192.0.2.2");
  host.connect(nqn, "nqn.host", "192.0.2.3");
  const [first] = host.controllers;
  assert(first);
  first.state = "connecting";

  await rescanNamespaces(host, callContext(), nqn);
  assert.deepEqual(host.commands, ["nvme ns-rescan /dev/nvme1"]);
  host.answers.set("nvme ns-rescan", { code: 1, stderr: "No such device" });
  await rescanNamespaces(host, callContext(), nqn);

  assert.equal(host.commands.length, 3);
});

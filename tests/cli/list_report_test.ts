import assert from "node:assert/strict";
import { listAsText } from "../../lib/cli/list_report.ts";

Deno.test("listAsText does not let the name of a mount point control the terminal", () => {
  const mount = { path: "/a\u001b[2J\u009b b", type: "filesystem", fileSystem: "ext4", readOnly: false } as const;

  const text = listAsText({ volumes: [], deadMounts: [{ ...mount, source: "/dev/nvme0n1" }], connections: [] });

  assert.match(text, /^ {2}"\/a\\u001b\[2J\\u009b b" {2}ext4 {2}rw {2}was \/dev\/nvme0n1$/m);
});

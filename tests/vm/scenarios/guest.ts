/** The guest itself: its kernel has what the others rely on, and the program runs in it. */
import { deepStrictEqual, match } from "node:assert/strict";
import { scenario as of } from "../scenario.ts";
import { program, read, tool } from "../testbed.ts";

export const scenario = of([
  {
    name: "the guest's kernel has the NVMe/TCP initiator and target",
    async run(testbed) {
      const found = ["/dev/nvme-fabrics", "/sys/kernel/config/nvmet/subsystems"].filter((path) => {
        try {
          return Deno.statSync(path) !== undefined;
        } catch {
          return false;
        }
      });

      deepStrictEqual(found, ["/dev/nvme-fabrics", "/sys/kernel/config/nvmet/subsystems"]);
      deepStrictEqual(read("/sys/module/nvme_core/parameters/multipath"), "Y");
      testbed.measured("guest", `${await tool("uname", "-r")}, ${(await tool("nvme", "version")).split("\n")[0]}`);
    },
  },
  {
    name: "the program starts in the guest",
    async run() {
      const [deno = "", ...words] = program;

      match(await tool(deno, ...words, "version"), /^lbcsi \d/);
    },
  },
]);

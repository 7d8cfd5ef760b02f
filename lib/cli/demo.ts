/** `lbcsi demo`: takes volumes through their whole lives on a simulated cluster. */
import * as z from "zod";
import { defineCommand } from "./command.ts";
import { simulatedBackendOption } from "./option_groups.ts";
import { switchSchema } from "./option_schemas.ts";
import type { Options, Settings } from "./options.ts";

const demoOptions = {
  backend: { ...simulatedBackendOption.backend, meaning: "what is simulated: lightos, poseidon (PoseidonOS)" },
  fs: {
    value: "LIST",
    meaning: "file systems to use, separated by commas; default: ext4, and every other one that this machine can make",
    schema: z.string().transform((list) => list.split(","))
      .pipe(z.array(z.enum(["ext4", "xfs", "btrfs"], { error: "is not of ext4, xfs, btrfs" }))).optional(),
  },
  keep: { meaning: "keep the temporary directory with the logs", schema: switchSchema },
  verbose: { meaning: "show every command that is run", schema: switchSchema },
} as const satisfies Options;

const helpText =
  `Starts a simulated cluster, a controller and a node as separate processes, acts as the orchestrator over CSI, and checks at
the end that nothing is left behind. File systems need root, loop devices and mkfs; without them it says what is missing
and shows the control plane alone.`;

/** `lbcsi demo`. */
export const demoCommand = defineCommand(demoOptions, run, helpText);

async function run(settings: Settings<typeof demoOptions>): Promise<number> {
  const { demo } = await import("../demo/demo.ts");
  return await demo(settings);
}

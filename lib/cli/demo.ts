/** `lbcsi demo`: takes volumes through their whole lives on a simulated cluster. */
import * as z from "zod";
import { defineCommand } from "./command.ts";
import { simulatedBackendOption } from "./option_groups.ts";
import { switchSchema } from "./option_schemas.ts";
import type { Options, Settings } from "./options.ts";

const demoOptions = {
  backend: { ...simulatedBackendOption.backend, meaning: "what is played: lightos, poseidon (PoseidonOS)" },
  fs: {
    value: "LIST",
    meaning: "file systems to play, separated by commas; default: ext4, and each other one that this machine can make",
    schema: z.string().transform((list) => list.split(","))
      .pipe(z.array(z.enum(["ext4", "xfs", "btrfs"], { error: "is not of ext4, xfs, btrfs" }))).optional(),
  },
  keep: { meaning: "leave the temporary directory, with the logs in it", schema: switchSchema },
  verbose: { meaning: "show every command that is run", schema: switchSchema },
} as const satisfies Options;

const helpText =
  `It starts a simulated cluster, a controller and a node as processes of their own, plays the orchestrator over CSI, and
checks at the end that nothing is left over. File systems need root, loop devices and mkfs; without them it says
what is missing and plays the control plane alone.`;

/** `lbcsi demo`. */
export const demoCommand = defineCommand(demoOptions, run, helpText);

async function run(settings: Settings<typeof demoOptions>): Promise<number> {
  const { demo } = await import("../demo/demo.ts");
  return await demo(settings);
}

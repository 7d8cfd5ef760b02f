/** `lbcsi completion`: prints a script for a shell. */
import * as z from "zod";
import { defineCommand, type ListCommands } from "./command.ts";
import type { Options, Settings } from "./options.ts";
import { writeOut } from "./shell_command.ts";

const completionOptions = {
  shell: {
    word: true,
    value: "SHELL",
    meaning: "bash, zsh or fish",
    schema: z.enum(["bash", "zsh", "fish"], { error: "is not bash, zsh or fish" }),
  },
} as const satisfies Options;

const helpText = `bash:  source <(lbcsi completion bash)
zsh:   source <(lbcsi completion zsh), after compinit
fish:  lbcsi completion fish | source`;

/** `lbcsi completion`. */
export const completionCommand = defineCommand(completionOptions, run, helpText);

async function run({ shell }: Settings<typeof completionOptions>, listCommands: ListCommands): Promise<number> {
  const { completionScript } = await import("./completion_scripts.ts");
  await writeOut(completionScript(shell, await listCommands()));
  return 0;
}

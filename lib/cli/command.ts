/** What a subcommand of lbcsi consists of. */
import { type Options, readOptions, type Settings } from "./options.ts";

/** One subcommand. */
export interface Command {
  readonly options: Options;
  /** What `--help` prints between the summary and the options. */
  readonly helpText?: string;
  /** Runs the command with the arguments after its name; the result is the exit status. Throws UsageError for bad ones. */
  run(args: readonly string[], listCommands: ListCommands): Promise<number>;
}

/** A subcommand as help texts and completion scripts show it. */
export interface CommandSummary {
  readonly name: string;
  readonly summary: string;
  readonly options: Options;
}

/** All subcommands. It loads the file of each, so only commands that need the list call it. */
export type ListCommands = () => Promise<readonly CommandSummary[]>;

/** A subcommand whose settings come from its arguments and the environment. */
export function defineCommand<O extends Options>(
  options: O,
  run: (settings: Settings<O>, listCommands: ListCommands) => Promise<number>,
  helpText?: string,
): Command {
  return {
    options,
    run: (args, listCommands) => run(readOptions(options, args, (name) => Deno.env.get(name)), listCommands),
    ...(helpText === undefined ? {} : { helpText }),
  };
}

/** Environment variables that look like options of this driver and are not: most often a typing error. */
import type { Logger } from "../log.ts";
import { didYouMean } from "../suggestion.ts";
import type { ListCommands } from "./command.ts";
import type { Options } from "./options.ts";

/** An environment variable that looks like an option and is not one. */
export interface UnknownVariable {
  readonly name: string;
  /** `, did you mean "LB_CSI_LOG_LEVEL"?`; empty when no known variable is close. */
  readonly suggestion: string;
}

/** Those of `names` that start with `LB_CSI_`, as the variable of every option does, and are not in `known`. */
export function unknownVariables(names: readonly string[], known: readonly string[]): readonly UnknownVariable[] {
  return names.filter((name) => isOptionLike(name) && !known.includes(name)).sort()
    .map((name) => ({ name, suggestion: didYouMean(name, known) }));
}

/**
 * Logs a warning for each variable that looks like an option and is not one of any command: containers run other commands
 * too, such as the doctor. The executable for controllers may not list the environment, so there only the variables of the
 * vendor's driver are found.
 *
 * @param own the options of the command that runs; other commands are loaded only when these do not explain a variable
 */
export async function warnOfUnknownVariables(log: Logger, own: Options, listCommands: ListCommands): Promise<void> {
  const mayListAll = Deno.permissions.querySync({ name: "env" }).state === "granted";
  const names = mayListAll
    ? Object.keys(Deno.env.toObject())
    : vendorVariables.filter((name) => Deno.env.get(name) !== undefined);
  const ownVariables = variablesOf(own);
  if (names.every((name) => !isOptionLike(name) || ownVariables.includes(name))) return;
  const known = (await listCommands()).flatMap(({ options }) => variablesOf(options));
  for (const { name, suggestion } of unknownVariables(names, known)) {
    log.warning("ignores an unknown environment variable", {
      name,
      error: `${name} is not the variable of any option${suggestion}`,
    });
  }
}

/** Variables of the vendor's driver for LightOS that this one does not have. */
const vendorVariables = [
  "LB_CSI_BE_CONFIG_PATH",
  "LB_CSI_LOG_ROLE",
  "LB_CSI_LOG_TIME",
  "LB_CSI_LUKS_CONFIG_PATH",
  "LB_CSI_RWX",
];

function isOptionLike(name: string): boolean {
  return name.startsWith("LB_CSI_");
}

function variablesOf(options: Options): readonly string[] {
  return Object.values(options).flatMap(({ env = [] }) => env);
}

/**
 * Reads the options of a subcommand. A flag wins over its environment variable, and that over the default; an empty text
 * counts as not given. A zod schema checks every value, and a bad one is reported with its source.
 *
 * The help text is made from the same table of options, so the two cannot differ.
 */
import { parseArgs, type ParseArgsConfig } from "node:util";
import type * as z from "zod";
import { closestWord } from "../suggestion.ts";

/** One option. `schema` reads the text given; it must accept `fallback`, or `undefined` where there is none. */
export interface Option<S extends z.ZodType = z.ZodType> {
  readonly short?: string;
  /** It is a positional argument, not a flag. Positional arguments have the order of the table. */
  readonly word?: true;
  /** Environment variables; the first one that is set wins. */
  readonly env?: readonly string[];
  readonly fallback?: string;
  /** The name of the value in the help text. Without one, the option is a switch that takes no value. */
  readonly value?: string;
  readonly meaning: string;
  readonly schema: S;
}

/** The options of a command, by name. */
export type Options = Readonly<Record<string, Option>>;
/** The values of options, by name. */
export type Settings<O extends Options> = { readonly [K in keyof O]: z.output<O[K]["schema"]> };

/** Arguments or variables that cannot be used. The message is for the person who gave them. */
export class UsageError extends Error {
  override readonly name = "UsageError";
}

/** The settings that `args` and `environment` give. Throws UsageError that lists every bad one. */
export function readOptions<O extends Options>(
  options: O,
  args: readonly string[],
  environment: (name: string) => string | undefined,
): Settings<O> {
  const config: NonNullable<ParseArgsConfig["options"]> = {};
  const words = Object.entries(options).flatMap(([name, { word }]) => word ? [name] : []);
  for (const [name, { short, value }] of Object.entries(options)) {
    if (words.includes(name)) continue;
    config[name] = { type: value === undefined ? "boolean" : "string", ...(short === undefined ? {} : { short }) };
  }
  const given = parseArguments([...args], config, words);
  const settings: Record<string, unknown> = {};
  const problems: string[] = [];
  for (const [name, option] of Object.entries(options)) {
    const { text, source } = findText(name, option, given[name], environment);
    const parsed = option.schema.safeParse(text);
    if (parsed.success) settings[name] = parsed.data;
    else if (text === undefined) problems.push(`${displayName(name, option)} is missing${environmentHint(option)}`);
    else problems.push(`${source} "${text}": ${parsed.error.issues.map(({ message }) => message).join("; ")}`);
  }
  if (problems.length > 0) throw new UsageError(problems.join("\n"));
  return settings as Settings<O>;
}

/** The options as aligned lines of the help text. */
export function describeOptions(options: Options): string {
  const rows = Object.entries(options).map(([name, option]) => {
    const short = option.short === undefined ? "    " : `-${option.short}, `;
    const flag = option.word
      ? `  ${displayName(name, option)}`
      : `  ${short}--${name}${option.value === undefined ? "" : ` ${option.value}`}`;
    const facts = [
      ...(option.fallback === undefined ? [] : [`default: ${option.fallback}`]),
      ...(option.env === undefined ? [] : [`env: ${option.env.join(", ")}`]),
    ];
    return { flag, text: option.meaning + (facts.length === 0 ? "" : ` (${facts.join("; ")})`) };
  });
  const width = Math.min(40, Math.max(...rows.map(({ flag }) => flag.length)) + 2);
  return rows.map(({ flag, text }) =>
    flag.length < width ? flag.padEnd(width) + text : `${flag}\n${" ".repeat(width)}${text}`
  ).join("\n");
}

type CommandArguments = Readonly<Record<string, string | boolean | undefined>>;

function parseArguments(
  args: string[],
  config: NonNullable<ParseArgsConfig["options"]>,
  words: readonly string[],
): CommandArguments {
  const allowPositionals = words.length > 0;
  try {
    const { values, positionals } = parseArgs({ args, options: config, strict: true, allowPositionals });
    const surplus = positionals[words.length];
    if (surplus !== undefined) throw new UsageError(`Unexpected argument '${surplus}'`);
    return { ...values as CommandArguments, ...Object.fromEntries(words.map((name, at) => [name, positionals[at]])) };
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    const [, unknown] = /^Unknown option '--([^']+)'/.exec(message) ?? [];
    if (unknown === undefined) throw new UsageError(message);
    const meant = closestWord(unknown, Object.keys(config));
    throw new UsageError(`Unknown option '--${unknown}'${meant === undefined ? "" : `, did you mean '--${meant}'?`}`);
  }
}

/** As a person writes it: `--node-id`, or `VOLUME_ID` for a positional argument. */
function displayName(name: string, { word, value }: Option): string {
  return word ? value ?? name : `--${name}`;
}

function findText(
  name: string,
  option: Option,
  flag: string | boolean | undefined,
  environment: (name: string) => string | undefined,
): { readonly text: string | undefined; readonly source: string } {
  if (flag !== undefined && flag !== "") return { text: String(flag), source: displayName(name, option) };
  for (const variable of option.env ?? []) {
    const text = environment(variable)?.trim();
    if (text !== undefined && text !== "") return { text, source: variable };
  }
  return { text: option.fallback, source: `the default of --${name}` };
}

function environmentHint({ env }: Option): string {
  return env === undefined ? "" : ` (or set ${env.join(", ")})`;
}

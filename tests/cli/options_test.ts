import { deepStrictEqual, match, strictEqual, throws } from "node:assert/strict";
import * as z from "zod";
import { switchSchema, unixEndpoint, wholeNumber } from "../../lib/cli/option_schemas.ts";
import { describeOptions, type Options, readOptions, UsageError } from "../../lib/cli/options.ts";

const options = {
  endpoint: {
    short: "e",
    env: ["CSI_ENDPOINT"],
    fallback: "unix:///run/csi.sock",
    value: "URL",
    meaning: "socket",
    schema: unixEndpoint,
  },
  count: { env: ["COUNT"], fallback: "3", value: "N", meaning: "a number", schema: wholeNumber(1, 10) },
  name: { value: "TEXT", meaning: "required", schema: z.string() },
  quick: { meaning: "a switch", schema: switchSchema },
} as const satisfies Options;

const noEnvironment = () => undefined;

Deno.test("readOptions prefers a flag to the environment, and the environment to the default", () => {
  const environment = (name: string) => ({ COUNT: "5", CSI_ENDPOINT: "unix:///env.sock" })[name];

  const settings = readOptions(options, ["--name", "a", "-e", "unix:///flag.sock"], environment);

  deepStrictEqual(settings, { endpoint: "/flag.sock", count: 5, name: "a", quick: false });
});

Deno.test("readOptions counts an empty flag and an empty variable as not given", () => {
  const settings = readOptions(options, ["--name", "a", "--endpoint", "", "--quick"], () => " ");

  deepStrictEqual(settings, { endpoint: "/run/csi.sock", count: 3, name: "a", quick: true });
});

Deno.test("readOptions lists every bad value with its source", () => {
  const environment = (name: string) => name === "COUNT" ? "eleven" : undefined;

  throws(() => readOptions(options, ["--endpoint", "tcp://1.2.3.4"], environment), (error) => {
    strictEqual(error instanceof UsageError, true);
    const { message } = error as UsageError;
    match(message, /--endpoint "tcp:\/\/1\.2\.3\.4": is not of the form unix:\/\/\/path/);
    match(message, /COUNT "eleven": is not a whole number from 1 to 10/);
    match(message, /--name is missing/);
    return true;
  });
});

for (
  const [args, problem] of [
    [["--nmae", "x"], /: Unknown option '--nmae', did you mean '--name'\?$/],
    [["--colour", "x"], /: Unknown option '--colour'$/],
    [["--name"], /'--name <value>' argument missing/],
    [["name"], /Unexpected argument 'name'/],
    [["--quick=yes"], /does not take an argument/],
  ] as const
) {
  Deno.test(`readOptions rejects ${args.join(" ")}`, () => {
    throws(() => readOptions(options, args, noEnvironment), problem);
  });
}

const withWords = {
  volume: { word: true, value: "VOLUME_ID", meaning: "which volume", schema: z.string() },
  place: { word: true, value: "PLACE", meaning: "where", schema: z.string().optional() },
  quick: { meaning: "a switch", schema: switchSchema },
} as const satisfies Options;

Deno.test("readOptions takes positional arguments in the order of the table, wherever flags stand", () => {
  const settings = readOptions(withWords, ["v1", "--quick", "here"], noEnvironment);

  deepStrictEqual(settings, { volume: "v1", place: "here", quick: true });
  deepStrictEqual(readOptions(withWords, ["--", "-x"], noEnvironment), {
    volume: "-x",
    place: undefined,
    quick: false,
  });
});

for (
  const [args, problem] of [
    [[], /: VOLUME_ID is missing$/],
    [["a", "b", "c"], /: Unexpected argument 'c'$/],
    [["a", "--volume", "b"], /Unknown option '--volume'/],
  ] as const
) {
  Deno.test(`readOptions rejects the arguments "${args.join(" ")}"`, () => {
    throws(() => readOptions(withWords, args, noEnvironment), problem);
  });
}

Deno.test("describeOptions shows a positional argument as it is written", () => {
  match(describeOptions(withWords), /^ {2}VOLUME_ID +which volume$/m);
});

Deno.test("describeOptions shows each flag with its default and its variable", () => {
  const text = describeOptions(options);

  match(text, /-e, --endpoint URL +socket \(default: unix:\/\/\/run\/csi\.sock; env: CSI_ENDPOINT\)/);
  match(text, /--quick +a switch/);
});

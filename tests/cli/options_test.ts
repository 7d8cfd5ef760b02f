import { deepStrictEqual, match, strictEqual, throws } from "node:assert/strict";
import * as z from "zod";
import { absolutePath, switchSchema, unixEndpoint, wholeNumber } from "../../lib/cli/option_schemas.ts";
import { describeOptions, type Options, readOptions, UsageError } from "../../lib/cli/options.ts";
import { unknownVariables } from "../../lib/cli/unknown_variables.ts";

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

Deno.test("readOptions takes a flag before the environment and that before the default", () => {
  const environment = (name: string) => ({ COUNT: "5", CSI_ENDPOINT: "unix:///env.sock" })[name];

  const settings = readOptions(options, ["--name", "a", "-e", "unix:///flag.sock"], environment);

  deepStrictEqual(settings, { endpoint: "/flag.sock", count: 5, name: "a", quick: false });
});

Deno.test("readOptions counts an empty flag and an empty variable as not given", () => {
  const settings = readOptions(options, ["--name", "a", "--endpoint", "", "--quick"], () => " ");

  deepStrictEqual(settings, { endpoint: "/run/csi.sock", count: 3, name: "a", quick: true });
});

Deno.test("readOptions lists every bad value with the place that it came from", () => {
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
  Deno.test(`readOptions refuses ${args.join(" ")}`, () => {
    throws(() => readOptions(options, args, noEnvironment), problem);
  });
}

const withWords = {
  volume: { word: true, value: "VOLUME_ID", meaning: "which volume", schema: z.string() },
  place: { word: true, value: "PLACE", meaning: "where", schema: z.string().optional() },
  quick: { meaning: "a switch", schema: switchSchema },
} as const satisfies Options;

Deno.test("readOptions takes bare words in the order of the table, wherever flags stand", () => {
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
  Deno.test(`readOptions refuses the words "${args.join(" ")}"`, () => {
    throws(() => readOptions(withWords, args, noEnvironment), problem);
  });
}

Deno.test("unknownVariables finds those that look like an option's and are none, with what was meant", () => {
  const known = ["LB_CSI_LOG_LEVEL", "LB_CSI_CTRL_LOSS_TMO", "CSI_ENDPOINT"];
  const names = ["PATH", "LB_CSI_LOG_LEVEL", "LB_CSI_LOG_LEVLE", "LB_CSI_CTRL_LOSS_TIMEOUT", "LB_CSI_RWX", "CSI_OTHER"];

  deepStrictEqual(unknownVariables(names, known), [
    { name: "LB_CSI_CTRL_LOSS_TIMEOUT", suggestion: ', did you mean "LB_CSI_CTRL_LOSS_TMO"?' },
    { name: "LB_CSI_LOG_LEVLE", suggestion: ', did you mean "LB_CSI_LOG_LEVEL"?' },
    { name: "LB_CSI_RWX", suggestion: "" },
  ]);
});

Deno.test("describeOptions shows a bare word as it is written", () => {
  match(describeOptions(withWords), /^ {2}VOLUME_ID +which volume$/m);
});

Deno.test("describeOptions shows each flag with its default and its variable", () => {
  const text = describeOptions(options);

  match(text, /-e, --endpoint URL +socket \(default: unix:\/\/\/run\/csi\.sock; env: CSI_ENDPOINT\)/);
  match(text, /--quick +a switch/);
});

for (const text of ["unix://relative.sock", "unix:/one.sock", "/plain", "unix:////double", "http://x", ""]) {
  Deno.test(`unixEndpoint refuses "${text}"`, () => strictEqual(unixEndpoint.safeParse(text).success, false));
}

Deno.test("absolutePath refuses a relative path", () => {
  strictEqual(absolutePath.safeParse("etc/x").success, false);
  strictEqual(absolutePath.safeParse("/etc/x").success, true);
});

/** zod schemas for values that are given on the command line or in the environment. */
import * as z from "zod";
import type { Option } from "./options.ts";

/**
 * The values that an option is limited to, in the order of its schema; none when it takes other texts too. Aliases and
 * defaults around the schema do not hide them.
 */
export function choicesOf({ schema }: Option): readonly string[] {
  return enumIn(schema)?.options.map(String) ?? [];
}

function enumIn(schema: z.core.$ZodType): z.ZodEnum | undefined {
  if (schema instanceof z.ZodEnum) return schema;
  if (schema instanceof z.ZodOptional || schema instanceof z.ZodDefault) return enumIn(schema.def.innerType);
  if (schema instanceof z.ZodPipe) return enumIn(schema.def.out) ?? enumIn(schema.def.in);
  return undefined;
}

/** A switch: off unless its flag is given or its variable is `true`. */
export const switchSchema = z.enum(["true", "false"], { error: "is not true or false" }).default("false")
  .transform((text) => text === "true");

/** A whole number from `least` to `most`. */
export function wholeNumber(least: number, most: number): z.ZodType<number, string> {
  const problem = `is not a whole number from ${least} to ${most}`;
  return z.string().regex(/^\d{1,15}$/, problem).transform(Number)
    .refine((number) => number >= least && number <= most, problem);
}

/** An absolute path. */
export const absolutePath = z.string().startsWith("/", "is not an absolute path");

/** `192.0.2.1:9810`, `[::]:9810`; port 0 means any free port. */
export const listenAddress = z.string().transform((text, check) => {
  // The port follows the last colon, so an IPv6 address needs no brackets.
  const [, host = "", port = ""] = /^(.+):(\d{1,5})$/.exec(text) ?? [];
  const hostname = host.replace(/^\[(.*)\]$/, "$1");
  if (/^[0-9A-Za-z.:%_-]+$/.test(hostname) && Number(port) <= 65535) return { hostname, port: Number(port) };
  check.addIssue("is not HOST:PORT");
  return z.NEVER;
});

/** A CSI endpoint, `unix:///path`. The value is the path. */
export const unixEndpoint = z.string().regex(/^unix:\/\/\/[^/]/, "is not of the form unix:///path/to/csi.sock")
  .transform((url) => url.slice("unix://".length));

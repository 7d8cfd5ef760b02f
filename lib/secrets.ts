/** The secrets of a call, kept so that they never reach a log, a message or JSON. */
import type * as z from "zod";
import { StatusError } from "./error.ts";
import { isTakenAsItIs, secretKeyProblem } from "./secret_keys.ts";

/** What prints as `mark` wherever it ends up: JSON, template strings, `console.log`, an inspected error. */
export abstract class Unprintable {
  readonly #mark: string;

  constructor(mark: string) {
    this.#mark = mark;
  }

  toJSON(): string {
    return this.#mark;
  }

  toString(): string {
    return this.#mark;
  }

  [Symbol.for("nodejs.util.inspect.custom")](): string {
    return this.#mark;
  }

  [Symbol.for("Deno.customInspect")](): string {
    return this.#mark;
  }
}

/** The secrets of one call. They can be read through a schema only, and print as `[secrets]`. */
export class Secrets extends Unprintable {
  readonly #values: Readonly<Record<string, string>>;

  constructor(values: Readonly<Record<string, string>> = {}) {
    super("[secrets]");
    // A value that was made with `echo` ends in a newline, which nobody sees.
    this.#values = Object.fromEntries(
      Object.entries(values).map(([key, value]) => [key, isTakenAsItIs(key) ? value : value.replace(/[\r\n]+$/, "")]),
    );
  }

  /**
   * The values that `schema` picks; throws INVALID_ARGUMENT that names the bad keys and never a value. Bad are also keys
   * that look like those of this driver and are none.
   */
  parse<T>(schema: z.ZodType<T>): T {
    const unknown = Object.keys(this.#values).flatMap((key) => {
      const problem = secretKeyProblem(key);
      return problem === undefined ? [] : [`${key}: ${problem}`];
    });
    const result = schema.safeParse(this.#values);
    if (result.success && unknown.length === 0) return result.data;
    const bad = result.error?.issues.map((issue) => `${issue.path.join(".") || "secrets"}: ${issue.message}`) ?? [];
    const problems = [...unknown, ...bad];
    throw new StatusError("INVALID_ARGUMENT", `Cannot use the secrets of this call: ${problems.join("; ")}`);
  }
}

/** Looks for a check by its name. */
import { ok } from "node:assert/strict";
import type { Check } from "../../lib/check.ts";

export function checkNamed(checks: readonly Check[], name: string): Check {
  const check = checks.find((check) => check.name === name);
  ok(check, `${name} is not among ${checks.map(({ name }) => name).join(", ")}`);
  return check;
}

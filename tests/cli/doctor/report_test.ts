import { deepStrictEqual, strictEqual } from "node:assert/strict";
import { doctorAsJson, doctorAsText } from "../../../lib/cli/doctor/report.ts";

const sections = [{
  of: "machine",
  checks: [
    { name: "one", verdict: "ok", found: "well" },
    { name: "another", verdict: "problem", found: "bad\n  ok  three  \u001b[31m", advice: "mend it" },
  ],
}] as const;

Deno.test("doctorAsText has one line for each check, and lets no text from elsewhere control the terminal", () => {
  strictEqual(
    doctorAsText(sections),
    `machine
  ok       one      well
  PROBLEM  another  bad ok three \\u001b[31m
                    -> mend it

1 problem, 0 warnings, 1 ok, 0 not checked`,
  );
});

Deno.test("doctorAsJson has each check with what it is of", () => {
  deepStrictEqual(JSON.parse(doctorAsJson(sections)), {
    problems: 1,
    warnings: 0,
    checks: [
      { of: "machine", check: "one", result: "ok", found: "well" },
      { of: "machine", check: "another", result: "problem", found: sections[0].checks[1].found, advice: "mend it" },
    ],
  });
});

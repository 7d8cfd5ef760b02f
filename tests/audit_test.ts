/** The comparison of locked npm packages with known advisories. */
import { deepStrictEqual, match, strictEqual, throws } from "node:assert/strict";
import { type Advisory, audit } from "../.ci/audit.ts";

const now = new Date("2026-11-30T12:00:00Z");
const advisory: Advisory = {
  id: "CVE-1",
  package: "@a/b",
  affected: [["1.2.0", "1.2.10"], ["2.0.0", "2.0.1"], ["3.0.0"]],
  summary: "it is bad",
};
const problemsOf = (key: string) => audit([key], { reviewed: "2026-11-30", advisories: [advisory] }, now).problems;

for (
  const [key, isBad] of [
    ["@a/b@1.1.99", false],
    ["@a/b@1.2.0", true],
    ["@a/b@1.2.9", true],
    ["@a/b@1.2.9_@c+d@1.0.0", true],
    ["@a/b@1.2.10", false],
    ["@a/b@2.0.0-rc.1", true],
    ["@a/b@2.0.1", false],
    ["@a/b@40.0.0", true],
    ["@a/bc@1.2.0", false],
    ["b@1.2.0", false],
  ] as const
) {
  Deno.test(`audit ${isBad ? "finds" : "passes"} ${key}`, () => {
    const version = /^@?[^@]+@([^_]+)/.exec(key)?.[1];

    deepStrictEqual(
      problemsOf(key),
      isBad ? [`@a/b ${version}: CVE-1, it is bad; lock a version that is not affected`] : [],
    );
  });
}

Deno.test("audit warns of an accepted advisory and of an old review, and fails for neither", () => {
  const known = { reviewed: "2026-08-01", advisories: [{ ...advisory, accepted: "it is not used" }] };

  const { problems, warnings } = audit(["@a/b@1.2.0"], known, now);

  deepStrictEqual(problems, []);
  strictEqual(warnings[0], "@a/b 1.2.0: CVE-1, it is bad; accepted: it is not used");
  match(warnings[1] ?? "", /^the advisories of all packages were last looked through: 2026-08-01; /);
});

Deno.test("audit refuses a lock file with a package that it cannot read, and does not pass over it", () => {
  throws(() => problemsOf("@a/b@latest"), /deno\.lock: "@a\/b@latest" is not a package with a version/);
});

Deno.test("no locked package has a known advisory that is not accepted", async () => {
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["run", "--allow-read", "--no-check", new URL("../.ci/audit.ts", import.meta.url).pathname],
  }).output();

  strictEqual(code, 0, new TextDecoder().decode(stderr));
  match(new TextDecoder().decode(stdout), /^\d+ packages, \d+ advisories \(looked through: [-\w]+\): 0 problems\n$/);
});

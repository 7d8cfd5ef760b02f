/**
 * Compares the npm packages of deno.lock with the advisories of advisories.json. It works offline, and knows only that file.
 *
 * Ends with status 1 when a locked version has an advisory that is not accepted there with a reason. A file that was not
 * reviewed for a long time causes a warning only, because a build of an old commit must not fail by its date.
 */

/** A known weakness of some versions of a package. */
export interface Advisory {
  /** `GHSA-…` or `CVE-…`. */
  readonly id: string;
  readonly package: string;
  /** Half-open ranges: the first bad version, and the first good one after it; undefined: there is none yet. */
  readonly affected: readonly (readonly [from: string, before?: string])[];
  readonly summary: string;
  /** Why it does no harm here, when it is known and left. */
  readonly accepted?: string;
}

export interface Advisories {
  /** When the advisories of all locked packages were last looked through, `2026-11-30`; `never`. */
  readonly reviewed: string;
  readonly advisories: readonly Advisory[];
}

export interface AuditReport {
  /** What must not stay. */
  readonly problems: readonly string[];
  readonly warnings: readonly string[];
}

const dayMs = 24 * 3600 * 1000;
/** How old the review may be without a warning. */
const reviewDays = 90;

/** @param locked the keys of `npm` in a deno.lock: `name@version`, `name@version_peer@version` */
export function audit(locked: readonly string[], { reviewed, advisories }: Advisories, now: Date): AuditReport {
  const problems: string[] = [];
  const warnings: string[] = [];
  for (const key of locked) {
    const [, name = "", version = ""] = /^(@?[^@]+)@([^_]+)/.exec(key) ?? [];
    if (!/^\d+\.\d+\.\d+/.test(version)) throw new Error(`deno.lock: "${key}" is not a package with a version`);
    for (const advisory of advisories) {
      if (advisory.package !== name || !isAffected(version, advisory)) continue;
      const words = `${name} ${version}: ${advisory.id}, ${advisory.summary}`;
      if (advisory.accepted === undefined) problems.push(`${words}; lock a version that is not affected`);
      else warnings.push(`${words}; accepted: ${advisory.accepted}`);
    }
  }
  const days = Math.floor((now.getTime() - Date.parse(reviewed)) / dayMs);
  if (!(days <= reviewDays)) {
    warnings.push(
      `the advisories of all packages were last looked through: ${reviewed}; docs/developing.md says how to do it again`,
    );
  }
  return { problems, warnings };
}

function isAffected(version: string, { affected }: Advisory): boolean {
  return affected.some(([from, before]) =>
    compare(version, from) >= 0 && (before === undefined || compare(version, before) < 0)
  );
}

/** Compares by the three numbers; a pre-release counts as its release. */
function compare(one: string, other: string): number {
  const numbers = (version: string) => version.split(/[-+]/, 1)[0]?.split(".").map(Number) ?? [];
  const [first, second] = [numbers(one), numbers(other)];
  for (let at = 0; at < 3; at++) {
    const difference = (first[at] ?? 0) - (second[at] ?? 0);
    if (difference !== 0) return difference;
  }
  return 0;
}

if (import.meta.main) {
  const read = (path: string) => JSON.parse(Deno.readTextFileSync(new URL(path, import.meta.url)));
  const locked = Object.keys(read("../deno.lock").npm);
  const known: Advisories = read("advisories.json");
  const { problems, warnings } = audit(locked, known, new Date());
  for (const warning of warnings) console.error(`warning: ${warning}`);
  for (const problem of problems) console.error(`problem: ${problem}`);
  console.log(
    `${locked.length} packages, ${known.advisories.length} advisories (looked through: ${known.reviewed}): ${problems.length} problems`,
  );
  if (problems.length > 0) Deno.exit(1);
}

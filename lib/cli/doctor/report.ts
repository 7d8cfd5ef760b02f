/**
 * `lbcsi doctor`: what is wrong with this machine, and with the storage that it is to use, before the first pod finds out.
 *
 * It only looks. Nothing on the machine or the cluster is changed, no subsystem is connected, no volume is touched, and a
 * thing that does not answer costs a bounded time and makes its own check fail, and no other.
 */
import type { Verdict } from "../../check.ts";
import { columns } from "../table.ts";
import type { Section } from "./checks.ts";

// ------------------------------------------------------------------------------------------------------------ showing

/** How many checks came to what. */
export function countVerdicts(sections: readonly Section[]): Readonly<Record<Verdict, number>> {
  const counts = { "problem": 0, "warning": 0, "ok": 0, "not checked": 0 };
  for (const { verdict } of sections.flatMap(({ checks }) => checks)) counts[verdict]++;
  return counts;
}

/** For programs; ends without a newline. */
export function doctorAsJson(sections: readonly Section[]): string {
  const { problem, warning } = countVerdicts(sections);
  const checks = sections.flatMap(({ of, checks }) =>
    checks.map(({ name, verdict, found, advice }) => ({ of, check: name, result: verdict, found, advice }))
  );
  return JSON.stringify({ problems: problem, warnings: warning, checks }, undefined, 2);
}

/** For people; ends without a newline. */
export function doctorAsText(sections: readonly Section[]): string {
  const all = sections.flatMap(({ checks }) => checks);
  const heads = columns(all.map(({ name, verdict }) => [verdict === "problem" ? "PROBLEM" : verdict, name]));
  const width = Math.max(0, ...heads.map((head) => head.length));
  const lines: string[] = [];
  for (const { of, checks } of sections) {
    lines.push(...lines.length === 0 ? [] : [""], oneLine(of));
    for (const { found, advice } of checks) {
      lines.push(`  ${(heads.shift() ?? "").padEnd(width)}  ${oneLine(found)}`);
      if (advice !== undefined) lines.push(`  ${" ".repeat(width)}  -> ${oneLine(advice)}`);
    }
  }
  const counts = countVerdicts(sections);
  const text = (["problem", "warning", "ok", "not checked"] as const).map((verdict) => {
    const number = counts[verdict];
    return `${number} ${verdict}${number !== 1 && /m$|g$/.test(verdict) ? "s" : ""}`;
  });
  return [...lines, "", text.join(", ")].join("\n");
}

/** Words of clusters and tools must not steer the terminal, nor look like other lines. */
function oneLine(text: string): string {
  return text.replace(/\s+/g, " ").replace(/[^\x20-\x7e]/g, (c) => JSON.stringify(c).slice(1, -1))
    .replace(/[\x7f-\x9f]/g, "?");
}

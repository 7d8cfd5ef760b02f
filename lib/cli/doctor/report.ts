/** The result of `lbcsi doctor`, as text and as JSON. */
import type { Verdict } from "../../check.ts";
import { columns } from "../table.ts";
import type { Section } from "./checks.ts";

/** The number of checks with each verdict. */
export function countVerdicts(sections: readonly Section[]): Readonly<Record<Verdict, number>> {
  const counts = { "problem": 0, "warning": 0, "ok": 0, "not checked": 0 };
  for (const { verdict } of sections.flatMap(({ checks }) => checks)) counts[verdict]++;
  return counts;
}

/** The result for programs, as JSON; ends without a newline. */
export function doctorAsJson(sections: readonly Section[]): string {
  const { problem, warning } = countVerdicts(sections);
  const checks = sections.flatMap(({ of, checks }) =>
    checks.map(({ name, verdict, found, advice }) => ({ of, check: name, result: verdict, found, advice }))
  );
  return JSON.stringify({ problems: problem, warnings: warning, checks }, undefined, 2);
}

/** The result for people; ends without a newline. */
export function doctorAsText(sections: readonly Section[]): string {
  const all = sections.flatMap(({ checks }) => checks);
  const starts = columns(all.map(({ name, verdict }) => [verdict === "problem" ? "PROBLEM" : verdict, name]));
  const width = Math.max(0, ...starts.map((start) => start.length));
  const lines: string[] = [];
  for (const { of, checks } of sections) {
    lines.push(...lines.length === 0 ? [] : [""], formatLine(of));
    for (const { found, advice } of checks) {
      lines.push(`  ${(starts.shift() ?? "").padEnd(width)}  ${formatLine(found)}`);
      if (advice !== undefined) lines.push(`  ${" ".repeat(width)}  -> ${formatLine(advice)}`);
    }
  }
  const counts = countVerdicts(sections);
  const text = (["problem", "warning", "ok", "not checked"] as const).map((verdict) => {
    const number = counts[verdict];
    return `${number} ${verdict}${number !== 1 && /m$|g$/.test(verdict) ? "s" : ""}`;
  });
  return [...lines, "", text.join(", ")].join("\n");
}

/** Texts of clusters and tools must not control the terminal, nor look like other lines. */
function formatLine(text: string): string {
  return text.replace(/\s+/g, " ").replace(/[^\x20-\x7e]/g, (c) => JSON.stringify(c).slice(1, -1))
    .replace(/[\x7f-\x9f]/g, "?");
}

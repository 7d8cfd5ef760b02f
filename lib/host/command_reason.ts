/** Extracts from the output of a command why it failed. */
import { basename } from "node:path";
import type { CommandResult } from "./host.ts";

const longest = 400;

/**
 * The reason in one line for an error message, from both streams, without the usage text that tools print after it (mkfs.xfs,
 * e2fsprogs, btrfs-progs) or before it (cryptsetup). A long text keeps its beginning and its end, where reasons are.
 *
 * @param program its name or path, which some tools put before the reason
 */
export function reasonOf(program: string, { stdout, stderr }: CommandResult): string {
  const reasons = [stderr, stdout].map((stream) => withoutUsage(basename(program), stream)).filter((text) =>
    text !== ""
  );
  const whole = [stderr, stdout].map(oneLine).filter((text) => text !== "");
  const text = (reasons.length === 0 ? whole : reasons).join("; ");
  if (text === "") return "it says nothing";
  if (text.length <= longest) return text;
  return `${text.slice(0, longest / 2)} … ${text.slice(-longest / 2)}`;
}

function withoutUsage(program: string, stream: string): string {
  const lines = stream.split("\n");
  const usage = lines.findIndex((line) => /^\s*usage:/i.test(line));
  if (usage < 0) return oneLine(stream);
  // "cryptsetup: …", or "--option: …".
  const after = lines.slice(usage + 1).filter((line) =>
    /^--?[\w-]+: /.test(line) || /^(?:\S*\/)?([\w.-]+): /.exec(line)?.[1] === program
  );
  return oneLine([...lines.slice(0, usage), ...after].join("\n"));
}

function oneLine(text: string): string {
  return text.trim().replace(/\s+/g, " ");
}

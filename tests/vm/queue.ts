/**
 * Checks that guests share out among themselves, in a directory that all of them see: `open/` has a file for each check
 * that no guest has begun, `taken/` for each of the others. The guest that renames a file has the check.
 */
import { join } from "node:path";

export interface Item {
  /** Checks with the same start have the same. */
  readonly group: number;
  /** The bundle of the scenario, below the folder of inside.js. */
  readonly file: string;
  /** Of the check. */
  readonly name: string;
}

/** Lays a queue out in a new directory; its order is that of `items`. */
export async function lay(directory: string, items: readonly Item[]): Promise<void> {
  await Deno.mkdir(join(directory, "open"), { recursive: true });
  await Deno.mkdir(join(directory, "taken"));
  for (const [at, item] of items.entries()) {
    const name = `${String(at).padStart(4, "0")}.${item.group}`;
    await Deno.writeTextFile(join(directory, "open", name), JSON.stringify(item));
  }
}

/** The checks that no guest has begun. */
export async function remaining(directory: string): Promise<readonly Item[]> {
  const names = list(join(directory, "open"));
  return await Promise.all(
    names.map(async (name) => JSON.parse(await Deno.readTextFile(join(directory, "open", name)))),
  );
}

/**
 * The next check for a guest whose processes were started for `group`: one of the same group, or else of a group that no
 * guest has begun, because starting the processes takes as long as some checks do.
 */
export function take(directory: string, group: number | undefined): Item | undefined {
  for (;;) {
    const open = list(join(directory, "open"));
    const begun = new Set(list(join(directory, "taken")).map(groupOf));
    const name = open.find((name) => groupOf(name) === group) ?? open.find((name) => !begun.has(groupOf(name))) ??
      open[0];
    if (name === undefined) return undefined;
    const mine = join(directory, "taken", name);
    try {
      Deno.renameSync(join(directory, "open", name), mine);
    } catch (error) {
      // Another guest was faster.
      if (error instanceof Deno.errors.NotFound) continue;
      throw error;
    }
    return JSON.parse(Deno.readTextFileSync(mine));
  }
}

function list(directory: string): readonly string[] {
  return [...Deno.readDirSync(directory)].map(({ name }) => name).sort();
}

function groupOf(name: string): number {
  return Number(name.split(".")[1]);
}

/**
 * The guest as a scenario sees it: commands, the program's processes, files of the kernel. Nothing of it runs on the host.
 */
import { join } from "node:path";

/** What starts the program: the bundle of main.ts that the host has made, as it is shipped but for its spelling. */
export const program: readonly string[] = [Deno.execPath(), "run", "-A", "--no-code-cache", "/program/main.js"];

export interface Finished {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** Runs a command to its end; a non-zero exit is an answer. */
export async function run(command: string, ...args: readonly string[]): Promise<Finished> {
  const { code, stdout, stderr } = await new Deno.Command(command, { args: [...args], env: { LC_ALL: "C" } }).output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes).trim();
  return { code, stdout: text(stdout), stderr: text(stderr) };
}

/** What a command prints; throws with its words when it fails. */
export async function tool(command: string, ...args: readonly string[]): Promise<string> {
  const { code, stdout, stderr } = await run(command, ...args);
  if (code === 0) return stdout;
  throw new Error(`${[command, ...args].join(" ")}: exit ${code}\n${stderr}\n${stdout}`.trimEnd());
}

/** Resolves as soon as `look` gives something; rejects after `seconds`. */
export async function until<T>(
  what: string,
  look: () => T | undefined | false | Promise<T | undefined | false>,
  seconds = 15,
): Promise<T> {
  const giveUpAt = performance.now() + seconds * 1000;
  for (;;) {
    const found = await look();
    if (found !== undefined && found !== false) return found;
    if (performance.now() > giveUpAt) throw new Error(`not within ${seconds} s: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

/** The text of a file without blanks at its ends; undefined when it is not there. */
export function read(path: string): string | undefined {
  try {
    return Deno.readTextFileSync(path).trim();
  } catch {
    return undefined;
  }
}

/** Loads what the initiator, the target and file systems need, so that no check pays for it. */
export async function modulesLoaded(): Promise<void> {
  await tool("modprobe", "-a", "nvme-tcp", "nvmet", "nvmet-tcp", "loop", "ext4", "xfs", "btrfs", "dm-flakey");
}

/** What the checks of one boot share. */
export class World {
  /** A directory in memory; sockets belong here. */
  readonly home = Deno.makeTempDirSync({ dir: "/tmp", prefix: "world-" });
  readonly #measured: (name: string, text: string) => void;

  constructor(measured: (name: string, text: string) => void) {
    this.#measured = measured;
  }

  /** Prints a figure. */
  measured(name: string, text: string): void {
    this.#measured(name, text);
  }

  /** What helps to understand a failure: the ends of the logs. */
  evidence(): Promise<string> {
    const parts: string[] = [];
    for (const { name } of Deno.readDirSync(this.home)) {
      if (!name.endsWith(".log")) continue;
      const lines = (read(join(this.home, name)) ?? "").split("\n").slice(-15);
      parts.push(`--- ${name}\n${lines.join("\n")}`);
    }
    return Promise.resolve(parts.join("\n"));
  }
}

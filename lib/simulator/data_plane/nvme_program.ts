/**
 * The simulated machine's `nvme`: a program of that name in a directory of the simulator, to be first on the PATH of who
 * shall connect there. It hands its words to the simulator in a file and waits for what the simulator says.
 */
import { basename, join } from "node:path";
import type { Logger } from "../../context.ts";
import { messageOf } from "../../error.ts";

/** How a command ended: exit status and what goes to stderr. */
export interface ProgramEnd {
  readonly status: number;
  readonly words: string;
}

/**
 * Makes the program in `directory`, and runs its commands one after the other by `run` until it is disposed.
 *
 * @param run is given the words behind the program's name
 */
export async function serveNvmeProgram(
  directory: string,
  log: Logger,
  run: (words: readonly string[]) => Promise<ProgramEnd>,
): Promise<AsyncDisposable> {
  const requests = join(directory, "requests");
  await Deno.mkdir(requests, { recursive: true, mode: 0o700 });
  const answer = async (path: string) => {
    const words = (await Deno.readTextFile(path)).split("\n").slice(0, -1);
    let end: ProgramEnd;
    try {
      end = await run(words);
    } catch (error) {
      log.error("nvme failed", { command: words.join(" "), error: messageOf(error) });
      end = { status: 1, words: messageOf(error) };
    }
    const file = path.replace(/\.request$/, "");
    await Deno.remove(path);
    await Deno.writeTextFile(`${file}.new`, `${end.status}\n${end.words}${end.words === "" ? "" : "\n"}`);
    await Deno.rename(`${file}.new`, `${file}.answer`);
  };
  const seen = new Set<string>();
  const look = async () => {
    for await (const { name } of Deno.readDir(requests)) {
      if (!name.endsWith(".request") || seen.has(name)) continue;
      seen.add(name);
      await answer(join(requests, name)).catch((error) => {
        // Who asked is gone, and took its request along.
        if (!(error instanceof Deno.errors.NotFound)) log.error("nvme was not answered", { error: messageOf(error) });
      });
    }
  };
  const watcher = Deno.watchFs(requests, { recursive: false });
  await Deno.writeTextFile(join(directory, "nvme~"), programText(requests), { mode: 0o755 });
  await Deno.rename(join(directory, "nvme~"), join(directory, "nvme"));
  const watching = (async () => {
    for await (const { paths } of watcher) {
      if (paths.some((path) => basename(path).endsWith(".request"))) await look();
    }
  })();
  return {
    async [Symbol.asyncDispose]() {
      watcher.close();
      await watching;
    },
  };
}

/** Waits for half a minute; a simulator that is gone does not answer. */
function programText(requests: string): string {
  return `#!/bin/sh
request='${requests.replaceAll("'", `'\\''`)}'/$$.$(cat /proc/sys/kernel/random/uuid)
for word; do printf '%s\\n' "$word"; done > "$request.new" && mv "$request.new" "$request.request" || exit 1
tries=0
while [ ! -e "$request.answer" ]; do
  tries=$((tries + 1))
  if [ $tries -gt 1500 ]; then
    rm -f "$request.request"
    echo "the simulator does not answer" >&2
    exit 1
  fi
  sleep 0.02
done
{ read -r status; cat >&2; } < "$request.answer"
rm -f "$request.answer"
exit "$status"
`;
}

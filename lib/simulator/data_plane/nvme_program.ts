/**
 * The simulated machine's `nvme`: a program of that name in a directory of the simulator, which must come first on the PATH of
 * a node that connects there. It passes its arguments to the simulator in a file and waits for the result.
 */
import { basename, join } from "node:path";
import { messageOf } from "../../error.ts";
import type { Logger } from "../../log.ts";

/** How a command ended. */
export interface CommandResult {
  readonly status: number;
  /** Text for stderr. */
  readonly message: string;
}

/**
 * Makes the program in `directory`, and runs its commands with `run`, one after the other, until it is disposed.
 *
 * @param run receives the arguments of the program
 */
export async function serveNvmeProgram(
  directory: string,
  log: Logger,
  run: (args: readonly string[]) => Promise<CommandResult>,
): Promise<AsyncDisposable> {
  const requests = join(directory, "requests");
  await Deno.mkdir(requests, { recursive: true, mode: 0o700 });
  const answer = async (path: string) => {
    const args = (await Deno.readTextFile(path)).split("\n").slice(0, -1);
    let result: CommandResult;
    try {
      result = await run(args);
    } catch (error) {
      log.error("nvme failed", { command: args.join(" "), error: messageOf(error) });
      result = { status: 1, message: messageOf(error) };
    }
    const file = path.replace(/\.request$/, "");
    await Deno.remove(path);
    await Deno.writeTextFile(`${file}.new`, `${result.status}\n${result.message}${result.message === "" ? "" : "\n"}`);
    await Deno.rename(`${file}.new`, `${file}.answer`);
  };
  const seen = new Set<string>();
  const answerNew = async () => {
    for await (const { name } of Deno.readDir(requests)) {
      if (!name.endsWith(".request") || seen.has(name)) continue;
      seen.add(name);
      await answer(join(requests, name)).catch((error) => {
        // The program has ended and removed its request.
        if (!(error instanceof Deno.errors.NotFound)) log.error("nvme was not answered", { error: messageOf(error) });
      });
    }
  };
  const watcher = Deno.watchFs(requests, { recursive: false });
  await Deno.writeTextFile(join(directory, "nvme~"), programText(requests), { mode: 0o755 });
  await Deno.rename(join(directory, "nvme~"), join(directory, "nvme"));
  const watching = (async () => {
    for await (const { paths } of watcher) {
      if (paths.some((path) => basename(path).endsWith(".request"))) await answerNew();
    }
  })();
  return {
    async [Symbol.asyncDispose]() {
      watcher.close();
      await watching;
    },
  };
}

/** The program waits half a minute, because a simulator that has ended does not answer. */
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

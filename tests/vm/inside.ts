/**
 * Runs in the guest, as a bundle: the checks of one boot of some scenarios that start in the same way, one after the other.
 *
 *   deno run -A inside.js FILES BOOT NAMES      JSON list of files, number of the boot, JSON list of the checks to run
 */
import { modulesLoaded, read, World } from "./world.ts";
import { type Check, type Report, reportMark, type Scenario } from "./scenario.ts";

const [filesText = "[]", bootText = "0", namesText = "[]"] = Deno.args;
const files: readonly string[] = JSON.parse(filesText);
const scenarios: readonly Scenario[] = await Promise.all(files.map(async (file) => {
  const { scenario }: { scenario: Scenario } = await import(new URL(`./${file}`, import.meta.url).href);
  return scenario;
}));
const start = scenarios[0]?.start;
const names = new Set<string>(JSON.parse(namesText));
const wanted = scenarios.flatMap(({ boots }) => boots[Number(bootText)] ?? []).filter(({ name }) => names.has(name));

// One line is one write, so that output of others does not get between.
const report = (report: Report) => console.log(reportMark + JSON.stringify(report));

async function run({ name, limitSeconds = 300, run }: Check, world: World): Promise<boolean> {
  report({ event: "begins", name });
  const limit = new AbortController();
  const started = performance.now();
  const late = new Promise<never>((_resolve, reject) => {
    limit.signal.addEventListener("abort", () => reject(limit.signal.reason), { once: true });
  });
  const timer = setTimeout(
    () => limit.abort(new Error(`it did not end within ${limitSeconds} s`)),
    limitSeconds * 1000,
  );
  const ms = () => Math.round(performance.now() - started);
  try {
    // What hangs in the kernel does not hear of the signal.
    await Promise.race([run(world, limit.signal), late]);
    report({ event: "passed", name, ms: ms() });
    return true;
  } catch (error) {
    const problem = error instanceof Error ? error.stack ?? error.message : String(error);
    report({ event: "failed", name, ms: ms(), problem: `${problem}\n${await world.evidence()}` });
    return false;
  } finally {
    clearTimeout(timer);
  }
}

const uptime = () => read("/proc/uptime")?.split(" ")[0];
const began = uptime();
await modulesLoaded();
const world = new World((name, text) => report({ event: "measured", name, text }));
if (start !== undefined) {
  try {
    await world.start(start);
  } catch (error) {
    console.log(await world.evidence());
    console.log(error instanceof Error ? error.stack : error);
    Deno.exit(3);
  }
  report({
    event: "measured",
    name: "ready",
    text: `${uptime()} s after the kernel's start; this program ran after ${began} s`,
  });
}
let failed = false;
for (const check of wanted) {
  if (await run(check, world)) continue;
  failed = true;
  if (start !== undefined) await world.cleanUp();
}
// Without waiting for whatever hangs.
Deno.exit(failed ? 1 : 0);

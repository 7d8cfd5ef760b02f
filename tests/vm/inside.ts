/**
 * Runs in the guest, as a bundle: checks from a queue that guests share, until nothing is left in it.
 *
 *   deno run -A inside.js QUEUE BOOT       a directory of the host's, see queue.ts; number of the boot
 *   deno run -A inside.js --load FILE ...  only loads these bundles of scenarios, which fills Deno's cache
 */
import { take } from "./queue.ts";
import { GuestTestbed, modulesLoaded, read } from "./testbed.ts";
import { type Check, type Report, reportMark, type Scenario } from "./scenario.ts";

async function scenarioOf(file: string): Promise<Scenario> {
  const { scenario }: { scenario: Scenario } = await import(new URL(`./${file}`, import.meta.url).href);
  return scenario;
}

// One line is one write, so that output of others does not get between.
const report = (report: Report) => console.log(reportMark + JSON.stringify(report));
const uptime = () => read("/proc/uptime")?.split(" ")[0];

async function run({ name, limitSeconds = 300, run }: Check, testbed: GuestTestbed): Promise<boolean> {
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
    await Promise.race([run(testbed, limit.signal), late]);
    report({ event: "passed", name, ms: ms() });
    return true;
  } catch (error) {
    const problem = error instanceof Error ? error.stack ?? error.message : String(error);
    report({ event: "failed", name, ms: ms(), problem: `${problem}\n${await testbed.evidence()}` });
    return false;
  } finally {
    clearTimeout(timer);
  }
}

/** Starts what the scenario needs, unless it runs already; exits when that fails. */
async function prepare(testbed: GuestTestbed, { start }: Scenario, name: string): Promise<void> {
  if (start === undefined ? testbed.isIdle : testbed.isStarted(start)) return;
  const began = performance.now();
  try {
    if (start === undefined) await testbed.stop();
    else await testbed.start(start);
  } catch (error) {
    const problem = error instanceof Error ? error.stack ?? error.message : String(error);
    const ms = Math.round(performance.now() - began);
    report({ event: "failed", name, ms, problem: `${problem}\n${await testbed.evidence()}` });
    Deno.exit(3);
  }
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  report({ event: "measured", name: start === undefined ? "stopped in" : "started in", text: `${seconds} s` });
}

async function runQueue(queue: string, boot: number): Promise<boolean> {
  const testbed = new GuestTestbed((name, text) => report({ event: "measured", name, text }));
  report({ event: "measured", name: "booted", text: `${uptime()} s after the kernel's start` });
  await modulesLoaded();
  let failed = false;
  for (let item = take(queue, undefined); item !== undefined; item = take(queue, item.group)) {
    const { file, name } = item;
    report({ event: "begins", name });
    const scenario = await scenarioOf(file);
    const check = scenario.boots[boot]?.find((check) => check.name === name);
    if (check === undefined) throw new Error(`${file} has no check "${name}" in boot ${boot}`);
    await prepare(testbed, scenario, name);
    if (await run(check, testbed)) continue;
    failed = true;
    if (scenario.start !== undefined) await testbed.cleanUp();
  }
  const [, idle = "0"] = read("/proc/uptime")?.split(" ") ?? [];
  report({
    event: "measured",
    name: "ends",
    text: `${uptime()} s after the kernel's start, of which it was idle for ${idle} s`,
  });
  return !failed;
}

const [first = "", ...rest] = Deno.args;
if (first === "--load") {
  await Promise.all(rest.map(scenarioOf));
} else {
  // Without waiting for whatever hangs.
  Deno.exit(await runQueue(first, Number(rest[0])) ? 0 : 1);
}

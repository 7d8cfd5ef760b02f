/** How the demo prints its steps, checks and summary. */
import { messageOf, StatusError } from "../error.ts";
import { CheckFailed, Interrupted } from "./interrupt.ts";
import { programOf, type RanCommand } from "./testbed.ts";

/** How a step ended. */
export type Outcome = "good" | "bad";

/** What a step changed at one place. */
interface PlaceFacts {
  /** `cluster`, `machine`, `pod`. */
  readonly place: string;
  readonly facts: readonly string[];
}

const nameWidth = 36;
const timeWidth = 8;
const placeWidth = 9;

/** Prints in aligned columns, with colours when stdout is a terminal, and counts steps and checks for the summary. */
export class Terminal {
  readonly #print: (line: string) => void;
  readonly #verbose: boolean;
  readonly #colours: boolean;
  readonly #width: number;
  readonly #isTerminal: boolean;
  readonly #started = performance.now();
  readonly #passed: string[] = [];
  #steps = 0;
  #checks = 0;
  #failed = 0;
  #commands = 0;
  #managementCalls = 0;

  constructor(print: (line: string) => void, verbose: boolean) {
    this.#print = print;
    this.#verbose = verbose;
    this.#isTerminal = Deno.stdout.isTerminal();
    this.#colours = this.#isTerminal && (Deno.env.get("NO_COLOR") ?? "") === "";
    this.#width = this.#isTerminal ? Math.max(80, Deno.consoleSize().columns) : 120;
  }

  line(text: string): void {
    this.#flush();
    this.#print(text);
  }

  title(text: string): void {
    this.#print(this.#paint("1", text));
  }

  heading(text: string): void {
    this.#flush();
    this.#print("");
    this.#print(this.#paint("1", text));
  }

  note(text: string): void {
    this.#flush();
    this.#print(`  ${this.#paint("3", text)}`);
  }

  fact(name: string, text: string, ms?: number): void {
    this.#flush();
    const time = ms === undefined ? "" : formatTime(ms);
    this.#print(`  ${name.padEnd(nameWidth)}${time.padStart(timeWidth)}  ${this.#dim(text)}`);
  }

  step(outcome: Outcome, name: string, ms: number, places: readonly PlaceFacts[]): void {
    this.#flush();
    this.#steps++;
    if (outcome === "bad") this.#failed++;
    const filled = places.filter(({ facts }) => facts.length > 0);
    let head = `${this.#mark(outcome)} ${name.padEnd(nameWidth)}${formatTime(ms).padStart(timeWidth)}`;
    if (filled.length === 0) this.#print(head);
    for (const { place, facts } of filled) {
      this.#facts(head, place, facts);
      head = " ".repeat(2 + nameWidth + timeWidth);
    }
  }

  detail(place: string, facts: readonly string[]): void {
    this.#facts(" ".repeat(2 + nameWidth + timeWidth), place, facts);
  }

  /** Counts a check. Checks that pass are printed together, below their step. */
  check(what: string, passed: boolean, found = "", routine = false): void {
    this.#checks++;
    if (passed) {
      if (!routine || this.#verbose) this.#passed.push(what);
      return;
    }
    this.#failed++;
    this.#flush();
    this.#print(`    ${this.#mark("bad")} ${found === "" ? what : `${what}: found ${found}`}`);
  }

  #flush(): void {
    const passed = this.#passed.splice(0);
    if (passed.length > 0) this.#facts(" ".repeat(2 + nameWidth + timeWidth), "checked", passed, "32");
  }

  cleaned(done: boolean, what: string): void {
    this.#flush();
    this.#print(`  ${this.#mark(done ? "good" : "bad")} ${done ? "clean-up" : "left over"}: ${what}`);
  }

  excerpt(title: string, lines: readonly string[]): void {
    this.#flush();
    this.#print(`  ${title}:`);
    for (const line of lines) this.#print(`    ${this.#dim(line)}`);
  }

  /** Prints why the demo ends early, unless a failed check has printed it already. */
  failure(error: unknown): void {
    this.#flush();
    if (error instanceof CheckFailed) return;
    if (error instanceof Interrupted) this.#print(`\n${error.message}, cleaning up`);
    else if (error instanceof StatusError) this.#print(`\n${this.red("failed")}: ${error.message}`);
    else {this.#print(
        `\n${this.red("failed")}: ${error instanceof Error ? error.stack ?? error.message : String(error)}`,
      );}
  }

  managementCalls(calls: Readonly<Record<string, number>>): readonly string[] {
    for (const count of Object.values(calls)) this.#managementCalls += count;
    const names = Object.entries(calls).map(([rpc, count]) => count === 1 ? rpc : `${rpc} ×${count}`);
    return names.length === 0 ? [] : [`called ${names.join(", ")}`];
  }

  commands(commands: readonly RanCommand[]): readonly string[] {
    this.#commands += commands.length;
    if (commands.length === 0) return [];
    if (!this.#verbose) return [`ran ${commands.map(({ command }) => programOf(command)).join(", ")}`];
    return commands.map(({ command, exit, ms }) => `ran ${command} (exit ${exit}, ${formatTime(ms)})`);
  }

  summary(failure: unknown, left: number, full: boolean): void {
    this.#flush();
    const seconds = ((performance.now() - this.#started) / 1000).toFixed(1);
    this.#print("");
    this.#print(
      `${this.#steps} steps, ${this.#checks} checks, ${this.#failed} failed; ${this.#managementCalls} management calls, ` +
        `${this.#commands} commands on the machine; ${seconds} s`,
    );
    if (failure !== undefined) {
      const rest = left === 0 ? "nothing of it is left on this machine" : `${left} things are left, see above`;
      const what = failure instanceof Interrupted
        ? `${this.red("interrupted")} by ${failure.signal}`
        : `${this.red("FAILED")}: ${messageOf(failure).split("\n", 1)[0]}`;
      this.#print(`${what}; ${rest}`);
    } else if (full) {
      this.#print(`${this.#paint("32", "passed")}: every check passed, nothing is left over`);
    } else {
      this.#print(
        `${
          this.#paint("33", "passed in part")
        }: the control plane alone; devices and file systems were not played, see ` +
          `what is missing above`,
      );
    }
  }

  red(text: string): string {
    return this.#paint("31", text);
  }

  #facts(head: string, place: string, facts: readonly string[], colour = "36"): void {
    const indent = 2 + nameWidth + timeWidth + 2 + placeWidth;
    const room = this.#width - indent;
    const lines: string[] = [];
    for (const fact of facts) {
      const last = lines.at(-1);
      if (last !== undefined && !this.#verbose && last.length + 2 + fact.length <= room) {
        lines[lines.length - 1] = `${last}; ${fact}`;
      } else lines.push(...this.#isTerminal ? wrapped(fact, room) : [fact]); // A file is not wrapped, so that it can be searched.
    }
    this.#print(`${head}  ${this.#paint(colour, place.padEnd(placeWidth))}${this.#dim(lines[0] ?? "")}`);
    for (const line of lines.slice(1)) this.#print(" ".repeat(indent) + this.#dim(line));
  }

  #mark(outcome: Outcome): string {
    return outcome === "good" ? this.#paint("32", "✓") : this.#paint("31", "✗");
  }

  #dim(text: string): string {
    return this.#paint("2", text);
  }

  #paint(code: string, text: string): string {
    return this.#colours ? `\x1b[${code}m${text}\x1b[0m` : text;
  }
}

/** A text in lines of at most `width` characters, broken at spaces; a longer word gets its own line. */
function wrapped(text: string, width: number): readonly string[] {
  const lines: string[] = [];
  for (const word of text.split(" ")) {
    const last = lines.at(-1);
    if (last !== undefined && last.length + 1 + word.length <= width) lines[lines.length - 1] = `${last} ${word}`;
    else lines.push(word);
  }
  return lines;
}

function formatTime(ms: number): string {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

/** A number of bytes for people: `1.5 GiB`. */
export function formatBytes(bytes: bigint): string {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let value = Number(bytes);
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${Number.isInteger(value) ? value : value.toFixed(1)} ${units[unit]}`;
}

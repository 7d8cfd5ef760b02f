/** One run of the demo: does each step, takes the inventory before and after, prints what the step changed, and checks it. */
import { basename } from "node:path";
import {
  type DescMessage,
  type DescMethodUnary,
  equals,
  type MessageInitShape,
  type MessageShape,
} from "@bufbuild/protobuf";
import { messageOf, type StatusCode } from "../error.ts";
import { CallError, type Channel } from "../grpc/client.ts";
import { nodeIdOf } from "../namespace.ts";
import { CheckFailed } from "./interrupt.ts";
import type { Mount } from "./machine.ts";
import type { ServiceProcess } from "./process.ts";
import { formatBytes, type Outcome, type Terminal } from "./terminal.ts";
import { countsBetween, emptyInventory, type Inventory, type RanCommand, type Testbed } from "./testbed.ts";

/** What is expected of a call besides success. */
interface CallExpectations {
  /** The call must change nothing on the cluster and on the machine. */
  readonly unchanged?: boolean;
  /** The call must not use the management API: true for every call of the node. */
  readonly free?: boolean;
}

/** What is printed of a call that has ended. */
interface FinishedCall {
  readonly before: Inventory;
  readonly outcome: Outcome;
  readonly name: string;
  readonly ms: number;
  readonly expected: CallExpectations;
}

/** What a call must fail with. */
interface ExpectedError {
  readonly code: StatusCode;
  /** Part of the message. */
  readonly named: string;
  /** Printed instead of the name of the method. */
  readonly name: string;
}

/** Does the steps of the demo. Each prints what it changed, and throws CheckFailed when a check fails. */
export class Scenario {
  readonly testbed: Testbed;
  readonly terminal: Terminal;
  readonly signal: AbortSignal;
  /** The inventory after the last call. */
  inventory: Inventory = emptyInventory;
  /** Commands that the driver ran during the last call. */
  commands: readonly RanCommand[] = [];

  constructor(testbed: Testbed, terminal: Terminal, signal: AbortSignal) {
    this.testbed = testbed;
    this.terminal = terminal;
    this.signal = signal;
  }

  mountAt(path: string): Mount | undefined {
    return this.inventory.mounts.find(({ at }) => at === path);
  }

  async call<I extends DescMessage, O extends DescMessage>(
    channel: Channel,
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    expected: CallExpectations = {},
  ): Promise<MessageShape<O>> {
    const before = await this.#observe();
    const began = performance.now();
    let answer: MessageShape<O>;
    try {
      answer = await channel.call(method, request, { signal: this.signal, deadline: inSeconds(60) });
    } catch (error) {
      await this.#show({ before, outcome: "bad", name: method.name, ms: performance.now() - began, expected });
      if (this.signal.aborted) throw this.signal.reason;
      const answer = error instanceof CallError ? `${error.code}: ${error.message}` : messageOf(error);
      this.terminal.detail("answer", [answer]);
      throw new CheckFailed(`${method.name} failed: ${answer}`);
    }
    await this.#show({ before, outcome: "good", name: method.name, ms: performance.now() - began, expected });
    const key = `${method.parent.typeName}.${method.name} ${this.#subjectOf(request)}`;
    const earlier = this.#answers.get(key);
    if (expected.unchanged === true && earlier !== undefined) {
      this.check("the answer is the same", equals(method.output, earlier as MessageShape<O>, answer));
    }
    this.#answers.set(key, answer);
    return answer;
  }

  readonly #answers = new Map<string, unknown>();

  #subjectOf(request: object): string {
    const { name, volumeId } = request as { readonly name?: string; readonly volumeId?: string };
    return name ?? volumeId ?? "";
  }

  /** Makes a call that must fail and must change nothing. */
  async callFails<I extends DescMessage, O extends DescMessage>(
    channel: Channel,
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    { code, named, name }: ExpectedError,
  ): Promise<void> {
    const before = await this.#observe();
    const began = performance.now();
    const error = await channel.call(method, request, { signal: this.signal, deadline: inSeconds(60) })
      .then(() => undefined, (error) => error);
    if (this.signal.aborted) throw this.signal.reason;
    const known = error instanceof CallError;
    await this.#show({ before, outcome: "good", name, ms: performance.now() - began, expected: { unchanged: true } });
    this.terminal.detail("answer", [known ? `${error.code}: ${error.message}` : messageOf(error ?? "OK")]);
    this.verify(
      `it is refused with ${code}, and the answer names ${named}`,
      known && error.code === code && error.message.includes(named),
    );
  }

  /** A step that is not a CSI call; `place` is where it happens. */
  async step<T>(
    name: string,
    place: "pod" | "machine",
    work: () => Promise<T>,
    facts: (result: T) => readonly string[],
  ): Promise<T> {
    this.signal.throwIfAborted();
    const began = performance.now();
    const result = await work();
    this.terminal.step("good", name, performance.now() - began, [{ place, facts: facts(result) }]);
    return result;
  }

  /** Ends a process with SIGKILL and starts it again. */
  async crash(name: "node" | "controller", start: () => Promise<ServiceProcess>): Promise<void> {
    const old = this.testbed.running(name);
    await this.step(`kill -9 ${name}, start it again`, "machine", async () => {
      await old?.end("SIGKILL", 5000);
      return await start();
    }, ({ pid }) => [`pid ${old?.pid} → ${pid}`]);
    this.verify(`the old ${name} is dead, the new one answers`, old?.isRunning === false);
  }

  /** A check that is always printed. */
  verify(what: string, passed: boolean, found?: string): void {
    this.check(what, passed, found, false);
  }

  /** A routine check: printed when it fails, or with `--verbose`. */
  check(what: string, passed: boolean, found?: string, routine = true): void {
    this.terminal.check(what, passed, found, routine);
    if (!passed) throw new CheckFailed(found === undefined || found === "" ? what : `${what}: found ${found}`);
  }

  async #observe(): Promise<Inventory> {
    this.signal.throwIfAborted();
    await this.testbed.newLogLines();
    return this.inventory = await this.testbed.observe();
  }

  async #show({ before, outcome, name, ms, expected }: FinishedCall): Promise<void> {
    const after = this.inventory = await this.testbed.observe();
    const log = await this.testbed.newLogLines();
    this.commands = log.filter(({ event }) => event === "ran a command" || event === "ran a probe")
      .map(({ command = "", exit = 0, ms = 0 }) => ({ command, exit, ms }));
    const calls = countsBetween(before.calls, after.calls);
    const changes = changesBetween(this.testbed, before, after);
    const ran = this.commands.map((one) => this.testbed.shortenCommand(one));
    const cluster = [...this.terminal.managementCalls(calls), ...changes.cluster];
    const machine = [...this.terminal.commands(ran), ...changes.machine];
    if (changes.cluster.length + changes.machine.length === 0) {
      (expected.free ? machine : cluster).push("changed nothing");
    }
    this.terminal.step(outcome, name, ms, [{ place: "cluster", facts: cluster }, { place: "machine", facts: machine }]);
    if (outcome === "bad") return;
    if (expected.unchanged === true) {
      const changed = [...changes.cluster, ...changes.machine];
      this.check("nothing changed", changed.length === 0, changed.join("; "));
    }
    if (expected.free === true) {
      const made = Object.keys(calls);
      this.check("the management API was not called", made.length === 0, made.join(", "));
    }
  }
}

function inSeconds(seconds: number): Date {
  return new Date(Date.now() + seconds * 1000);
}

function changesBetween(testbed: Testbed, before: Inventory, after: Inventory) {
  const cluster: string[] = [];
  for (const volume of after.volumes) {
    const old = before.volumes.find(({ uuid }) => uuid === volume.uuid);
    if (old === undefined) {
      cluster.push(`${volume.name} is new: ${volume.state}, ${formatBytes(volume.sizeBytes)}, ${whoMay(volume.acl)}`);
      continue;
    }
    if (old.state !== volume.state) cluster.push(`${volume.name}: ${old.state} → ${volume.state}`);
    if (old.sizeBytes !== volume.sizeBytes) {
      cluster.push(`${volume.name}: ${formatBytes(old.sizeBytes)} → ${formatBytes(volume.sizeBytes)}`);
    }
    if (old.acl.join() !== volume.acl.join()) cluster.push(`${volume.name}: ${whoMay(volume.acl)}`);
  }
  // A volume that was Deleting disappears by itself: no call made this change.
  for (const { uuid, name, state } of before.volumes) {
    if (state !== "Deleting" && !after.volumes.some((volume) => volume.uuid === uuid)) cluster.push(`${name} is gone`);
  }
  const machine: string[] = [];
  const { added, removed } = between(before.mounts, after.mounts, ({ at, source }) => `${source} ${at}`);
  for (const { at, fsType, source, root } of added) {
    // In the mount table, the root of a bind-mounted device node is the node's path in its own file system.
    const what = root === "/" || fsType === "btrfs" ? `${fsType} of ${basename(source)}` : basename(root);
    machine.push(`mounted ${what} at ${testbed.shorten(at)}`);
  }
  for (const { at } of removed) machine.push(`unmounted ${testbed.shorten(at)}`);
  const entries = between(before.entries, after.entries, (entry) => entry);
  for (const entry of entries.added) machine.push(`Discovery-Client entry ${entry.slice(0, 8)}… is new`);
  for (const entry of entries.removed) machine.push(`Discovery-Client entry ${entry.slice(0, 8)}… is gone`);
  const devices = between(before.devices, after.devices, (name) => name);
  for (const name of devices.added) machine.push(`device ${name} came`);
  for (const name of devices.removed) machine.push(`device ${name} went`);
  return { cluster, machine };
}

function between<T>(before: readonly T[], after: readonly T[], key: (item: T) => string) {
  const old = new Set(before.map(key));
  const now = new Set(after.map(key));
  return { added: after.filter((item) => !old.has(key(item))), removed: before.filter((item) => !now.has(key(item))) };
}

function whoMay(acl: readonly string[]): string {
  const hosts = hostsIn(acl);
  return hosts.length === 0 ? "no host may connect" : `${hosts.map(nodeIdOf).join(", ")} may connect`;
}

/** The host NQNs in an access list; `ALLOW_NONE` is the entry of a list without hosts. */
export function hostsIn(acl: readonly string[]): readonly string[] {
  return acl.filter((entry) => entry !== "ALLOW_NONE");
}

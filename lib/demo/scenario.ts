/** The demo's teller: it does each step, looks before and after, shows what the step changed, and checks. */
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
import { formatBytes, type Outcome, type Terminal } from "./terminal.ts";
import {
  countsBetween,
  emptyInventory,
  type Inventory,
  type RanCommand,
  type Running,
  type Testbed,
} from "./testbed.ts";

/** What must hold of a call besides its success. */
interface CallTelling {
  /** The world must be the same after the call. */
  readonly unchanged?: boolean;
  /** The call must not reach the management API: every call of the node. */
  readonly free?: boolean;
}

/** Does the steps, shows each with what it changed, and checks. */
export class Scenario {
  readonly rig: Testbed;
  readonly screen: Terminal;
  readonly signal: AbortSignal;
  /** What was seen after the last call. */
  world: Inventory = emptyInventory;
  /** Commands that the driver ran during the last call. */
  commands: readonly RanCommand[] = [];

  constructor(rig: Testbed, screen: Terminal, signal: AbortSignal) {
    this.rig = rig;
    this.screen = screen;
    this.signal = signal;
  }

  mountAt(path: string): Mount | undefined {
    return this.world.mounts.find(({ at }) => at === path);
  }

  async call<I extends DescMessage, O extends DescMessage>(
    channel: Channel,
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    telling: CallTelling = {},
  ): Promise<MessageShape<O>> {
    const before = await this.#look();
    const began = performance.now();
    let answer: MessageShape<O>;
    try {
      answer = await channel.call(method, request, { signal: this.signal, deadline: inSeconds(60) });
    } catch (error) {
      await this.#tell(before, "bad", method.name, performance.now() - began, telling);
      if (this.signal.aborted) throw this.signal.reason;
      const answer = error instanceof CallError ? `${error.code}: ${error.message}` : messageOf(error);
      this.screen.detail("answer", [answer]);
      throw new CheckFailed(`${method.name} failed: ${answer}`);
    }
    await this.#tell(before, "good", method.name, performance.now() - began, telling);
    const key = `${method.parent.typeName}.${method.name} ${this.#subjectOf(request)}`;
    const earlier = this.#answers.get(key);
    if (telling.unchanged === true && earlier !== undefined) {
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

  /**
   * A call, shown as `name`, that the driver must refuse with `code` and a message that names `named`, and that must
   * change nothing.
   */
  async refused<I extends DescMessage, O extends DescMessage>(
    channel: Channel,
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    code: StatusCode,
    { name, named }: { readonly name: string; readonly named: string },
  ): Promise<void> {
    const before = await this.#look();
    const began = performance.now();
    const error = await channel.call(method, request, { signal: this.signal, deadline: inSeconds(60) })
      .then(() => undefined, (error) => error);
    if (this.signal.aborted) throw this.signal.reason;
    const known = error instanceof CallError;
    await this.#tell(before, "good", name, performance.now() - began, { unchanged: true });
    this.screen.detail("answer", [known ? `${error.code}: ${error.message}` : messageOf(error ?? "OK")]);
    this.verify(
      `it is refused with ${code}, and the answer names ${named}`,
      known && error.code === code && error.message.includes(named),
    );
  }

  /** Something else than a call: `place` is where it happens. */
  async step<T>(
    name: string,
    place: "pod" | "machine",
    work: () => Promise<T>,
    facts: (result: T) => readonly string[],
  ): Promise<T> {
    this.signal.throwIfAborted();
    const began = performance.now();
    const result = await work();
    this.screen.step("good", name, performance.now() - began, [{ place, facts: facts(result) }]);
    return result;
  }

  /** Ends a process with SIGKILL and starts it again. */
  async crash(name: "node" | "controller", start: () => Promise<Running>): Promise<void> {
    const old = this.rig.running(name);
    await this.step(`kill -9 ${name}, start it again`, "machine", async () => {
      await old?.end("SIGKILL", 5000);
      return await start();
    }, ({ pid }) => [`pid ${old?.pid} → ${pid}`]);
    this.verify(`the old ${name} is dead, the new one answers`, old?.isRunning === false);
  }

  /** A check that is worth a line. */
  verify(what: string, passed: boolean, found?: string): void {
    this.check(what, passed, found, false);
  }

  /** A check of routine, shown when it fails or with `--verbose`. */
  check(what: string, passed: boolean, found?: string, routine = true): void {
    this.screen.check(what, passed, found, routine);
    if (!passed) throw new CheckFailed(found === undefined || found === "" ? what : `${what}: found ${found}`);
  }

  async #look(): Promise<Inventory> {
    this.signal.throwIfAborted();
    await this.rig.newLogLines();
    return this.world = await this.rig.observe();
  }

  async #tell(before: Inventory, outcome: Outcome, name: string, ms: number, telling: CallTelling): Promise<void> {
    const after = this.world = await this.rig.observe();
    const log = await this.rig.newLogLines();
    this.commands = log.filter(({ event }) => event === "ran a command" || event === "ran a probe")
      .map(({ command = "", exit = 0, ms = 0 }) => ({ command, exit, ms }));
    const calls = countsBetween(before.calls, after.calls);
    const changes = changesBetween(this.rig, before, after);
    const ran = this.commands.map((one) => this.rig.shorten(one));
    const cluster = [...this.screen.managementCalls(calls), ...changes.cluster];
    const machine = [...this.screen.commands(ran), ...changes.machine];
    if (changes.cluster.length + changes.machine.length === 0) {
      (telling.free ? machine : cluster).push("changed nothing");
    }
    this.screen.step(outcome, name, ms, [{ place: "cluster", facts: cluster }, { place: "machine", facts: machine }]);
    if (outcome === "bad") return;
    if (telling.unchanged === true) {
      const changed = [...changes.cluster, ...changes.machine];
      this.check("nothing changed", changed.length === 0, changed.join("; "));
    }
    if (telling.free === true) {
      const made = Object.keys(calls);
      this.check("the management API was not called", made.length === 0, made.join(", "));
    }
  }
}

function inSeconds(seconds: number): Date {
  return new Date(Date.now() + seconds * 1000);
}

function changesBetween(rig: Testbed, before: Inventory, after: Inventory) {
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
  // A volume that is gone after it was seen Deleting goes without a call: not a change that a call made.
  for (const { uuid, name, state } of before.volumes) {
    if (state !== "Deleting" && !after.volumes.some((volume) => volume.uuid === uuid)) cluster.push(`${name} is gone`);
  }
  const machine: string[] = [];
  const { added, removed } = between(before.mounts, after.mounts, ({ at, source }) => `${source} ${at}`);
  for (const { at, fsType, source, root } of added) {
    // The bind mount of a device node shows the node as its root, within the file system where the node lies.
    const what = root === "/" || fsType === "btrfs" ? `${fsType} of ${basename(source)}` : basename(root);
    machine.push(`mounted ${what} at ${rig.short(at)}`);
  }
  for (const { at } of removed) machine.push(`unmounted ${rig.short(at)}`);
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

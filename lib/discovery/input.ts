/**
 * What the files of the watched directory ask for.
 *
 * LightOS' daemon goes by events; this one goes by the present content of the directory, so changed and removed files count
 * too. A file that can no longer be read keeps its last entries, because nothing asked for a disconnect.
 *
 * Symbolic links are followed, because Kubernetes shows the files of a ConfigMap as links: `c1` leads to `..data/c1`, and
 * `..data` to the directory of the current version, whose name begins with two dots too. Names that begin so are skipped.
 */
import { messageOf } from "../error.ts";
import { temporaryPrefix } from "../host/attach/discovery_client.ts";
import { type Host, kindBehind } from "../host/host.ts";
import type { Logger } from "../log.ts";
import { type Entry, parseInput } from "./entries.ts";

interface InputFile {
  /** The content at the last reading. */
  text: string;
  /** When this content was first read. */
  since: number;
  /** Whether `text` was parsed, with success or not. */
  isParsed: boolean;
  /** Entries of the last content that could be parsed. */
  entries: readonly Entry[];
}

// A file without a final newline may still be being written by a program that does not rename it into place.
const incompleteMs = 2000;

/** The files of a directory. Logs once each file that it loads, drops or rejects, and each line that it skips. */
export class DiscoveryInput {
  readonly #host: Host;
  readonly #directory: string;
  readonly #log: Logger;
  readonly #now: () => number;
  readonly #files = new Map<string, InputFile>();
  /** Why files cannot be read now, by name. */
  readonly #unreadable = new Map<string, string>();
  /** Why the directory cannot be read now. */
  #condition: string | undefined;

  /** @param now a clock in milliseconds */
  constructor(host: Host, directory: string, log: Logger, now: () => number = () => performance.now()) {
    this.#host = host;
    this.#directory = directory;
    this.#log = log;
    this.#now = now;
  }

  /** The entries of all files. Undefined when the directory cannot be read: then nothing is known to have changed. */
  async read(): Promise<readonly Entry[] | undefined> {
    const names = await this.#names();
    if (names === undefined) return undefined;
    const present = new Set<string>();
    for (const name of names) if (await this.#load(name)) present.add(name);
    for (const name of this.#unreadable.keys()) if (!present.has(name)) this.#unreadable.delete(name);
    for (const name of this.#files.keys()) {
      if (present.has(name)) continue;
      this.#files.delete(name);
      this.#log.info("dropped a file that was removed", { path: `${this.#directory}/${name}` });
    }
    return [...this.#files].sort(([a], [b]) => a < b ? -1 : 1).flatMap(([, file]) => file.entries);
  }

  /**
   * UUIDs of the namespaces that volumes need, by subsystem NQN, as of the last `read`: the node service names the file of a
   * volume after its namespace UUID.
   */
  namespaces(): ReadonlyMap<string, ReadonlySet<string>> {
    const found = new Map<string, Set<string>>();
    for (const [name, { entries }] of this.#files) {
      if (!/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(name)) continue;
      for (const { subsystemNqn } of entries) {
        found.set(subsystemNqn, (found.get(subsystemNqn) ?? new Set()).add(name));
      }
    }
    return found;
  }

  /** Names of possible input files; undefined when the directory cannot be read. */
  async #names(): Promise<readonly string[] | undefined> {
    let names: readonly string[] | undefined;
    let problem: string | undefined;
    try {
      names = await this.#host.list(this.#directory);
      if (names === undefined) problem = "it is missing";
    } catch (error) {
      problem = messageOf(error);
    }
    if (problem !== this.#condition && problem !== undefined) {
      this.#log.warning("cannot read its directory", { path: this.#directory, error: problem });
    }
    this.#condition = problem;
    return names?.filter((name) => !name.startsWith(temporaryPrefix) && !name.startsWith(".."));
  }

  /** Reads one file; false when there is no file of this name. */
  async #load(name: string): Promise<boolean> {
    const path = `${this.#directory}/${name}`;
    let text: string | undefined;
    let problem: string | undefined;
    try {
      const kind = await kindBehind(this.#host, path);
      if (kind === "file") text = await this.#host.readText(path);
      else if (kind !== "absent" || await this.#host.kindOf(path) !== "symlink") return false;
      else problem = "it is a symbolic link that leads nowhere";
    } catch (error) {
      problem = messageOf(error);
    }
    if (problem !== undefined) {
      if (problem !== this.#unreadable.get(name)) this.#log.warning("could not read a file", { path, error: problem });
      this.#unreadable.set(name, problem);
      return true;
    }
    this.#unreadable.delete(name);
    if (text === undefined) return false;
    this.#update(name, path, text);
    return true;
  }

  /** Takes over the content of a file, once it is complete. */
  #update(name: string, path: string, text: string): void {
    const known = this.#files.get(name);
    const file = known ?? { text: "", since: this.#now(), isParsed: false, entries: [] };
    this.#files.set(name, file);
    if (known === undefined || file.text !== text) Object.assign(file, { text, since: this.#now(), isParsed: false });
    if (file.isParsed) return;
    if (!text.endsWith("\n") && this.#now() - file.since < incompleteMs) {
      this.#log.debug("waits for the rest of a file", { path });
      return;
    }
    file.isParsed = true;
    try {
      const { entries, skipped } = parseInput(text);
      for (const problem of skipped) this.#log.warning("skipped a line of a file", { path, error: problem });
      file.entries = entries;
      this.#log.info("took up a file", { path });
    } catch (error) {
      this.#log.warning(file.entries.length === 0 ? "refused a file" : "refused a file and keeps what it said before", {
        path,
        error: messageOf(error),
      });
    }
  }
}

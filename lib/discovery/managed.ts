/** Which subsystems the daemon may disconnect: those that files have named, in a file that survives a crash. */
import { messageOf } from "../error.ts";
import { temporaryPrefix } from "../host/attach/discovery_client.ts";
import type { Host } from "../host/host.ts";
import type { ProblemLog } from "./tasks.ts";

const head = "# Connected by lbcsi discovery-client, which may disconnect it: host NQN, subsystem NQN";

/**
 * The keys (`<host NQN> <subsystem NQN>`) of managed subsystems. The file lies in the watched directory and holds comments
 * only, for any other daemon that reads it.
 */
export class ManagedSubsystems {
  readonly #host: Host;
  readonly #path: string;
  readonly #problems: ProblemLog;
  #keys: ReadonlySet<string> = new Set();
  /** Whether the file holds `#keys`. */
  #isStored = true;

  constructor(host: Host, directory: string, problems: ProblemLog) {
    this.#host = host;
    this.#path = `${directory}/${temporaryPrefix}lbcsi`;
    this.#problems = problems;
  }

  get keys(): ReadonlySet<string> {
    return this.#keys;
  }

  /**
   * Reads the file again: another directory in the place of the watched one (a volume that was unmounted) must not count as
   * "no files".
   */
  async read(): Promise<void> {
    if (!this.#isStored) return;
    const text = await this.#host.readText(this.#path) ?? "";
    this.#keys = new Set([...text.matchAll(/^# (nqn\.\S+ nqn\.\S+)$/gm)].flatMap(([, key]) => key ?? []));
  }

  async add(keys: Iterable<string>): Promise<void> {
    await this.#write(this.#keys.union(new Set(keys)));
  }

  async remove(key: string): Promise<void> {
    await this.#write(this.#keys.difference(new Set([key])));
  }

  async #write(keys: ReadonlySet<string>): Promise<void> {
    if (keys.size === this.#keys.size && keys.isSubsetOf(this.#keys)) return;
    this.#keys = keys;
    const text = [head, ...[...keys].sort().map((key) => `# ${key}`), ""].join("\n");
    try {
      await this.#host.replaceText(this.#path, text, `${this.#path}.new`);
      this.#isStored = true;
      this.#problems.clear(this.#path);
    } catch (error) {
      this.#isStored = false;
      const event = "cannot store which subsystems it manages, and forgets them when it ends";
      this.#problems.report(this.#path, messageOf(error), event, { path: this.#path });
    }
  }
}

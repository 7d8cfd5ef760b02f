/** Watches directories. */
import { messageOf } from "../error.ts";
import type { Logger } from "../log.ts";

/**
 * A watch on one directory that all its listeners share. A watcher that is opened in the same tick in which another one on the
 * same directory was closed never reports anything (Deno 2.9, seen on /dev). So there is one for all listeners, and a new one
 * is opened a moment after the old one was closed.
 */
export class SharedWatcher {
  readonly #directory: string;
  readonly #log: Logger;
  readonly #listeners = new Set<() => void>();
  #watcher: Deno.FsWatcher | undefined;
  #opening: ReturnType<typeof setTimeout> | undefined;
  #closedAt = -Infinity;

  constructor(directory: string, log: Logger) {
    this.#directory = directory;
    this.#log = log;
  }

  /** Calls `changed` after each change in the directory, until disposed. */
  listen(changed: () => void): Disposable {
    // A wrapper, so that one function can listen twice.
    const listener = () => changed();
    this.#listeners.add(listener);
    if (this.#watcher === undefined && this.#opening === undefined) {
      const waitMs = this.#closedAt + reopenMs - performance.now();
      if (waitMs <= 0) this.#open();
      else {
        this.#opening = setTimeout(() => {
          this.#open();
          // Changes in between were not seen.
          for (const listener of this.#listeners) listener();
        }, waitMs);
      }
    }
    return {
      [Symbol.dispose]: () => {
        this.#listeners.delete(listener);
        if (this.#listeners.size === 0) this.#close();
      },
    };
  }

  #open(): void {
    this.#opening = undefined;
    try {
      this.#watcher = Deno.watchFs(this.#directory, { recursive: false });
    } catch (error) {
      // Polling goes on; the directory may come later.
      this.#log.debug("cannot watch", { path: this.#directory, error: messageOf(error) });
      return;
    }
    this.#deliver(this.#watcher);
  }

  async #deliver(watcher: Deno.FsWatcher): Promise<void> {
    try {
      for await (const event of watcher) {
        // Every open and close in /dev is an event of kind access.
        if (event.kind === "access") continue;
        for (const listener of this.#listeners) listener();
      }
    } catch (error) {
      this.#log.debug("lost a watch", { path: this.#directory, error: messageOf(error) });
    }
  }

  #close(): void {
    clearTimeout(this.#opening);
    this.#opening = undefined;
    if (this.#watcher === undefined) return;
    this.#watcher.close();
    this.#watcher = undefined;
    this.#closedAt = performance.now();
  }
}

const reopenMs = 20;

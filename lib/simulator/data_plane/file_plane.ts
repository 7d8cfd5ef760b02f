/** What the data planes over files share: contents, the set of exposed namespaces, and the order of their work. */
import { messageOf } from "../../error.ts";
import type { Logger } from "../../log.ts";
import type { Contents } from "./contents.ts";
import type { ChangedRun, ExposedNamespace } from "./data_plane.ts";

/** A data plane whose volumes are files. Subclasses show the exposed namespaces to hosts (`reconcile`). */
export abstract class FilePlane {
  protected readonly contents: Contents;
  protected readonly log: Logger;
  /** Namespaces by UUID. */
  protected readonly exposed = new Map<string, ExposedNamespace>();
  /** Whether namespaces are shown to hosts. */
  protected isStarted = false;
  #queue: Promise<unknown> = Promise.resolve();
  #isReconcilePending = false;

  constructor(contents: Contents, log: Logger) {
    this.contents = contents;
    this.log = log;
  }

  createVolume(uuid: string, sizeBytes: bigint, sourceSnapshotUuid: string | undefined): Promise<void> {
    return this.enqueue(() => this.contents.createVolume(uuid, sizeBytes, sourceSnapshotUuid));
  }

  resizeVolume(uuid: string, sizeBytes: bigint): Promise<void> {
    return this.enqueue(() => this.contents.resizeVolume(uuid, sizeBytes));
  }

  createSnapshot(uuid: string, volumeUuid: string): Promise<void> {
    return this.enqueue(async () => {
      await this.flush(volumeUuid);
      await this.contents.createSnapshot(uuid, volumeUuid);
    });
  }

  hasSnapshot(uuid: string): Promise<boolean> {
    return Promise.resolve(this.contents.hasSnapshot(uuid));
  }

  deleteSnapshot(uuid: string): Promise<void> {
    return this.enqueue(() => this.contents.deleteSnapshot(uuid));
  }

  changedRuns(
    snapshotUuid: string,
    baseUuid: string | undefined,
    blockSizeBytes: number,
    start: bigint,
  ): AsyncIterable<ChangedRun> {
    return this.contents.changedRuns(snapshotUuid, baseUuid, blockSizeBytes, start);
  }

  expose(namespace: ExposedNamespace): void {
    this.exposed.set(namespace.uuid, namespace);
    this.reconcileSoon();
  }

  hide(uuid: string): void {
    if (this.exposed.delete(uuid)) this.reconcileSoon();
  }

  async waitUntilSettled(): Promise<void> {
    await this.#queue;
  }

  /** Shows to hosts what is exposed, and nothing else. */
  protected abstract reconcile(): Promise<void>;

  /** Writes what hosts have written to a volume to its file. */
  protected flush(_uuid: string): Promise<void> {
    return Promise.resolve();
  }

  /** Runs `step` after all earlier steps. */
  protected enqueue<T>(step: () => Promise<T>): Promise<T> {
    const result = this.#queue.then(step);
    this.#queue = result.catch(() => {});
    return result;
  }

  /** Reconciles after all earlier steps; once for several changes. */
  protected reconcileSoon(): void {
    if (this.#isReconcilePending || !this.isStarted) return;
    this.#isReconcilePending = true;
    this.enqueue(async () => {
      this.#isReconcilePending = false;
      await this.reconcile();
    }).catch((error) => this.log.error("could not show the namespaces", { error: messageOf(error) }));
  }
}

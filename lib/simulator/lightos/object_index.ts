/** Volumes or snapshots of a simulated cluster, found by UUID, name and source in constant time. */

interface Named {
  readonly uuid: string;
  readonly name: string;
  readonly project: string;
}

interface Entry {
  readonly name: string;
  readonly source: string | undefined;
  readonly bytes: bigint;
}

/** Properties that the index keeps of an object; each `put` reads them again. */
export interface Traits<T> {
  /** UUID of the object that it was made from, for `madeFrom`. */
  source(object: T): string | undefined;
  /** The bytes that it reserves. */
  bytes(object: T): bigint;
}

/** Objects change in place: call `put` after each change of an object, also of its name and state. */
export class ObjectIndex<T extends Named> {
  readonly #traits: Traits<T>;
  readonly #objects = new Map<string, T>();
  readonly #entries = new Map<string, Entry>();
  readonly #byName = new Map<string, Set<T>>();
  readonly #bySource = new Map<string, Set<T>>();
  #reservedBytes = 0n;

  constructor(traits: Traits<T>) {
    this.#traits = traits;
  }

  /** The bytes that all objects reserve. */
  get reservedBytes(): bigint {
    return this.#reservedBytes;
  }

  get(uuid: string): T | undefined {
    return this.#objects.get(uuid);
  }

  /** All objects, oldest first. */
  values(): IterableIterator<T> {
    return this.#objects.values();
  }

  named(project: string, name: string): readonly T[] {
    return [...this.#byName.get(nameKey(project, name)) ?? []];
  }

  madeFrom(sourceUuid: string): readonly T[] {
    return [...this.#bySource.get(sourceUuid) ?? []];
  }

  /** Adds an object, or updates the index after a change of it. */
  put(object: T): void {
    this.#forget(object);
    const { project, name, uuid } = object;
    const entry = {
      name: nameKey(project, name),
      source: this.#traits.source(object),
      bytes: this.#traits.bytes(object),
    };
    this.#objects.set(uuid, object);
    this.#entries.set(uuid, entry);
    add(this.#byName, entry.name, object);
    if (entry.source !== undefined) add(this.#bySource, entry.source, object);
    this.#reservedBytes += entry.bytes;
  }

  delete(object: T): void {
    this.#forget(object);
    this.#objects.delete(object.uuid);
  }

  clear(): void {
    for (const object of [...this.#objects.values()]) this.delete(object);
  }

  #forget(object: T): void {
    const entry = this.#entries.get(object.uuid);
    if (entry === undefined) return;
    this.#entries.delete(object.uuid);
    remove(this.#byName, entry.name, object);
    if (entry.source !== undefined) remove(this.#bySource, entry.source, object);
    this.#reservedBytes -= entry.bytes;
  }
}

function nameKey(project: string, name: string): string {
  return `${project} ${name}`;
}

function add<T>(sets: Map<string, Set<T>>, key: string, object: T): void {
  const set = sets.get(key);
  if (set === undefined) sets.set(key, new Set([object]));
  else set.add(object);
}

function remove<T>(sets: Map<string, Set<T>>, key: string, object: T): void {
  const set = sets.get(key);
  set?.delete(object);
  if (set?.size === 0) sets.delete(key);
}

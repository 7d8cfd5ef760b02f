/**
 * What simulators have made in configfs, which outlives its maker. Each simulator writes it to a file of its own below /run,
 * which it keeps locked: a later one finds the files that are not locked, and removes what they name if it carries the
 * serial number of that file. Nothing else in configfs is touched.
 */
import { createHash } from "node:crypto";
import { join } from "node:path";
import * as z from "zod";
import { messageOf, StatusError } from "../../error.ts";
import type { Logger } from "../../log.ts";
import { exists, removeFile } from "./contents.ts";
import { allLoops, backingFile } from "./loop_device.ts";
import { nvmetRoot, removeNamespace } from "./nvmet_configfs.ts";
import { readText, run } from "./run_command.ts";

const recordDirectory = "/run/lbcsi-simulator";

const recordSchema = z.object({
  serial: z.string(),
  contentDir: z.string(),
  ports: z.array(z.string()),
  subsystems: z.array(z.string()),
  hosts: z.array(z.string()),
});
/** What a simulator has made in configfs. */
export type TargetRecord = z.infer<typeof recordSchema>;

/**
 * The record of one simulator, in a file that is locked while the simulator runs. Write it before each change of configfs.
 */
export class RecordFile {
  readonly record: TargetRecord;
  readonly #file: Deno.FsFile;

  private constructor(record: TargetRecord, file: Deno.FsFile) {
    this.record = record;
    this.#file = file;
  }

  /** Throws FAILED_PRECONDITION when another simulator uses the directory. */
  static async open(contentDir: string): Promise<RecordFile> {
    const serial = createHash("sha256").update(contentDir).digest("hex").slice(0, 20);
    const path = join(recordDirectory, serial);
    const file = await Deno.open(path, { create: true, read: true, write: true, mode: 0o600 });
    if (!await file.tryLock(true)) {
      file.close();
      throw new StatusError("FAILED_PRECONDITION", `Cannot use ${contentDir}: another simulator does`);
    }
    return new RecordFile({ serial, contentDir, ports: [], subsystems: [], hosts: [] }, file);
  }

  async write(): Promise<void> {
    const bytes = new TextEncoder().encode(JSON.stringify(this.record));
    await this.#file.seek(0, Deno.SeekMode.Start);
    await this.#file.write(bytes);
    await this.#file.truncate(bytes.length);
  }

  async remove(): Promise<void> {
    await removeFile(join(recordDirectory, this.record.serial));
  }

  close(): void {
    this.#file.close();
  }
}

/** Removes from configfs what simulators have left that no longer run. */
export async function removeLeftovers(log: Logger): Promise<void> {
  await Deno.mkdir(recordDirectory, { recursive: true, mode: 0o700 });
  for (const { name } of [...Deno.readDirSync(recordDirectory)]) {
    const path = join(recordDirectory, name);
    const file = await Deno.open(path, { read: true, write: true });
    try {
      if (!await file.tryLock(true)) continue;
      const parsed = recordSchema.safeParse(parseJson(await Deno.readTextFile(path)));
      if (parsed.success) {
        log.info("takes away what an earlier simulator has left", { path: parsed.data.contentDir });
        await removeRecorded(parsed.data, log);
      }
      await removeFile(path);
    } finally {
      file.close();
    }
  }
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    // The simulator was killed before it had written the record, and so before it made anything.
    return undefined;
  }
}

/**
 * Removes everything in a record that still exists and carries its serial number. What cannot be removed is logged.
 */
export async function removeRecorded(record: TargetRecord, log: Logger): Promise<void> {
  const attempt = async (path: string, remove: (path: string) => Promise<void> = Deno.remove) => {
    if (!exists(path)) return;
    try {
      await remove(path);
    } catch (error) {
      log.warning("could not take away", { path, error: messageOf(error) });
    }
  };
  const names = (directory: string) =>
    exists(directory) ? [...Deno.readDirSync(directory)].map(({ name }) => name) : [];
  const ours = record.subsystems.filter((nqn) => {
    const directory = join(nvmetRoot, "subsystems", nqn);
    if (readText(join(directory, "attr_serial")) === record.serial) return true;
    // Killed between making and marking it: it is still empty.
    return exists(directory) && names(join(directory, "namespaces")).length === 0 &&
      names(join(directory, "allowed_hosts")).length === 0;
  });
  for (const id of record.ports) {
    const links = join(nvmetRoot, "ports", id, "subsystems");
    // A port that serves a foreign subsystem is no longer ours.
    if (names(links).some((nqn) => !ours.includes(nqn))) continue;
    for (const nqn of names(links)) await attempt(join(links, nqn));
    const referrals = join(nvmetRoot, "ports", id, "referrals");
    for (const referral of names(referrals)) await attempt(join(referrals, referral));
    await attempt(join(nvmetRoot, "ports", id));
  }
  for (const nqn of ours) {
    const directory = join(nvmetRoot, "subsystems", nqn);
    for (const nsid of names(join(directory, "namespaces"))) {
      await attempt(join(directory, "namespaces", nsid), removeNamespace);
    }
    for (const host of names(join(directory, "allowed_hosts"))) await attempt(join(directory, "allowed_hosts", host));
    await attempt(directory);
  }
  // The kernel keeps a host that another subsystem admits.
  for (const host of record.hosts) await attempt(join(nvmetRoot, "hosts", host));
  for (const loop of allLoops()) {
    if (backingFile(loop)?.startsWith(`${record.contentDir}/`)) await run("losetup", "-d", loop);
  }
}

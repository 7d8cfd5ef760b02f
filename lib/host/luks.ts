/**
 * Encryption on the host: LUKS2 between the namespace and everything that uses it (docs/reference/lightos-api.md section 11).
 *
 * The mapper of a volume has the incumbent driver's name, so volumes that the incumbent formatted open here. A device is
 * encrypted only when it is proved blank (filesystem/content.ts). Passphrases go through standard input, never through
 * arguments.
 *
 * The volume key is in the mapper's table and not in the kernel's keyring (`--disable-keyring`), so that growing needs no
 * passphrase.
 */
import * as z from "zod";
import type { RequestContext } from "../context.ts";
import { reasonOf } from "./command_reason.ts";
import { cryptsetupError, runCryptsetup } from "./cryptsetup.ts";
import type { Host } from "./host.ts";
import { loopDevicesOn } from "./loop_devices.ts";
import { headerReader, isNeverUsed, newLabel } from "./luks_label.ts";
import { findMapper, mapperName } from "./mapper.ts";
import { mountsElsewhere, mountTable } from "./mount_table.ts";
import { type BlockDevice, describeDevice } from "./nvme/devices.ts";
import { recheckDevice } from "./nvme/recheck.ts";
import { processesAt } from "./processes.ts";
import { unmountAll } from "./unmount.ts";
import { holdersOfDevice } from "./users.ts";
import { mountsOf } from "./volume_mounts.ts";

/** How new volumes are encrypted, and how mappers are opened. An encrypted volume keeps its own cipher. */
export interface LuksSettings {
  /** `aes-xts-plain64`. */
  readonly cipher: string;
  /** Both keys of XTS together: 512 is AES-256. */
  readonly keyBits: number;
  readonly pbkdf: "argon2id" | "pbkdf2";
  /**
   * The most memory for argon2id, in KiB. Without a limit cryptsetup chooses it by the node that formats, and a smaller node
   * could not open the volume.
   */
  readonly pbkdfMemoryKib: number;
  /**
   * How long a node like the one that encrypts needs to derive the key from the passphrase, each time that it opens the
   * volume, in milliseconds. An attacker needs as long for each guess.
   */
  readonly iterMs: number;
  /** Size of an encryption sector; undefined: cryptsetup chooses it by the device. */
  readonly sectorBytes: 512 | 4096 | undefined;
  /** Lets discards through, which shows the cluster which blocks are unused. */
  readonly discard: boolean;
}

/** AES-256 in XTS, argon2id in 64 MiB at most (the incumbent's bound), for 2 s (cryptsetup's default). */
export const defaultLuksSettings: LuksSettings = {
  cipher: "aes-xts-plain64",
  keyBits: 512,
  pbkdf: "argon2id",
  pbkdfMemoryKib: 65535,
  iterMs: 2000,
  sectorBytes: undefined,
  discard: false,
};

/** The passphrase of a volume, and the one before it was changed; neither is ever part of a message. */
export interface Passphrases {
  readonly current: string;
  readonly previous: string | undefined;
}

/** Where and how a volume is to be opened. */
export interface OpenMapperOptions {
  /** Called when the volume is not open; throws when there are none. */
  readonly passphrases: () => Passphrases;
  readonly settings: LuksSettings;
  /** Nothing is written: nothing is formatted, and the mapper rejects writes. */
  readonly readOnly: boolean;
  /** Other hosts may have it open: nothing is formatted, and no passphrase changed. */
  readonly shared: boolean;
  /** Whether a blank device is encrypted. */
  readonly mayFormat: boolean;
  /** Where a mapper whose device has gone may be mounted; such a mount is unmounted. */
  readonly stagingPath: string;
  /** What the device holds, as content.ts finds before anything is formatted. */
  readonly probeContent: (device: BlockDevice) => Promise<"blank" | "luks" | "other">;
}

/**
 * Opens the mapper of a volume and returns it; encrypts a blank device first. Does not open it again when it is open. Repeat
 * it after any failure.
 *
 * @throws StatusError FAILED_PRECONDITION when the device holds something else than LUKS, or is blank and must not be
 *   formatted, or the mapper is of a device that has gone and is still in use; INVALID_ARGUMENT when no passphrase opens it;
 *   UNAVAILABLE when the device changes meanwhile
 */
export async function openMapper(
  host: Host,
  outer: RequestContext,
  device: BlockDevice,
  options: OpenMapperOptions,
): Promise<BlockDevice> {
  const ctx = outer.doing(`open the encryption of namespace ${device.uuid}`);
  const mapper = await findMapper(host, device.uuid);
  if (mapper !== undefined) {
    if (mapper.encrypts?.beneath?.number === device.number) {
      if (mapper.readOnly && !options.readOnly) {
        throw ctx.error("FAILED_PRECONDITION", `${mapper.path} is open for reading only, unstage it first`);
      }
      // It may have been opened when the volume was smaller.
      return options.readOnly ? mapper : await growMapper(host, ctx, mapper);
    }
    // Without a passphrase it could not be opened again.
    options.passphrases();
    await closeStaleMapper(host, ctx, mapper, options.stagingPath);
  }

  const passphrases = options.passphrases();
  await encryptIfBlank(host, ctx, device, { ...options, passphrases });
  if (await hasAes(host) === false) {
    ctx.log.warning("encrypts without AES instructions of the processor, which is slow", { device: device.path });
  }
  await recheckDevice(host, ctx, device);
  await open(host, ctx, device, { ...options, passphrases });
  const opened = await findMapper(host, device.uuid);
  if (opened?.encrypts?.beneath?.number !== device.number) {
    throw ctx.error("UNAVAILABLE", `${mapperName(device.uuid)} was opened and is not there`);
  }
  return opened;
}

/** Closes a mapper whose device has gone, after unmounting it at the staging path. */
async function closeStaleMapper(
  host: Host,
  ctx: RequestContext,
  mapper: BlockDevice,
  stagingPath: string,
): Promise<void> {
  ctx.log.warning("closes the encryption of a device that has gone", { device: mapper.path, path: stagingPath });
  const table = await mountTable(host);
  const elsewhere = mountsElsewhere(table, await mountsOf(host, table, mapper), stagingPath);
  if (elsewhere.length > 0) {
    const places = elsewhere.map(({ path }) => `"${path}"`).join(", ");
    throw ctx.error(
      "FAILED_PRECONDITION",
      `${mapper.path} is of a device that has gone, and still mounted at ${places}; the pods there have to end first`,
    );
  }
  await unmountAll(host, ctx, stagingPath, mapper);
  await closeMapper(host, ctx, mapper.uuid);
}

/** Encrypts a device that is blank, or whose encryption was cut off before it had a key; leaves an encrypted one as it is. */
async function encryptIfBlank(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  options: Pick<OpenMapperOptions, "probeContent" | "mayFormat"> & OpenParameters,
): Promise<void> {
  const content = await options.probeContent(device);
  if (content === "other") {
    throw ctx.error("FAILED_PRECONDITION", `${device.path} holds a file system in the clear, it is left alone`);
  }
  const isHalfMade = content === "luks" && await isWithoutKeys(host, ctx, device);
  if (content !== "blank" && !isHalfMade) return;
  const state = isHalfMade ? "holds an encryption that was never finished" : "is blank";
  if (!options.mayFormat) {
    throw ctx.error("FAILED_PRECONDITION", `${device.path} ${state}, the volume has to be staged first`);
  }
  if (options.readOnly || options.shared) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `${device.path} ${state}, and with read-only or shared access nothing is made; stage it for writing once`,
    );
  }
  if (isHalfMade) {
    // A luksFormat that outlived the driver which started it may still be running.
    const users = await processesAt(host, (place) => place === device.path);
    if (users.length > 0) throw ctx.error("UNAVAILABLE", `${device.path} is in use by ${users.join(", ")}`);
    ctx.log.warning("encrypts again what was never finished", { device: device.path });
  }
  await luksFormat(host, ctx, device, options);
}

/**
 * Closes the mapper of a volume; does nothing when it is not open. Its mounts have to be unmounted before.
 *
 * @throws StatusError FAILED_PRECONDITION when something uses it; UNAVAILABLE when cryptsetup fails otherwise
 */
export async function closeMapper(host: Host, ctx: RequestContext, uuid: string): Promise<void> {
  const mapper = await findMapper(host, uuid);
  if (mapper === undefined) return;
  const table = await mountTable(host);
  const mounts = await mountsOf(host, table, mapper);
  const users = [
    ...mounts.map(({ path }) => `the mount at "${path}"`),
    ...await holdersOfDevice(host, mapper),
    ...await loopDevicesOn(host, table, mapper.path),
  ];
  const inUseError = (users: string) =>
    ctx.error("FAILED_PRECONDITION", `its encryption (${mapper.path}) is in use by ${users}`);
  if (users.length > 0) throw inUseError(users.join(", "));
  const closed = await runCryptsetup(host, ctx, ["close", mapperName(uuid)]);
  // cryptsetup(8): 4 is "wrong device", here a mapper that is gone already; 5 is "exists or is busy".
  if (closed.code === 0 || closed.code === 4) {
    if (await findMapper(host, uuid) === undefined) return;
    throw ctx.error("UNAVAILABLE", `cryptsetup close succeeded, but ${mapper.path} is still there`);
  }
  if (closed.code === 5) {
    const processes = await processesAt(host, (place) => place === mapper.path);
    throw inUseError(processes.length > 0 ? processes.join(", ") : "something that this process cannot see");
  }
  throw cryptsetupError(ctx, "UNAVAILABLE", "close", closed);
}

/** Makes the mapper as large as its device allows, and returns it as it is then. */
export async function growMapper(
  host: Host,
  ctx: RequestContext,
  mapper: BlockDevice,
): Promise<BlockDevice> {
  const resized = await runCryptsetup(host, ctx, ["resize", mapperName(mapper.uuid)]);
  if (resized.code !== 0) throw cryptsetupError(ctx, "FAILED_PRECONDITION", "resize", resized);
  return await recheckDevice(host, ctx, mapper);
}

const dumpSchema = z.object({ keyslots: z.record(z.string(), z.unknown()) });

/**
 * Whether the device has the header of a luksFormat of ours that was killed before it wrote the key, which takes some seconds
 * (seen with cryptsetup 2.6: a valid header, with our label and without key slots). Without a key, nothing inside can ever
 * have been used.
 */
async function isWithoutKeys(host: Host, ctx: RequestContext, device: BlockDevice): Promise<boolean> {
  if (!await isNeverUsed(device, headerReader(host, ctx, device))) return false;
  const dumped = await host.run("cryptsetup", ["luksDump", "--dump-json-metadata", device.path], {
    signal: ctx.signal,
    onAbort: "kill",
    log: ctx.log,
  });
  // The attempt to open it will report what is wrong.
  if (dumped.code !== 0) return false;
  const parsed = dumpSchema.safeParse(parseJson(dumped.stdout));
  return parsed.success && Object.keys(parsed.data.keyslots).length === 0;
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

type OpenParameters = Pick<OpenMapperOptions, "settings" | "readOnly" | "shared"> & {
  readonly passphrases: Passphrases;
};

async function luksFormat(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  { passphrases, settings }: OpenParameters,
): Promise<void> {
  const { cipher, keyBits, sectorBytes } = settings;
  ctx.log.info("encrypts a blank device", { device: device.path });
  await recheckDevice(host, ctx, device);
  const made = await runCryptsetup(host, ctx, [
    "luksFormat",
    "--batch-mode",
    "--type=luks2",
    "--hash=sha256",
    `--cipher=${cipher}`,
    `--key-size=${keyBits}`,
    ...derivationOf(settings),
    ...(sectorBytes === undefined ? [] : [`--sector-size=${sectorBytes}`]),
    `--label=${newLabel}`,
    "--key-file=-",
    device.path,
  ], passphrases.current);
  if (made.code !== 0) throw cryptsetupError(ctx, "FAILED_PRECONDITION", "luksFormat", made);
}

async function open(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  { passphrases, settings, readOnly, shared }: OpenParameters,
): Promise<void> {
  const args = [
    "open",
    "--type=luks2",
    "--key-file=-",
    "--disable-keyring",
    // Requests are encrypted on the CPU that submits them: NVMe/TCP has many queues, and a thread between adds latency.
    "--perf-same_cpu_crypt",
    "--perf-submit_from_crypt_cpus",
    "--perf-no_read_workqueue",
    "--perf-no_write_workqueue",
    ...(settings.discard ? ["--allow-discards"] : []),
    ...(readOnly ? ["--readonly"] : []),
    device.path,
    mapperName(device.uuid),
  ];
  const opened = await runCryptsetup(host, ctx, args, passphrases.current);
  if (opened.code === 0) return;
  // cryptsetup(8): 2 is "no permission (bad passphrase)".
  if (opened.code !== 2) throw cryptsetupError(ctx, "FAILED_PRECONDITION", "open", opened);
  const passphraseError = (problem: string) => ctx.error("INVALID_ARGUMENT", `${problem} ${describeDevice(device)}`);
  const { current, previous } = passphrases;
  if (previous === undefined) {
    throw passphraseError(`the passphrase in the secrets ("host-encryption-passphrase") does not open`);
  }
  const before = await runCryptsetup(host, ctx, args, previous);
  if (before.code === 2) throw passphraseError("neither the passphrase in the secrets nor the previous one opens");
  if (before.code !== 0) throw cryptsetupError(ctx, "FAILED_PRECONDITION", "open", before);
  if (readOnly) return;
  if (shared) {
    // Two hosts that change key slots at once leave a header that no passphrase opens.
    ctx.log.warning("leaves the previous passphrase of a volume that other hosts may have open", {
      device: device.path,
    });
    return;
  }
  // cryptsetup reads the two from standard input, one on each line.
  if (/\n/.test(current + previous)) {
    ctx.log.warning("leaves the previous passphrase of a volume, because one of the two has a line break", {
      device: device.path,
    });
    return;
  }
  // The old key is removed only when the new one is in its place: luksChangeKey adds, then removes.
  const changed = await runCryptsetup(
    host,
    ctx,
    ["luksChangeKey", "--batch-mode", ...derivationOf(settings), device.path],
    `${previous}\n${current}\n`,
  );
  if (changed.code !== 0) {
    ctx.log.warning("could not change the passphrase of a volume", {
      device: device.path,
      exit: changed.code,
      error: reasonOf("cryptsetup", changed),
    });
    return;
  }
  ctx.log.info("changed the passphrase of a volume", { device: device.path });
}

/** How the key of a slot is derived from its passphrase, as options of cryptsetup. */
function derivationOf({ pbkdf, pbkdfMemoryKib, iterMs }: LuksSettings): readonly string[] {
  const memory = pbkdf === "argon2id" ? [`--pbkdf-memory=${pbkdfMemoryKib}`] : [];
  return [`--pbkdf=${pbkdf}`, ...memory, `--iter-time=${iterMs}`];
}

/** Whether the processor has AES instructions; undefined when the kernel does not show it. */
export async function hasAes(host: Host): Promise<boolean | undefined> {
  const text = await host.readText(`${host.roots.proc}/cpuinfo`);
  // x86 calls the line "flags", ARM "Features".
  const flags = /^(?:flags|Features)\s*:(.*)$/m.exec(text ?? "")?.[1];
  return flags === undefined ? undefined : flags.split(/\s+/).includes("aes");
}

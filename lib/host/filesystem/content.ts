/**
 * What a device holds: a file system, an encrypted volume, or provably nothing.
 *
 * Nothing that may hold data is ever formatted. `blkid -p` exits 2 for a blank device, and also for one that cannot be read,
 * is missing or has no size (util-linux 2.38.1). So a device counts as blank only when its name still is the right namespace,
 * its size is not zero, no other device uses it, blkid finds nothing, and the driver has read its head, its tail and samples
 * in between, and found zeros only.
 *
 * A device that is neither blank nor a file system may be the work of a mkfs that was killed. The driver recognises its own
 * work by a mark (unfinished.ts). Without a mark such a device is left alone: a damaged file
 * system can look the same.
 */
import type { RequestContext } from "../../context.ts";
import type { StatusError } from "../../error.ts";
import { reasonOf } from "../command_reason.ts";
import type { Host } from "../host.ts";
import { isNeverUsed } from "../luks_label.ts";
import type { BlockDevice } from "../nvme/devices.ts";
import { recheckDevice } from "../nvme/recheck.ts";
import { createDeviceReader, type DeviceReader } from "./device_reader.ts";
import { type FsType, fsTypes } from "./fs_type.ts";
import { firstDataOffset } from "./samples.ts";
import { sizeFromSuperBlock } from "./size.ts";
import { hasLuksHeader, hasNoPartition, isWholeExt4, owningFileSystem } from "./superblocks.ts";
import { isHalfMade, isUnfinished, wasUnfinishedWhenSmaller } from "./unfinished.ts";

/** What a device holds. */
export type Content =
  /** Encrypted on the host: luks.ts opens it. */
  | { readonly kind: "luks" }
  /** `isSmaller`: it can grow, because more space is free behind it than it must leave unused. */
  | { readonly kind: "filesystem"; readonly fsType: FsType; readonly isSmaller: boolean }
  | { readonly kind: "blank" }
  /** A mkfs or luksFormat of ours for this namespace was killed: see unfinished.ts and luks_label.ts. */
  | { readonly kind: "unfinished" };

/** A content that a file system may be made over: provably nothing, or a mkfs of ours that did not finish. */
export type EmptyContent = Extract<Content, { readonly kind: "blank" | "unfinished" }>;

/**
 * What the device holds: a file system that we can mount, or provably nothing.
 *
 * @throws StatusError FAILED_PRECONDITION for everything else, naming it; UNAVAILABLE when the device cannot be read, has no
 *   size, or is not this namespace any more
 */
export async function probeContent(host: Host, ctx: RequestContext, device: BlockDevice): Promise<Content> {
  const contentError = (problem: string) => ctx.error("FAILED_PRECONDITION", problem);
  const now = await recheckDevice(host, ctx, device);
  if (now.sizeBytes === 0n) {
    throw ctx.error("UNAVAILABLE", `${now.path} has no size, the namespace is not ready`);
  }
  const holders = await host.list(`${host.roots.sysfs}/class/block/${now.name}/holders`) ?? [];
  if (holders.length > 0) throw contentError(`${now.path} is in use by ${holders.join(", ")}`);
  const beneath = now.encrypts?.beneath;
  if (beneath !== undefined && await isNeverUsed(beneath, createDeviceReader(host, ctx, beneath))) {
    return { kind: "unfinished" };
  }

  const read = createDeviceReader(host, ctx, now);
  const type = await detectType(host, ctx, now);
  if (await isHalfMade(read, now, type)) return { kind: "unfinished" };
  if (type === "crypto_LUKS") return { kind: "luks" };
  if (type !== undefined) return await fileSystemContent(ctx, read, now, type);
  if (now.encrypts !== undefined) {
    // Unwritten blocks of an encrypted device read as noise. Only the label of a new volume distinguishes them from data, and
    // it is gone.
    throw contentError(`${now.path} holds no file system, and may have been used without one; it is left alone`);
  }
  if (await isUnfinished(read, now)) return { kind: "unfinished" };
  const dataAt = await firstDataOffset(read, now.sizeBytes);
  if (dataAt === undefined) return { kind: "blank" };
  if (await wasUnfinishedWhenSmaller(read, now)) return { kind: "unfinished" };
  throw contentError(
    `${now.path} is not blank and holds no file system: there is data at byte ${dataAt}; it is left alone. If nothing on ` +
      `it is needed, delete the volume and create it again`,
  );
}

async function fileSystemContent(
  ctx: RequestContext,
  read: DeviceReader,
  device: BlockDevice,
  fsType: FsType,
): Promise<Content> {
  const size = await sizeFromSuperBlock(read, fsType);
  if (size === undefined) {
    throw ctx.error("FAILED_PRECONDITION", `the super block of ${fsType} on ${device.path} makes no sense`);
  }
  if (size.fsBytes > device.sizeBytes) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `${fsType} on ${device.path} has ${size.fsBytes} bytes, but the device only ${device.sizeBytes}: it has shrunk, and ` +
        `the volume has to get its size back`,
    );
  }
  return { kind: "filesystem", fsType, isSmaller: device.sizeBytes - size.fsBytes >= size.stepBytes };
}

/** The error for an encrypted volume where a file system in the clear is needed. */
export function encryptedError(ctx: RequestContext, device: BlockDevice): StatusError {
  return ctx.error(
    "FAILED_PRECONDITION",
    `${device.path} holds crypto_LUKS, which is none of ${fsTypes.join(", ")}; it is left alone`,
  );
}

/**
 * What the device holds of the types that we can open; undefined: nothing at all.
 *
 * When blkid looks for all types, it takes a block near the end of the device for a member of a RAID, of DRBD or of ZFS, and
 * a second LUKS header in the middle for an encrypted volume. Either can be part of a tenant's file. So where it finds
 * anything else than one of our file systems, it is run again for those types alone. A file system that it finds then has to
 * be whole: the super block of an ext4 stays where ZFS or a RAID was made over it, and e2fsck would write there.
 *
 * @throws StatusError FAILED_PRECONDITION for anything else, for a partition table, and for several of ours of which none is
 *   provably the real one
 */
async function detectType(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
): Promise<FsType | "crypto_LUKS" | undefined> {
  const contentError = (problem: string) => ctx.error("FAILED_PRECONDITION", problem);
  const read = createDeviceReader(host, ctx, device);
  const probe = (...types: string[]) => probeSignatures(host, ctx, device, types);
  const all = await probe();
  const tableError = contentError(`${device.path} holds a partition table (${all.partitions}), it is left alone`);
  const hasPartitions = all.partitions !== undefined && (all.partitions !== "dos" || !await hasNoPartition(read));
  if (hasPartitions) throw tableError;
  if (all.isNothing) return undefined;
  const fsType = fsTypes.find((fsType) => fsType === all.type);
  if (fsType === "ext4" && !await isWholeExt4(read, device.sizeBytes)) {
    throw contentError(
      `${device.path} has a super block of ext4 and no root directory where that leads to: it is damaged, or the remains ` +
        `of an ext4 under other data; it is left alone, e2fsck -n shows what is there`,
    );
  }
  if (fsType !== undefined) return fsType;
  if (all.type === "crypto_LUKS" && await hasLuksHeader(read)) return "crypto_LUKS";

  const ours = await probe(...fsTypes, "crypto_LUKS");
  if (ours.type !== undefined || ours.isAmbiguous) {
    if (ours.type === "crypto_LUKS" && await hasLuksHeader(read)) return "crypto_LUKS";
    const owner = await owningFileSystem(read, device.sizeBytes);
    // blkid tells ext4 from its predecessors, and verifies checksums.
    if (owner !== undefined && (await probe(owner)).type === owner) return owner;
    // cryptsetup repairs a lost first header from the second one.
    if (ours.type === "crypto_LUKS" && (await probe(...fsTypes)).isNothing) return "crypto_LUKS";
    throw contentError(`${device.path} has signatures of more than one kind, it is left alone`);
  }
  if (all.partitions !== undefined) throw tableError;
  if (all.isAmbiguous) throw contentError(`${device.path} has signatures of more than one kind, it is left alone`);
  throw contentError(
    all.type === undefined
      ? `blkid finds something on ${device.path} that it does not name, it is left alone`
      : `${device.path} holds ${all.type}, which is none of ${fsTypes.join(", ")}; it is left alone`,
  );
}

interface Signatures {
  readonly type: string | undefined;
  /** The kind of a partition table. */
  readonly partitions: string | undefined;
  readonly isAmbiguous: boolean;
  /** blkid finds nothing or cannot read the device: its exit code is the same for both. */
  readonly isNothing: boolean;
}

/** Runs `blkid -p` for these types, for all if the list is empty; throws UNAVAILABLE when blkid fails. */
async function probeSignatures(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  types: readonly string[],
): Promise<Signatures> {
  const filter = types.length === 0 ? [] : ["-n", types.join(",")];
  const args = ["-p", ...filter, "-s", "TYPE", "-s", "PTTYPE", "-o", "export", device.path];
  const probed = await host.run("blkid", args, { signal: ctx.signal, onAbort: "kill", log: ctx.log });
  // blkid(8): 2 is "nothing found", 8 "ambivalent".
  if (probed.code !== 0 && probed.code !== 2 && probed.code !== 8) {
    throw ctx.error(
      "UNAVAILABLE",
      `blkid cannot tell what ${device.path} holds (exit ${probed.code}: ${reasonOf("blkid", probed)})`,
    );
  }
  const facts = new Map(
    probed.stdout.split("\n").map((line) => {
      const equals = line.indexOf("=");
      return [line.slice(0, equals), line.slice(equals + 1)] as const;
    }),
  );
  return {
    type: facts.get("TYPE"),
    partitions: facts.get("PTTYPE"),
    isAmbiguous: probed.code === 8,
    isNothing: probed.code === 2,
  };
}

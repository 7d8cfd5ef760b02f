/**
 * The blocks of a LightOS snapshot that hold data, or that differ from an older snapshot of the same volume.
 *
 * LightOS answers with ranges of 64 blocks, each with a bitmap (docs/reference/lightos-api.md 15.1). Its documentation
 * does not say in which order the bits of the bitmap stand, nor whether `lbaEnd` is part of the range. For a backup,
 * one block too many costs time, one too few is data lost. So a range counts as a whole when anything in it is marked,
 * and `lbaEnd` as part of it.
 */
import { DurosAPI, type LBARange } from "../../../proto/gen/lightos_pb.ts";
import type { RequestContext } from "../../context.ts";
import { parseVolumeId, type VolumeId } from "../../volume_id.ts";
import type { BlockRange, ChangedBlocks } from "../backend.ts";
import type { Cluster } from "./cluster.ts";
import type { ClusterPool } from "./pool.ts";

/** What to list the blocks of. */
interface BlockListing {
  readonly id: VolumeId;
  /** The older snapshot to compare with; undefined: all blocks with data. */
  readonly base: VolumeId | undefined;
  readonly capacityBytes: bigint;
  readonly blockBytes: bigint;
  readonly startingOffsetBytes: bigint;
}

/** The changed-blocks part of the LightOS backend. */
export function lightosChangedBlocks(clusters: ClusterPool): ChangedBlocks {
  return {
    async changedBlocks(call, secrets, { snapshotId, baseSnapshotId, startingOffsetBytes }) {
      const id = parseVolumeId(snapshotId, "snapshot");
      const base = baseSnapshotId === undefined ? undefined : parseVolumeId(baseSnapshotId, "snapshot");
      const ctx = call.doing(
        base === undefined
          ? `list the blocks of snapshot ${id.uuid}`
          : `list the blocks that differ between snapshots ${base.uuid} and ${id.uuid}`,
      );
      const cluster = clusters.open(secrets, id.endpoints, id.scheme);
      const snapshot = await readSnapshot(ctx, cluster, id);
      if (base !== undefined) {
        const older = await readSnapshot(ctx, cluster, base);
        if (older.sourceVolumeUUID !== snapshot.sourceVolumeUUID) {
          throw ctx.error("INVALID_ARGUMENT", "they are of two volumes");
        }
      }
      const capacityBytes = snapshot.size;
      if (startingOffsetBytes < 0n || startingOffsetBytes > capacityBytes) {
        throw ctx.error(
          "OUT_OF_RANGE",
          `starting_offset ${startingOffsetBytes} is not between 0 and its ${capacityBytes} bytes`,
        );
      }
      const blockBytes = BigInt(snapshot.sectorSize);
      if (blockBytes !== 512n && blockBytes !== 4096n) {
        throw ctx.error(
          "INTERNAL",
          `LightOS at ${cluster.lastAddress} says that its blocks have ${blockBytes} bytes, 512 or 4096 are known`,
        );
      }
      return {
        capacityBytes,
        pages: readPages(ctx, cluster, { id, base, capacityBytes, blockBytes, startingOffsetBytes }),
      };
    },
  };
}

async function readSnapshot(ctx: RequestContext, cluster: Cluster, id: VolumeId) {
  return await cluster.call(ctx, DurosAPI.method.getSnapshot, { UUID: id.uuid, projectName: id.project ?? "" });
}

async function* readPages(
  ctx: RequestContext,
  cluster: Cluster,
  { id, base, capacityBytes, blockBytes, startingOffsetBytes }: BlockListing,
): AsyncGenerator<readonly BlockRange[]> {
  let offsetLBA = startingOffsetBytes / blockBytes;
  let coveredBytes = 0n;
  for (;;) {
    const page = await cluster.call(ctx, DurosAPI.method.listChangedBlocks, {
      snapshotUUID: id.uuid,
      baseSnapshotUUID: base?.uuid ?? "",
      projectName: id.project ?? "",
      offsetLBA,
    });
    const ranges: BlockRange[] = [];
    for (const range of page.lbaRanges.toSorted((a, b) => a.lbaStart < b.lbaStart ? -1 : 1)) {
      if (!marksAnything(range)) continue;
      const from = max(range.lbaStart * blockBytes, coveredBytes);
      const to = min((range.lbaEnd + 1n) * blockBytes, capacityBytes);
      if (to <= from || to <= startingOffsetBytes) continue;
      const last = ranges.at(-1);
      if (last !== undefined && last.offsetBytes + last.lengthBytes === from) {
        ranges[ranges.length - 1] = { offsetBytes: last.offsetBytes, lengthBytes: to - last.offsetBytes };
      } else {
        ranges.push({ offsetBytes: from, lengthBytes: to - from });
      }
      coveredBytes = to;
    }
    if (ranges.length > 0) yield ranges;
    if (page.nextOffsetLBA === 0n) return;
    if (page.nextOffsetLBA <= offsetLBA) {
      throw ctx.error(
        "INTERNAL",
        `LightOS at ${cluster.lastAddress} wants to go on at block ${page.nextOffsetLBA} after ${offsetLBA}`,
      );
    }
    offsetLBA = page.nextOffsetLBA;
  }
}

/** A range without a bitmap counts as marked. */
function marksAnything({ dataBitMap }: LBARange): boolean {
  return dataBitMap.length === 0 || dataBitMap.some((byte) => byte !== 0);
}

function min(a: bigint, b: bigint): bigint {
  return a < b ? a : b;
}

function max(a: bigint, b: bigint): bigint {
  return a > b ? a : b;
}

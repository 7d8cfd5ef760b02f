/**
 * Which blocks of a LightOS snapshot hold data, or differ from an older snapshot of the same volume.
 *
 * LightOS answers ranges of 64 blocks with a bitmap each (docs/reference/lightos-api.md 15.1). What is documented of the bitmap leaves
 * its bit order open, and that of `lbaEnd` whether it is part of the range. For a backup a block too many costs time, one
 * too few is data lost. So a range counts as a whole when anything in it is marked, and `lbaEnd` as part of it.
 */
import type { RequestContext, Secrets } from "../../context.ts";
import { StatusError } from "../../error.ts";
import { parseVolumeId, type VolumeId } from "../../volume_id.ts";
import { DurosAPI, type LBARange } from "../../../proto/gen/lightos_pb.ts";
import type { BlockRange, ChangedBlocks } from "../backend.ts";
import type { Cluster, ClusterPool } from "./cluster.ts";

/** The changed-blocks part of the LightOS backend. */
export function lightosBlocks(clusters: ClusterPool): ChangedBlocks {
  return {
    async changedBlocks(ctx, secrets, { snapshotId, baseSnapshotId, startingOffsetBytes }) {
      const id = parseVolumeId(snapshotId, "snapshot");
      const base = baseSnapshotId === undefined ? undefined : parseVolumeId(baseSnapshotId, "snapshot");
      const action = base === undefined
        ? `list the blocks of snapshot ${id.uuid}`
        : `list the blocks that differ between snapshots ${base.uuid} and ${id.uuid}`;
      const cluster = open(clusters, secrets, id);
      const snapshot = await readSnapshot(ctx, cluster, action, id);
      if (base !== undefined) {
        const older = await readSnapshot(ctx, cluster, action, base);
        if (older.sourceVolumeUUID !== snapshot.sourceVolumeUUID) {
          throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: they are of two volumes`);
        }
      }
      const capacityBytes = snapshot.size;
      if (startingOffsetBytes < 0n || startingOffsetBytes > capacityBytes) {
        throw new StatusError(
          "OUT_OF_RANGE",
          `Cannot ${action}: starting_offset ${startingOffsetBytes} is not between 0 and its ${capacityBytes} bytes`,
        );
      }
      const blockBytes = BigInt(snapshot.sectorSize);
      if (blockBytes !== 512n && blockBytes !== 4096n) {
        throw new StatusError(
          "INTERNAL",
          `Cannot ${action}: LightOS at ${cluster.lastAddress} says that its blocks have ${blockBytes} bytes, 512 or 4096 are known`,
        );
      }
      return {
        capacityBytes,
        pages: pages(ctx, cluster, action, id, base, { capacityBytes, blockBytes, startingOffsetBytes }),
      };
    },
  };
}

function open(clusters: ClusterPool, secrets: Secrets, id: VolumeId): Cluster {
  return clusters.open(secrets, id.endpoints, id.scheme);
}

async function readSnapshot(ctx: RequestContext, cluster: Cluster, action: string, id: VolumeId) {
  return await cluster.call(ctx, action, DurosAPI.method.getSnapshot, { UUID: id.uuid, projectName: id.project ?? "" });
}

async function* pages(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  id: VolumeId,
  base: VolumeId | undefined,
  { capacityBytes, blockBytes, startingOffsetBytes }: {
    readonly capacityBytes: bigint;
    readonly blockBytes: bigint;
    readonly startingOffsetBytes: bigint;
  },
): AsyncGenerator<readonly BlockRange[]> {
  let offsetLBA = startingOffsetBytes / blockBytes;
  let coveredBytes = 0n;
  for (;;) {
    const page = await cluster.call(ctx, action, DurosAPI.method.listChangedBlocks, {
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
      throw new StatusError(
        "INTERNAL",
        `Cannot ${action}: LightOS at ${cluster.lastAddress} wants to go on at block ${page.nextOffsetLBA} after ${offsetLBA}`,
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

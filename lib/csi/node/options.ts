/** What the handlers of the node service need: its options, and the parts that they share. */
import type { KeyedLock } from "../../lock.ts";
import type { VolumeId } from "../../volume_id.ts";
import type { InlineVolumes } from "../inline/options.ts";
import type { ConditionOptions } from "./condition.ts";
import type { StagingOptions } from "./staging.ts";

/** The options of the node service. */
export interface NodeOptions extends StagingOptions, ConditionOptions {
  /** Shared with the attacher: `volume <uuid>` is taken here, `subsystem <nqn>` there. */
  readonly locks: KeyedLock;
  /** How many volumes of this driver the node can hold; undefined: the orchestrator decides. */
  readonly maxVolumes?: number | undefined;
  /** Parses a volume ID; throws NOT_FOUND for one that is not this driver's. */
  readonly parseId: (text: string) => Pick<VolumeId, "uuid" | "hostEncryption">;
  /** Inline volumes of pods; undefined: this node makes none, and its errors say so. */
  readonly inline?: InlineVolumes;
  /** Whether volumes may be mounted in directories of the operating system. */
  readonly allowSystemPaths?: boolean;
  /** Whether volumes of this driver can grow; never true by default, because a storage system has to be able to. */
  readonly canExpand: boolean;
  /** Whether the health calls of CSI 1.13 are announced and served; tools for 1.12 fail on their capabilities. */
  readonly volumeHealth?: boolean;
}

/** What every handler of the node service works with, its first argument. */
export interface NodeParts extends NodeOptions {
  readonly inline: InlineVolumes;
}

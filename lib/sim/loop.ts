import type { Logger } from "../context.ts";
import type { ClusterIdentity } from "./cluster.ts";
import { StatusError } from "../error.ts";
import type { DataPlane } from "./data_plane.ts";

export interface LoopOptions {
  readonly contentDir: string;
  readonly discoveryDir: string;
  readonly devRoot: string;
  readonly sysfsRoot: string;
  readonly identity: ClusterIdentity;
  readonly log: Logger;
}
export function openLoopPlane(_options: LoopOptions): Promise<DataPlane> {
  return Promise.reject(
    new StatusError("UNIMPLEMENTED", `Cannot simulate with data plane "loop": it is not there yet`),
  );
}

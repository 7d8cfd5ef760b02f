/** Access modes of several nodes, for a backend that can give a volume to one host only. */
import { VolumeCapability_AccessMode_Mode as Mode } from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import type { StorageBackend } from "../../storage/backend.ts";
import { type Access, isShared } from "../request.ts";

/** Throws INVALID_ARGUMENT for an access mode of several nodes where the backend can give a volume to one host only. */
export function assertSharingSupported(
  ctx: RequestContext,
  backend: Pick<StorageBackend, "oneHostOnly">,
  access: Access,
): void {
  if (backend.oneHostOnly === undefined || !isShared(access.mode)) return;
  throw ctx.error(
    "INVALID_ARGUMENT",
    `access mode ${Mode[access.mode]} is for several nodes, and ${backend.oneHostOnly}`,
  );
}

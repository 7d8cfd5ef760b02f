/**
 * The CSI controller service: turns requests into volumes, snapshots and access, through a StorageBackend. One file per
 * group of calls.
 *
 * No state is kept between calls. One call at a time runs per volume (and per name, while a volume is being made); a
 * second one fails with ABORTED, naming the call that runs. Each handler names its section of the CSI specification.
 */
import type { MessageInitShape } from "@bufbuild/protobuf";
import {
  type Controller,
  type ControllerGetCapabilitiesResponseSchema,
  ControllerServiceCapability_RPC_Type as Rpc,
  type Node,
} from "../../../proto/gen/csi_pb.ts";
import type { Handlers } from "../../grpc/server.ts";
import type { StorageBackend } from "../../storage/backend.ts";
import { accessHandlers } from "./access.ts";
import { capacityHandlers } from "./capacity.ts";
import { expansionHandlers } from "./expansion.ts";
import { healthHandlers } from "./health.ts";
import { listingHandlers } from "./listing.ts";
import { modificationHandlers } from "./modification.ts";
import type { ControllerOptions } from "./options.ts";
import { snapshotHandlers } from "./snapshots.ts";
import { volumeHandlers } from "./volumes.ts";

/** The handlers of CSI's Controller service. A call that the backend has no part for answers UNIMPLEMENTED. */
export function controllerHandlers(controller: ControllerOptions): Handlers<typeof Controller> {
  const { backend, locks, volumeHealth = false } = controller;
  const { snapshots, expansion, listing, modification } = backend;
  return {
    controllerGetCapabilities: () => Promise.resolve({ capabilities: controllerCapabilities(backend, volumeHealth) }),
    ...volumeHandlers(controller),
    ...accessHandlers(controller),
    ...(expansion === undefined ? {} : expansionHandlers(controller, expansion)),
    ...(snapshots === undefined ? {} : snapshotHandlers(snapshots, locks)),
    ...(listing === undefined ? {} : listingHandlers(backend, listing)),
    ...(volumeHealth ? healthHandlers(backend) : {}),
    ...capacityHandlers(backend),
    ...(modification === undefined ? {} : modificationHandlers(controller, modification)),
  };
}

/**
 * The Node service on the controller's socket: it announces no capabilities, and every other call answers
 * UNIMPLEMENTED. csi-resizer needs it: when the controller cannot grow volumes, it asks on this socket whether nodes
 * can, and exits when that call fails.
 */
export const nodeServiceOfController: Handlers<typeof Node> = {
  nodeGetCapabilities: () => Promise.resolve({ capabilities: [] }),
};

type Capabilities = NonNullable<MessageInitShape<typeof ControllerGetCapabilitiesResponseSchema>["capabilities"]>;

/** The capabilities of exactly those parts that the backend has. */
function controllerCapabilities(backend: StorageBackend, volumeHealth: boolean): Capabilities {
  const { snapshots, expansion, listing, capacity, modification } = backend;
  const announced = [Rpc.CREATE_DELETE_VOLUME, Rpc.PUBLISH_UNPUBLISH_VOLUME, Rpc.SINGLE_NODE_MULTI_WRITER];
  if (expansion !== undefined) announced.push(Rpc.EXPAND_VOLUME);
  if (snapshots !== undefined) {
    announced.push(Rpc.CREATE_DELETE_SNAPSHOT, Rpc.CLONE_VOLUME, Rpc.GET_SNAPSHOT, Rpc.LIST_SNAPSHOTS);
  }
  if (listing !== undefined) {
    announced.push(Rpc.LIST_VOLUMES, Rpc.LIST_VOLUMES_PUBLISHED_NODES, Rpc.GET_VOLUME, Rpc.VOLUME_CONDITION);
  }
  if (capacity !== undefined) announced.push(Rpc.GET_CAPACITY);
  if (modification !== undefined) announced.push(Rpc.MODIFY_VOLUME);
  if (volumeHealth) announced.push(Rpc.GET_VOLUME_HEALTH);
  if (volumeHealth && listing !== undefined) announced.push(Rpc.LIST_VOLUME_HEALTH);
  return announced.map((type) => ({ type: { case: "rpc", value: { type } } }));
}

/** The CSI identity service, which every role of the driver serves. */
import type { MessageInitShape } from "@bufbuild/protobuf";
import { StatusError } from "../error.ts";
import type { Handlers } from "../grpc/server.ts";
import {
  type GetPluginCapabilitiesResponseSchema,
  type Identity,
  PluginCapability_Service_Type as ServiceType,
  PluginCapability_VolumeExpansion_Type as ExpansionType,
} from "../../proto/gen/csi_pb.ts";

/** What the Identity service reports about the driver; the same in every role. */
export interface DriverIdentity {
  /** The CSIDriver object's name and the StorageClass provisioner. */
  readonly name: string;
  readonly version: string;
  /** Whether volumes can grow. */
  readonly expansion: boolean;
  /** Whether the SnapshotMetadata service is served. */
  readonly snapshotMetadata: boolean;
}

/**
 * The Identity service (CSI specification, "Identity Service RPC").
 *
 * Probe is about this process alone: its callers restart the driver when it fails. That does not repair a lost storage
 * cluster, but it does repair a process without a free thread.
 *
 * @param isServing whether calls can be served
 */
export function identityHandlers(
  identity: DriverIdentity,
  isServing: () => Promise<boolean> = () => Promise.resolve(true),
): Handlers<typeof Identity> {
  return {
    getPluginInfo: () => Promise.resolve({ name: identity.name, vendorVersion: identity.version }),
    getPluginCapabilities: () => Promise.resolve({ capabilities: pluginCapabilities(identity) }),
    async probe() {
      if (await isServing()) return { ready: true };
      throw new StatusError(
        "FAILED_PRECONDITION",
        "Cannot serve: no file operation of this process ends any more, it has to be restarted",
      );
    },
  };
}

type Capabilities = NonNullable<MessageInitShape<typeof GetPluginCapabilitiesResponseSchema>["capabilities"]>;

function pluginCapabilities({ expansion, snapshotMetadata }: DriverIdentity): Capabilities {
  const capabilities: Capabilities = [{
    type: { case: "service", value: { type: ServiceType.CONTROLLER_SERVICE } },
  }];
  if (expansion) capabilities.push({ type: { case: "volumeExpansion", value: { type: ExpansionType.ONLINE } } });
  if (snapshotMetadata) {
    capabilities.push({ type: { case: "service", value: { type: ServiceType.SNAPSHOT_METADATA_SERVICE } } });
  }
  return capabilities;
}

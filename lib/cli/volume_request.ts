/** The volume and the machine that the options of attach and detach name. */
import type { GivenKeys } from "../auth_key.ts";
import type { ConnectionTuning } from "../host/nvme/connect_options.ts";
import type { Logger } from "../log.ts";
import { hostNqn, inBandAuthKey, nodeIdProblem, type TransportAddress } from "../namespace.ts";
import { Secrets } from "../secrets.ts";
import { parseVolumeId } from "../volume_id.ts";
import type { AttachRequest, LocalMachine } from "./attach_volume.ts";
import { createAttacher, openLightos, openPoseidon } from "./compose.ts";
import type { volumeOptions } from "./option_groups.ts";
import { type Settings, UsageError } from "./options.ts";
import { readSecretFile } from "./secret_file.ts";

/** What attach knows of the volume besides the options that it shares with detach. */
export interface VolumeDetails {
  /** Where the volume is, when the cluster is not asked. */
  readonly addresses?: readonly TransportAddress[];
  readonly discovery?: readonly TransportAddress[];
  readonly volumeContext?: Readonly<Record<string, string>> | undefined;
  readonly tuning?: ConnectionTuning;
  readonly keys?: GivenKeys;
}

/** The volume and the machine. Dispose it when the work is done: that closes the backend. */
export interface OpenedVolumeRequest extends AsyncDisposable {
  readonly machine: LocalMachine;
  readonly request: AttachRequest;
  /** How the volume is encrypted on its host, as its ID says; undefined: it is not, or the ID is not known. */
  readonly hostEncryption: string | undefined;
}

const noKeys: GivenKeys = { host: undefined, controller: undefined };

/** Opens what the options name. Throws UsageError for options that contradict each other or cannot be used. */
export async function openVolumeRequest(
  settings: Settings<typeof volumeOptions>,
  log: Logger,
  details: VolumeDetails = {},
): Promise<OpenedVolumeRequest> {
  const { volume, uuid, nqn, "node-id": nodeId } = settings;
  const problem = nodeIdProblem(nodeId);
  if (problem !== undefined) throw new UsageError(`--node-id "${nodeId}": ${problem}`);
  if (volume === undefined ? uuid === undefined || nqn === undefined : uuid !== undefined || nqn !== undefined) {
    throw new UsageError("either VOLUME_ID or both --uuid and --nqn are needed");
  }
  const { createLinuxHost } = await import("../host/linux_host.ts");
  const { KeyedLock } = await import("../lock.ts");
  const host = createLinuxHost({ log, sysfsRoot: settings.sysfs, devRoot: settings.dev });
  const attacher = await createAttacher(settings, { host, locks: new KeyedLock(), tuning: details.tuning ?? {} });
  const discoveryDirectory = settings.attach === "direct" ? settings["discovery-dir"] : undefined;
  const machine = { host, attacher, hostNqn: hostNqn(nodeId), discoveryDirectory };
  await using opened = new AsyncDisposableStack();
  const request = volume === undefined
    ? knownNamespace(uuid ?? "", nqn ?? "", details)
    : await clusterVolume(volume, settings, log, { details, opened });
  const hostEncryption = volume?.startsWith("mgmt:") ? parseVolumeId(volume).hostEncryption : undefined;
  const owned = opened.move();
  return { machine, request, hostEncryption, [Symbol.asyncDispose]: () => owned.disposeAsync() };
}

function knownNamespace(uuid: string, subsystemNqn: string, details: VolumeDetails): AttachRequest {
  const { addresses = [], discovery = [], keys = noKeys } = details;
  const kind = authenticationKind(keys);
  return {
    namespace: { uuid, subsystemNqn, addresses, discovery, ...(kind === undefined ? {} : { inBandAuth: kind }) },
    keys,
  };
}

async function clusterVolume(
  volumeId: string,
  settings: Settings<typeof volumeOptions>,
  log: Logger,
  { details, opened }: { readonly details: VolumeDetails; readonly opened: AsyncDisposableStack },
): Promise<AttachRequest> {
  const { volumeContext = {}, keys = noKeys } = details;
  const kind = authenticationKind(keys);
  const secrets = settings.secrets === undefined ? {} : readSecretFile(settings.secrets);
  const { "node-id": _node, ...others } = settings;
  return {
    // The volume ID says which storage system it belongs to.
    backend: opened.use(
      volumeId.startsWith("pos:") ? await openPoseidon(others, log) : await openLightos(settings, log),
    ),
    volumeId,
    volumeContext: kind === undefined ? volumeContext : { [inBandAuthKey]: kind, ...volumeContext },
    // Keys of the options win over those in the file of secrets, and have to pass the same checks.
    secrets: new Secrets({
      ...secrets,
      ...(keys.host === undefined ? {} : { "dhchap-key": keys.host.reveal() }),
      ...(keys.controller === undefined ? {} : { "dhchap-ctrl-key": keys.controller.reveal() }),
    }),
  };
}

/** The kind of authentication that these keys are for. */
function authenticationKind({ host, controller }: GivenKeys) {
  return host === undefined ? undefined : controller === undefined ? "unidirectional" : "bidirectional";
}

/**
 * Trusted hosts of LightOS: the keys that hosts authenticate their connections with (facts:
 * docs/reference/lightos-api.md section 15).
 *
 * With in-band authentication enabled, LightOS lets only those hosts connect that are trusted hosts with secrets, on
 * the whole cluster. A trusted host belongs to a project, has a name of its own, and names a host NQN. Ours has the
 * name of the node; one with another name for the same host NQN is used as it is.
 *
 * Existing keys stay, unless the call brings others. They are made once, and never removed: other volumes of the host
 * need them. SetTrustedHostSecret knows no ETag, so two processes that both find none could both make some, and the
 * last one counts. Within a process they wait for each other; a node reads the keys after its volume was granted, and
 * again whenever it is granted again.
 *
 * `authRequired` of a trusted host is not changed: which values LightOS takes is not documented.
 */
import {
  ClusterInfo_AuthenticationMode as Mode,
  DurosAPI,
  TargetSecretType,
  type TrustedHost,
} from "../../../proto/gen/lightos_pb.ts";
import { type AuthKind, DhchapKey, type DhchapKeys, type GivenKeys } from "../../auth_key.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode, messageOf } from "../../error.ts";
import type { KeyedLock } from "../../lock.ts";
import { nodeIdOf } from "../../namespace.ts";
import { parseVolumeId } from "../../volume_id.ts";
import type { Authentication } from "../backend.ts";
import { repeatElsewhere } from "./api_error.ts";
import type { Cluster } from "./cluster.ts";
import type { ClusterPool } from "./pool.ts";

/** A host in a project: trusted hosts are kept per project. */
export interface ProjectHost {
  readonly project: string;
  readonly hostNqn: string;
}

/** How a host is to authenticate its connections. */
export interface TrustRequest {
  readonly kind: AuthKind;
  /** The keys that the call brings. */
  readonly given: GivenKeys;
  /** Of this process: calls for one host wait for each other. */
  readonly locks: KeyedLock;
}

/** A trusted host as LightOS has it; a secret that was not set is empty. */
interface TrustedSecrets {
  readonly name: string;
  readonly hostSecret: string;
  readonly targetSecret: string;
}

/** The authentication part of the LightOS backend. */
export function lightosAuthentication(clusters: ClusterPool): Authentication {
  return {
    async keysOf(call, secrets, volumeId, { hostNqn, kind }) {
      const id = parseVolumeId(volumeId);
      const ctx = call.doing(`read the keys of ${nodeIdOf(hostNqn)} for volume ${id.uuid}`);
      const cluster = clusters.open(secrets, id.endpoints, id.scheme);
      return await readKeys(ctx, cluster, { project: id.project ?? "", hostNqn }, kind);
    },
  };
}

/**
 * Ensures that LightOS has the keys of a host: those that are given, else those that it has already, else new ones.
 *
 * @throws StatusError FAILED_PRECONDITION when in-band authentication is disabled on the cluster, which would let any
 *   host in without a key, or when the node's name is that of another host there
 */
export async function ensureTrusted(
  ctx: RequestContext,
  cluster: Cluster,
  host: ProjectHost,
  { kind, given, locks }: TrustRequest,
): Promise<void> {
  const { inBandAuthMode, UUID } = await cluster.info(ctx);
  if (inBandAuthMode === Mode.Disabled) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `in-band-auth is "${kind}", and in-band authentication is disabled on the LightOS cluster at ` +
        `${cluster.lastAddress}, it has to be enabled there first`,
    );
  }
  using _held = await locks.wait(`trusted host ${UUID} ${host.project} ${host.hostNqn}`, ctx.action, ctx.signal);
  const trusted = await findTrusted(ctx, cluster, host) ?? await createTrusted(ctx, cluster, host);
  const hostSecret = given.host?.reveal() ?? (trusted.hostSecret || DhchapKey.generate().reveal());
  // A key that another class of volumes has asked for stays, because all volumes of the host share its connections.
  const targetSecret = kind === "unidirectional"
    ? trusted.targetSecret
    : given.controller?.reveal() ?? (trusted.targetSecret || DhchapKey.generate().reveal());
  if (hostSecret === trusted.hostSecret && targetSecret === trusted.targetSecret) return;
  await repeatElsewhere(() =>
    cluster.call(ctx, DurosAPI.method.setTrustedHostSecret, {
      name: trusted.name,
      projectName: host.project,
      hostSecret,
      targetSecret,
      targetSecretType: targetSecret === "" ? TargetSecretType.Disabled : TargetSecretType.Enabled,
    })
  );
  ctx.log.info(trusted.hostSecret === "" ? "gave a host its keys" : "changed the keys of a host", {
    name: trusted.name,
    address: cluster.lastAddress,
  });
}

/**
 * The keys that LightOS has of a host: its target secret too when it has one, even if this kind does not need it.
 *
 * @throws StatusError FAILED_PRECONDITION when it has none of that kind, or something else than a key
 */
async function readKeys(
  ctx: RequestContext,
  cluster: Cluster,
  host: ProjectHost,
  kind: AuthKind,
): Promise<DhchapKeys> {
  const keyError = (problem: string) => ctx.error("FAILED_PRECONDITION", problem);
  const trusted = await findTrusted(ctx, cluster, host);
  const where = `LightOS at ${cluster.lastAddress}`;
  const advice = "delete the VolumeAttachment of this volume and node, so that they are made again";
  if (trusted === undefined) throw keyError(`${where} has no trusted host for ${nodeIdOf(host.hostNqn)}, ${advice}`);
  const parse = (what: string, text: string) => {
    if (text === "") throw keyError(`${where} has no ${what} of trusted host "${trusted.name}", ${advice}`);
    try {
      return DhchapKey.parse(text);
    } catch (error) {
      throw keyError(`the ${what} that ${where} has of trusted host "${trusted.name}" ${messageOf(error)}`);
    }
  };
  return {
    host: parse("host secret", trusted.hostSecret),
    controller: kind === "unidirectional" && trusted.targetSecret === ""
      ? undefined
      : parse("target secret", trusted.targetSecret),
  };
}

/** The trusted host of this host NQN; undefined: there is none. */
async function findTrusted(
  ctx: RequestContext,
  cluster: Cluster,
  { project, hostNqn }: ProjectHost,
): Promise<TrustedSecrets | undefined> {
  const name = nodeIdOf(hostNqn);
  const ours = await readSecrets(ctx, cluster, project, name);
  if (ours?.host?.hostNqn === hostNqn) return { ...ours, name };
  // Under another name, or without secrets, which is NOT_FOUND as well.
  const listed = await findListed(ctx, cluster, project, hostNqn);
  if (listed === undefined) {
    if (ours?.host === undefined) return undefined;
    throw ctx.error(
      "FAILED_PRECONDITION",
      `trusted host "${name}" of project "${project}" is for host NQN ${ours.host.hostNqn}, not for ` +
        `${hostNqn}, rename or correct it on LightOS first`,
    );
  }
  const { hostSecret = "", targetSecret = "" } = await readSecrets(ctx, cluster, project, listed.name) ?? {};
  return { name: listed.name, hostSecret, targetSecret };
}

async function readSecrets(ctx: RequestContext, cluster: Cluster, projectName: string, name: string) {
  try {
    return await cluster.call(ctx, DurosAPI.method.getTrustedHostSecret, { name, projectName });
  } catch (error) {
    if (hasCode(error, "NOT_FOUND")) return undefined;
    throw error;
  }
}

async function findListed(
  ctx: RequestContext,
  cluster: Cluster,
  projectName: string,
  hostNqn: string,
): Promise<TrustedHost | undefined> {
  for (let offsetUUID = "";;) {
    const page = await cluster.call(ctx, DurosAPI.method.listTrustedHosts, { projectName, offsetUUID });
    const found = page.hosts.find((host) => host.hostNqn === hostNqn);
    if (found !== undefined || page.nextOffset === "") return found;
    if (page.nextOffset === offsetUUID) {
      throw ctx.error(
        "UNAVAILABLE",
        `LightOS at ${cluster.lastAddress} answers the page behind ${offsetUUID} with itself`,
      );
    }
    offsetUUID = page.nextOffset;
  }
}

async function createTrusted(
  ctx: RequestContext,
  cluster: Cluster,
  host: ProjectHost,
): Promise<TrustedSecrets> {
  const { project, hostNqn } = host;
  const name = nodeIdOf(hostNqn);
  try {
    await repeatElsewhere(() =>
      cluster.call(ctx, DurosAPI.method.createTrustedHost, { name, projectName: project, hostNqn })
    );
  } catch (error) {
    if (!hasCode(error, "ALREADY_EXISTS")) throw error;
    // Another process was faster, or an attempt at another endpoint: it may have keys by now.
    const theirs = await findTrusted(ctx, cluster, host);
    if (theirs === undefined) throw error;
    return theirs;
  }
  return { name, hostSecret: "", targetSecret: "" };
}

/**
 * Trusted hosts of LightOS: the keys that hosts authenticate their connections with (facts: docs/reference/lightos-api.md section 15).
 *
 * With in-band authentication switched on, LightOS lets only those hosts connect that are trusted hosts with secrets, on
 * the whole cluster. A trusted host belongs to a project, has a name of its own, and names a host NQN. Ours is called like
 * the node; one that somebody made for the same host NQN under another name is used as it is.
 *
 * Keys that are there stay, unless the call brings others. They are made once, and never taken away: other volumes of the
 * host need them. SetTrustedHostSecret knows no ETag, so two processes that both find none could both make some, and the
 * last one counts. Within a process they wait for each other; a node reads the keys after its volume was granted, and
 * again whenever it is granted anew.
 *
 * `authRequired` of a trusted host is left alone: which values LightOS takes is not documented.
 */
import type { RequestContext } from "../../context.ts";
import { type AuthKind, DhchapKey, type DhchapKeys, type GivenKeys } from "../../auth_key.ts";
import { hasCode, messageOf, StatusError } from "../../error.ts";
import type { KeyedLock } from "../../lock.ts";
import { nodeIdOf } from "../../namespace.ts";
import {
  ClusterInfo_AuthenticationMode as Mode,
  DurosAPI,
  TargetSecretType,
  type TrustedHost,
} from "../../../proto/gen/lightos_pb.ts";
import { type Cluster, repeatElsewhere } from "./cluster.ts";

/** Which host is meant: trusted hosts are kept per project. */
export interface HostPlace {
  readonly project: string;
  readonly hostNqn: string;
}

/** A trusted host as LightOS has it; a secret that was not set is empty. */
interface Trusted {
  readonly name: string;
  readonly hostSecret: string;
  readonly targetSecret: string;
}

/**
 * Sees to it that LightOS knows the keys of a host: those that are given, else those that it has, else new ones.
 *
 * @throws StatusError FAILED_PRECONDITION when in-band authentication is switched off on the cluster, which would let any
 *   host in without a key, or when the node's name is that of another host there
 */
export async function ensureTrusted(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  { project, hostNqn }: HostPlace,
  kind: AuthKind,
  given: GivenKeys,
  locks: KeyedLock,
): Promise<void> {
  const { inBandAuthMode, UUID } = await cluster.info(ctx, action);
  if (inBandAuthMode === Mode.Disabled) {
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: in-band-auth is "${kind}", and in-band authentication is disabled on the LightOS cluster at ` +
        `${cluster.lastAddress}, it has to be enabled there first`,
    );
  }
  using _held = await locks.wait(`trusted host ${UUID} ${project} ${hostNqn}`, action, ctx.signal);
  const trusted = await look(ctx, cluster, action, project, hostNqn) ??
    await makeTrusted(ctx, cluster, action, project, hostNqn);
  const hostSecret = given.host?.reveal() ?? (trusted.hostSecret || DhchapKey.generate().reveal());
  // What another class of volumes has asked for stays, for all volumes of the host share its connections.
  const targetSecret = kind === "unidirectional"
    ? trusted.targetSecret
    : given.controller?.reveal() ?? (trusted.targetSecret || DhchapKey.generate().reveal());
  if (hostSecret === trusted.hostSecret && targetSecret === trusted.targetSecret) return;
  await repeatElsewhere(() =>
    cluster.call(ctx, action, DurosAPI.method.setTrustedHostSecret, {
      name: trusted.name,
      projectName: project,
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
 * The keys that LightOS has of a host: its target secret too when it has one, though this kind may not ask for it.
 *
 * @throws StatusError FAILED_PRECONDITION when it has none of that kind, or something else than a key
 */
export async function trustedKeys(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  { project, hostNqn }: HostPlace,
  kind: AuthKind,
): Promise<DhchapKeys> {
  const refuse = (problem: string) => new StatusError("FAILED_PRECONDITION", `Cannot ${action}: ${problem}`);
  const trusted = await look(ctx, cluster, action, project, hostNqn);
  const where = `LightOS at ${cluster.lastAddress}`;
  const anew = "delete the VolumeAttachment of this volume and node, so that they are made anew";
  if (trusted === undefined) throw refuse(`${where} has no trusted host for ${nodeIdOf(hostNqn)}, ${anew}`);
  const read = (what: string, text: string) => {
    if (text === "") throw refuse(`${where} has no ${what} of trusted host "${trusted.name}", ${anew}`);
    try {
      return DhchapKey.parse(text);
    } catch (error) {
      throw refuse(`the ${what} that ${where} has of trusted host "${trusted.name}" ${messageOf(error)}`);
    }
  };
  return {
    host: read("host secret", trusted.hostSecret),
    controller: kind === "unidirectional" && trusted.targetSecret === ""
      ? undefined
      : read("target secret", trusted.targetSecret),
  };
}

/** The trusted host of this host NQN; undefined: there is none. */
async function look(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  project: string,
  hostNqn: string,
): Promise<Trusted | undefined> {
  const name = nodeIdOf(hostNqn);
  const ours = await secretsOf(ctx, cluster, action, project, name);
  if (ours?.host?.hostNqn === hostNqn) return { ...ours, name };
  // Under another name, or without secrets, which is NOT_FOUND as well.
  const named = await findHost(ctx, cluster, action, project, hostNqn);
  if (named === undefined) {
    if (ours?.host === undefined) return undefined;
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: trusted host "${name}" of project "${project}" is for host NQN ${ours.host.hostNqn}, not for ` +
        `${hostNqn}, rename or correct it on LightOS first`,
    );
  }
  const { hostSecret = "", targetSecret = "" } = await secretsOf(ctx, cluster, action, project, named.name) ?? {};
  return { name: named.name, hostSecret, targetSecret };
}

async function secretsOf(ctx: RequestContext, cluster: Cluster, action: string, projectName: string, name: string) {
  try {
    return await cluster.call(ctx, action, DurosAPI.method.getTrustedHostSecret, { name, projectName });
  } catch (error) {
    if (hasCode(error, "NOT_FOUND")) return undefined;
    throw error;
  }
}

async function findHost(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  projectName: string,
  hostNqn: string,
): Promise<TrustedHost | undefined> {
  for (let offsetUUID = "";;) {
    const page = await cluster.call(ctx, action, DurosAPI.method.listTrustedHosts, { projectName, offsetUUID });
    const found = page.hosts.find((host) => host.hostNqn === hostNqn);
    if (found !== undefined || page.nextOffset === "") return found;
    if (page.nextOffset === offsetUUID) {
      throw new StatusError(
        "UNAVAILABLE",
        `Cannot ${action}: LightOS at ${cluster.lastAddress} answers the page behind ${offsetUUID} with itself`,
      );
    }
    offsetUUID = page.nextOffset;
  }
}

async function makeTrusted(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  projectName: string,
  hostNqn: string,
): Promise<Trusted> {
  const name = nodeIdOf(hostNqn);
  try {
    await repeatElsewhere(() =>
      cluster.call(ctx, action, DurosAPI.method.createTrustedHost, { name, projectName, hostNqn })
    );
  } catch (error) {
    if (!hasCode(error, "ALREADY_EXISTS")) throw error;
    // Another process was quicker, or an attempt at another endpoint: then it may have keys by now.
    const theirs = await look(ctx, cluster, action, projectName, hostNqn);
    if (theirs === undefined) throw error;
    return theirs;
  }
  return { name, hostSecret: "", targetSecret: "" };
}

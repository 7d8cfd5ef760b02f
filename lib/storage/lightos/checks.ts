/**
 * Checks of LightOS clusters through their management API, for `lbcsi doctor` (facts: docs/reference/lightos-api.md 6,
 * 15). They change nothing. Each endpoint is asked separately, because ordinary calls hide those that do not answer.
 */
import {
  type ClusterHealth,
  ClusterHealth_State as Health,
  ClusterInfo_AuthenticationMode as AuthenticationMode,
  type ClusterInfoV2,
  DurosAPI,
} from "../../../proto/gen/lightos_pb.ts";
import { type Check, reasonOf, runCheck, simulatorCheck } from "../../check.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode } from "../../error.ts";
import { shownCertificate, type Trust } from "../../grpc/tls.ts";
import { parseAddress, type TransportAddress } from "../../namespace.ts";
import type { Secrets } from "../../secrets.ts";
import { type Endpoint, formatEndpoints, type Scheme } from "../../volume_id.ts";
import type { SystemReport } from "../backend.ts";
import { withinTime } from "../polling.ts";
import { adviceFor } from "./advice.ts";
import { LightosError } from "./api_error.ts";
import type { Cluster, LightosOptions } from "./cluster.ts";
import { ClusterPool } from "./pool.ts";
import type { TokenFacts } from "./tokens.ts";

/** The cluster to check: where it answers. */
export interface CheckTarget {
  readonly endpoints: readonly Endpoint[];
  readonly scheme: Scheme;
}

/** The time for one question to one endpoint. */
const askMs = 8000;
const dayMs = 86_400_000;
/** How many days before their end a certificate and a token are reported. */
const certificateDays = 30;
const tokenDays = 7;

/** What `lightosReports` checks. */
export interface LightosChecks {
  /** Undefined: each cluster of the cluster file. */
  readonly target: CheckTarget | undefined;
  readonly secrets: Secrets;
  /** The host NQN to look for among the connected hosts; undefined: none. */
  readonly hostNqn: string | undefined;
}

/** Checks clusters. Problems of a cluster are in its report: none of them makes this throw. */
export async function lightosReports(
  call: RequestContext,
  options: LightosOptions,
  { target, secrets, hostNqn }: LightosChecks,
): Promise<readonly SystemReport[]> {
  const ctx = call.doing("look at the cluster");
  await using clusters = new ClusterPool(options);
  const targets: readonly (CheckTarget & { readonly name?: string })[] = target === undefined
    ? options.clusters?.all() ?? []
    : [target];
  return await Promise.all(
    targets.map(({ endpoints, scheme, name }) => {
      const known = name ?? options.clusters?.owning(endpoints)?.name ?? formatEndpoints(endpoints);
      return reportOf(ctx, clusters, { name: `cluster ${known}`, endpoints, scheme, secrets, hostNqn });
    }),
  );
}

/** One cluster to check. */
interface NamedTarget extends CheckTarget, Pick<LightosChecks, "secrets" | "hostNqn"> {
  readonly name: string;
}

async function reportOf(
  ctx: RequestContext,
  clusters: ClusterPool,
  { name, endpoints, scheme, secrets, hostNqn }: NamedTarget,
): Promise<SystemReport> {
  let each;
  try {
    each = clusters.openEach(secrets, endpoints, scheme);
  } catch (error) {
    const check = { name: "trust", verdict: "problem", found: reasonOf(error) } as const;
    return { name, addresses: [], discovery: [], connected: undefined, inBandAuth: undefined, checks: [check] };
  }
  const cluster = clusters.open(secrets, endpoints, scheme);
  const [atEndpoints, certificates] = await Promise.all([
    Promise.all(each.map(({ address, cluster, trust }) => checkEndpoint(ctx, address, cluster, trust))),
    Promise.all(each.map(({ address, trust }) => checkCertificate(ctx, address, trust))),
  ]);
  const isAnswering = atEndpoints.some(({ verdict }) => verdict !== "problem");
  const answer = isAnswering ? await askCluster(ctx, cluster, hostNqn) : undefined;
  return {
    name,
    addresses: answer?.addresses ?? [],
    discovery: answer?.discovery ?? [],
    hasDataPath: answer?.hasDataPath ?? true,
    connected: answer?.connected,
    inBandAuth: answer?.inBandAuth,
    checks: [
      // While another one answers, calls do not fail because of a dead endpoint.
      ...atEndpoints.map((check) =>
        check.verdict === "problem" && isAnswering ? { ...check, verdict: "warning" as const } : check
      ),
      // The check of the endpoint says already why there is no connection.
      ...certificates.flatMap((check, at) =>
        check === undefined || check.verdict === "not checked" && atEndpoints[at]?.verdict === "problem" ? [] : [check]
      ),
      checkToken(cluster.token, answer?.rejection),
      ...answer?.checks ?? [],
    ],
  };
}

async function checkEndpoint(
  ctx: RequestContext,
  address: string,
  cluster: Cluster,
  trust: Trust | undefined,
): Promise<Check> {
  const name = `endpoint ${address}`;
  const started = performance.now();
  try {
    await withinTime(ctx, askMs, (ctx) => cluster.call(ctx, DurosAPI.method.getVersion, {}));
  } catch (error) {
    // The token has a check of its own; a server that rejects one does answer.
    if (!hasCode(error, "UNAUTHENTICATED", "PERMISSION_DENIED")) {
      const [reason = reasonOf(error)] = error instanceof LightosError ? error.reasons : [];
      return { name, verdict: "problem", found: reason, advice: adviceFor(reason, trust) };
    }
  }
  const ms = Math.round(performance.now() - started);
  if (trust === undefined) {
    return {
      name,
      verdict: "warning",
      found: `answers after ${ms} ms, in clear text: anybody in between can read the token`,
      advice: "use grpcs",
    };
  }
  if (!trust.verify) {
    return {
      name,
      verdict: "warning",
      found: `answers after ${ms} ms, its certificate is NOT verified: anybody in between can read the token`,
      advice: "give the cluster's CA (mgmt-ca.crt, --mgmt-ca) and take mgmt-tls-verify: false away",
    };
  }
  const pinned = trust.pins === undefined ? "" : " and its pinned key";
  return { name, verdict: "ok", found: `answers after ${ms} ms, its certificate${pinned} verified` };
}

async function checkCertificate(
  ctx: RequestContext,
  address: string,
  trust: Trust | undefined,
): Promise<Check | undefined> {
  if (trust === undefined) return undefined;
  return await runCheck(`certificate of ${address}`, async () => {
    const shown = await withinTime(ctx, askMs, ({ signal }) => shownCertificate(address, trust, signal));
    const { subject, issuer, validFrom, validTo } = shown;
    const of = `${subject}, issued by ${issuer}`;
    const now = Date.now();
    if (validFrom.getTime() > now) {
      return {
        verdict: "problem",
        found: `${of}, is valid only from ${validFrom.toISOString()} on, and it is ${new Date(now).toISOString()} here`,
        advice: "set this machine's clock, or renew the certificate",
      };
    }
    if (validTo.getTime() < now) {
      return { verdict: "problem", found: `${of}, expired ${validTo.toISOString()}`, advice: "renew it" };
    }
    const days = Math.floor((validTo.getTime() - now) / dayMs);
    const found = `${of}, valid until ${validTo.toISOString()} (${days} days)`;
    return days < certificateDays ? { verdict: "warning", found, advice: "renew it" } : { verdict: "ok", found };
  });
}

/**
 * Checks the token of a call.
 *
 * @param rejection the cluster's own words; empty: it accepted the token; undefined: it was not asked
 */
function checkToken(token: TokenFacts, rejection: string | undefined): Check {
  const name = "token";
  const { source, kind, expires, begins } = token;
  const now = Date.now();
  const advice = "renew the Secret or the file of the token";
  if (kind === "none") {
    const found = source;
    if (rejection === "") return { name, verdict: "ok", found: `${found}; the cluster asks for none` };
    return { name, verdict: "problem", found, advice: "give --jwt-path, --secrets, or jwt in the cluster file" };
  }
  if (expires !== undefined && expires.getTime() < now) {
    return { name, verdict: "problem", found: `${source}: expired ${expires.toISOString()}`, advice };
  }
  if (begins !== undefined && begins.getTime() > now) {
    return {
      name,
      verdict: "problem",
      found: `${source}: counts from ${begins.toISOString()} on, and it is ${new Date(now).toISOString()} here`,
      advice: "set this machine's clock: others take a token of the future for a forged one",
    };
  }
  const until = expires === undefined ? "" : `, valid until ${expires.toISOString()}`;
  if (rejection === undefined) {
    const what = kind === "other"
      ? "no JSON Web Token"
      : `not shown to the cluster, because no endpoint answers${until}`;
    return { name, verdict: "not checked", found: `${source}: ${what}` };
  }
  if (rejection !== "") {
    const what = kind === "other" ? ", which is no JSON Web Token" : "";
    return { name, verdict: "problem", found: `${source}${what}: ${rejection}`, advice };
  }
  if (expires !== undefined && expires.getTime() - now < tokenDays * dayMs) {
    return { name, verdict: "warning", found: `${source}: accepted${until}`, advice };
  }
  return { name, verdict: "ok", found: `${source}: accepted${until}` };
}

/** What a cluster answers, and what the answers mean. */
interface ClusterAnswer {
  readonly checks: readonly Check[];
  /** Why the cluster rejected the token; empty: it accepted it. */
  readonly rejection: string | undefined;
  readonly addresses: readonly TransportAddress[];
  readonly discovery: readonly TransportAddress[];
  readonly hasDataPath: boolean;
  readonly connected: SystemReport["connected"];
  readonly inBandAuth: boolean | undefined;
}

async function askCluster(ctx: RequestContext, cluster: Cluster, hostNqn: string | undefined): Promise<ClusterAnswer> {
  let info: ClusterInfoV2;
  try {
    info = await withinTime(ctx, askMs, (ctx) => cluster.info(ctx));
  } catch (error) {
    const isRejected = hasCode(error, "UNAUTHENTICATED", "PERMISSION_DENIED");
    // The check of the token says where the token came from.
    const rejection = isRejected ? reasonOf(error).replace(/; JWT: .*$/s, "") : undefined;
    const check: Check = {
      name: "cluster",
      verdict: isRejected ? "not checked" : "problem",
      found: isRejected ? "the token was refused" : reasonOf(error),
    };
    const nothing = { addresses: [], discovery: [], hasDataPath: true, connected: undefined, inBandAuth: undefined };
    return { checks: [check], rejection, ...nothing };
  }
  const toAddresses = (endpoints: readonly string[]) =>
    [...new Set(endpoints)].sort().map(parseAddress).filter((address) => address !== undefined);
  const simulator = simulatorCheck(info.ETag);
  const addresses = toAddresses(info.nvmeEndpoints);
  const discovery = toAddresses(info.discoveryEndpoints);
  const [health, host] = await Promise.all([
    runCheck("cluster health", async () => {
      try {
        const { health } = await withinTime(ctx, askMs, (ctx) => cluster.call(ctx, DurosAPI.method.getCluster, {}));
        return checkHealth(health);
      } catch (error) {
        if (!hasCode(error, "UNAUTHENTICATED", "PERMISSION_DENIED")) throw error;
        return { verdict: "not checked", found: "the token has no right to the cluster as a whole" };
      }
    }),
    findHost(ctx, cluster, hostNqn),
  ]);
  const inBandAuth = { [AuthenticationMode.Enabled]: true, [AuthenticationMode.Disabled]: false }[
    info.inBandAuthMode as AuthenticationMode.Enabled | AuthenticationMode.Disabled
  ];
  return {
    rejection: "",
    addresses,
    discovery,
    hasDataPath: simulator?.hasDataPath ?? true,
    connected: host.connected,
    inBandAuth,
    checks: [
      ...(simulator === undefined ? [] : [simulator.check]),
      {
        name: "cluster",
        verdict: addresses.length === 0 && discovery.length === 0 ? "problem" : "ok",
        found:
          `"${info.clusterName}" ${info.UUID}, ${info.subsystemNQN}, up to ${info.supportedMaxReplicas} replicas, ` +
          `${addresses.length} data and ${discovery.length} discovery addresses`,
      },
      health,
      {
        name: "in-band authentication",
        verdict: "ok",
        found: inBandAuth === undefined ? "the cluster does not say" : inBandAuth ? "on" : "off",
      },
      ...host.checks,
    ],
  };
}

function checkHealth(health: ClusterHealth | undefined): Omit<Check, "name"> {
  if (health === undefined || health.state === Health.None) {
    return { verdict: "not checked", found: "the cluster does not say" };
  }
  const { numDegradedVolumes, numReadOnlyVolumes, numNotAvailableVolumes, numInactiveNodes } = health;
  const counts = [
    [numInactiveNodes, "inactive nodes"],
    [numDegradedVolumes, "degraded volumes"],
    [numReadOnlyVolumes, "read-only volumes"],
    [numNotAvailableVolumes, "volumes not available"],
  ] as const;
  const conditions = counts.filter(([count]) => count > 0).map(([count, what]) => `${count} ${what}`);
  const found = [Health[health.state] ?? `state ${health.state}`, ...conditions].join(", ");
  if (health.state === Health.OK) return { verdict: "ok", found };
  return { verdict: health.state === Health.Error ? "problem" : "warning", found, advice: "look at the cluster" };
}

/** No check of its own when a host is connected: whether that is this machine is checked on the machine. */
async function findHost(ctx: RequestContext, cluster: Cluster, hostNQN: string | undefined): Promise<{
  readonly checks: readonly Check[];
  readonly connected: SystemReport["connected"];
}> {
  if (hostNQN === undefined) return { checks: [], connected: undefined };
  const name = "connected as this node";
  try {
    const { iPAddress, hostname } = await withinTime(
      ctx,
      askMs,
      (ctx) => cluster.call(ctx, DurosAPI.method.getHost, { hostNQN }),
    );
    return { checks: [], connected: { address: iPAddress, hostname } };
  } catch (error) {
    const check: Check = hasCode(error, "NOT_FOUND")
      ? { name, verdict: "ok", found: `nobody is connected as ${hostNQN}` }
      : { name, verdict: "not checked", found: reasonOf(error) };
    return { checks: [check], connected: undefined };
  }
}

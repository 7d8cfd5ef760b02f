/**
 * A look at LightOS clusters through their management API, for `lbcsi doctor` (facts: docs/reference/lightos-api.md 6, 15). It asks and
 * changes nothing. Each endpoint is asked by itself, for ordinary calls hide those that do not answer.
 */
import {
  type ClusterHealth,
  ClusterHealth_State as Health,
  ClusterInfo_AuthenticationMode as AuthenticationMode,
  type ClusterInfoV2,
  DurosAPI,
} from "../../../proto/gen/lightos_pb.ts";
import { type Check, reasonOf, runCheck, simulatorCheck } from "../../check.ts";
import { type RequestContext, requestContext, type Secrets, timeLimit } from "../../context.ts";
import { hasCode } from "../../error.ts";
import { shownCertificate, type Trust } from "../../grpc/tls.ts";
import { parseAddress, type TransportAddress } from "../../namespace.ts";
import { type Endpoint, formatEndpoints, type Scheme } from "../../volume_id.ts";
import type { SystemReport } from "../backend.ts";
import { adviceFor } from "./advice.ts";
import { type Cluster, ClusterPool, LightosError, type LightosOptions, type TokenFacts } from "./cluster.ts";

/** Where the cluster answers that is to be looked at. */
export interface CheckupTarget {
  readonly endpoints: readonly Endpoint[];
  readonly scheme: Scheme;
}

/** For one question to one endpoint. */
const askMs = 8000;
const dayMs = 86_400_000;
/** Before a certificate or a token ends, somebody has to be told in time. */
const certificateDays = 30;
const tokenDays = 7;

/**
 * Looks at the cluster of `target`, or else at each one of the cluster file. Throws nothing that a cluster can be blamed
 * for: that is in the reports.
 *
 * @param hostNqn who is connected under this name; undefined: not asked
 */
export async function lightosReports(
  ctx: RequestContext,
  options: LightosOptions,
  target: CheckupTarget | undefined,
  secrets: Secrets,
  hostNqn: string | undefined,
): Promise<readonly SystemReport[]> {
  await using clusters = new ClusterPool(options);
  const targets: readonly (CheckupTarget & { readonly name?: string })[] = target === undefined
    ? options.clusters?.all() ?? []
    : [target];
  return await Promise.all(
    targets.map(async ({ endpoints, scheme, name }) => {
      const known = name ?? options.clusters?.owning(endpoints)?.name ?? formatEndpoints(endpoints);
      const report = { name: `cluster ${known}`, addresses: [], discovery: [], connected: undefined };
      let each;
      try {
        each = clusters.openEach(secrets, endpoints, scheme);
      } catch (error) {
        const check = { name: "trust", verdict: "problem", found: reasonOf(error) } as const;
        return { ...report, inBandAuth: undefined, checks: [check] };
      }
      const cluster = clusters.open(secrets, endpoints, scheme);
      const [atEndpoints, certificates] = await Promise.all([
        Promise.all(each.map(({ address, cluster, trust }) => endpointCheck(ctx, address, cluster, trust))),
        Promise.all(each.map(({ address, trust }) => certificateCheck(ctx, address, trust))),
      ]);
      const isAnswering = atEndpoints.some(({ verdict }) => verdict !== "problem");
      const told = isAnswering ? await askCluster(ctx, cluster, hostNqn) : undefined;
      return {
        ...report,
        addresses: told?.addresses ?? [],
        discovery: told?.discovery ?? [],
        hasDataPath: told?.hasDataPath ?? true,
        connected: told?.connected,
        inBandAuth: told?.inBandAuth,
        checks: [
          // With another one that answers, a dead endpoint costs nobody a call.
          ...atEndpoints.map((check) =>
            check.verdict === "problem" && isAnswering ? { ...check, verdict: "warning" as const } : check
          ),
          // Why there is no connection has been said.
          ...certificates.flatMap((check, at) =>
            check === undefined || check.verdict === "not checked" && atEndpoints[at]?.verdict === "problem"
              ? []
              : [check]
          ),
          tokenCheck(cluster.token, told?.refusal),
          ...told?.checks ?? [],
        ],
      };
    }),
  );
}

async function within<T>(ctx: RequestContext, work: (ctx: RequestContext) => Promise<T>): Promise<T> {
  using limit = timeLimit(ctx.signal, askMs);
  const deadline = new Date(Math.min(Date.now() + askMs, ctx.deadline.getTime()));
  return await work(requestContext(limit.signal, deadline, ctx.log, ctx.action));
}

const action = "look at the cluster";

async function endpointCheck(
  ctx: RequestContext,
  address: string,
  cluster: Cluster,
  trust: Trust | undefined,
): Promise<Check> {
  const name = `endpoint ${address}`;
  const started = performance.now();
  try {
    await within(ctx, (ctx) => cluster.call(ctx, action, DurosAPI.method.getVersion, {}));
  } catch (error) {
    // The token is another check's affair; who refuses one answers.
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
      found: `answers after ${ms} ms, in clear text: whoever is in between can read the token`,
      advice: "use grpcs",
    };
  }
  if (!trust.verify) {
    return {
      name,
      verdict: "warning",
      found: `answers after ${ms} ms, its certificate is NOT verified: whoever is in between can read the token`,
      advice: "give the cluster's CA (mgmt-ca.crt, --mgmt-ca) and take mgmt-tls-verify: false away",
    };
  }
  const pinned = trust.pins === undefined ? "" : " and its pinned key";
  return { name, verdict: "ok", found: `answers after ${ms} ms, its certificate${pinned} verified` };
}

async function certificateCheck(
  ctx: RequestContext,
  address: string,
  trust: Trust | undefined,
): Promise<Check | undefined> {
  if (trust === undefined) return undefined;
  return await runCheck(`certificate of ${address}`, async () => {
    const shown = await within(ctx, ({ signal }) => shownCertificate(address, trust, signal));
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

/** @param refusal the cluster's own words, if it did not accept the token; undefined: it was not asked */
function tokenCheck(token: TokenFacts, refusal: string | undefined): Check {
  const name = "token";
  const { source, kind, expires, begins } = token;
  const now = Date.now();
  const advice = "renew the Secret or the file of the token";
  if (kind === "none") {
    const found = source;
    if (refusal === "") return { name, verdict: "ok", found: `${found}; the cluster asks for none` };
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
  if (refusal === undefined) {
    const what = kind === "other" ? "no JSON Web Token" : `not shown to the cluster, for none answers${until}`;
    return { name, verdict: "not checked", found: `${source}: ${what}` };
  }
  if (refusal !== "") {
    const what = kind === "other" ? ", which is no JSON Web Token" : "";
    return { name, verdict: "problem", found: `${source}${what}: ${refusal}`, advice };
  }
  if (expires !== undefined && expires.getTime() - now < tokenDays * dayMs) {
    return { name, verdict: "warning", found: `${source}: accepted${until}`, advice };
  }
  return { name, verdict: "ok", found: `${source}: accepted${until}` };
}

interface Told {
  readonly checks: readonly Check[];
  /** Empty: the cluster accepted the token. */
  readonly refusal: string | undefined;
  readonly addresses: readonly TransportAddress[];
  readonly discovery: readonly TransportAddress[];
  readonly hasDataPath: boolean;
  readonly connected: SystemReport["connected"];
  readonly inBandAuth: boolean | undefined;
}

async function askCluster(ctx: RequestContext, cluster: Cluster, hostNqn: string | undefined): Promise<Told> {
  let info: ClusterInfoV2;
  try {
    info = await within(ctx, (ctx) => cluster.info(ctx, action));
  } catch (error) {
    const isRefused = hasCode(error, "UNAUTHENTICATED", "PERMISSION_DENIED");
    // The check of the token says where it came from.
    const refusal = isRefused ? reasonOf(error).replace(/; JWT: .*$/s, "") : undefined;
    const check: Check = {
      name: "cluster",
      verdict: isRefused ? "not checked" : "problem",
      found: isRefused ? "the token was refused" : reasonOf(error),
    };
    const nothing = { addresses: [], discovery: [], hasDataPath: true, connected: undefined, inBandAuth: undefined };
    return { checks: [check], refusal, ...nothing };
  }
  const toAddresses = (texts: readonly string[]) =>
    [...new Set(texts)].sort().map(parseAddress).filter((address) => address !== undefined);
  const simulator = simulatorCheck(info.ETag);
  const addresses = toAddresses(info.nvmeEndpoints);
  const discovery = toAddresses(info.discoveryEndpoints);
  const [health, host] = await Promise.all([
    runCheck("cluster health", async () => {
      try {
        const { health } = await within(ctx, (ctx) => cluster.call(ctx, action, DurosAPI.method.getCluster, {}));
        return healthOf(health);
      } catch (error) {
        if (!hasCode(error, "UNAUTHENTICATED", "PERMISSION_DENIED")) throw error;
        return { verdict: "not checked", found: "the token has no right to the cluster as a whole" };
      }
    }),
    askForHost(ctx, cluster, hostNqn),
  ]);
  const inBandAuth = { [AuthenticationMode.Enabled]: true, [AuthenticationMode.Disabled]: false }[
    info.inBandAuthMode as AuthenticationMode.Enabled | AuthenticationMode.Disabled
  ];
  return {
    refusal: "",
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
        found: inBandAuth === undefined ? "the cluster does not tell" : inBandAuth ? "on" : "off",
      },
      ...host.checks,
    ],
  };
}

function healthOf(health: ClusterHealth | undefined): Omit<Check, "name"> {
  if (health === undefined || health.state === Health.None) {
    return { verdict: "not checked", found: "the cluster does not tell" };
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

/** Says nothing by itself when somebody is connected: whether that is this machine is for the machine's side to tell. */
async function askForHost(ctx: RequestContext, cluster: Cluster, hostNQN: string | undefined): Promise<{
  readonly checks: readonly Check[];
  readonly connected: SystemReport["connected"];
}> {
  if (hostNQN === undefined) return { checks: [], connected: undefined };
  const name = "connected as this node";
  try {
    const { iPAddress, hostname } = await within(
      ctx,
      (ctx) => cluster.call(ctx, action, DurosAPI.method.getHost, { hostNQN }),
    );
    return { checks: [], connected: { address: iPAddress, hostname } };
  } catch (error) {
    const check: Check = hasCode(error, "NOT_FOUND")
      ? { name, verdict: "ok", found: `nobody is connected as ${hostNQN}` }
      : { name, verdict: "not checked", found: reasonOf(error) };
    return { checks: [check], connected: undefined };
  }
}

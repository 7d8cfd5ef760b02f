/**
 * Checks of PoseidonOS through DAgent, for `lbcsi doctor` (facts: docs/reference/poseidonos-api.md 5, 6, 11). They
 * change nothing, and do not use `GET /system`, which answers from a cache and starts 14 programs on the storage
 * server.
 */
import { type Check, reasonOf, runCheck, simulatorCheck } from "../../check.ts";
import type { RequestContext } from "../../context.ts";
import { formatAddress, parseAddress } from "../../namespace.ts";
import { type Endpoint, formatEndpoint } from "../../volume_id.ts";
import type { SystemReport } from "../backend.ts";
import { withinTime } from "../polling.ts";
import type { KnownSystems } from "./cluster_file.ts";
import { type Dagent, Dagents } from "./dagent.ts";
import { arrayCondition, hasTcpTransport, mostVolumes, readSubsystems, readVolumes } from "./inventory.ts";

/** The time for one question: DAgent answers one at a time, and five seconds late when PoseidonOS is down. */
const askMs = 10_000;
/** An array that has room for fewer volumes than this is reported as almost full. */
const fewVolumes = 16;

/** Checks the system behind `endpoint`, or else each one of the file. Problems of a system are in its report. */
export async function poseidonReports(
  call: RequestContext,
  systems: KnownSystems | undefined,
  endpoint: Endpoint | undefined,
): Promise<readonly SystemReport[]> {
  const ctx = call.doing("look at the system");
  await using dagents = new Dagents();
  const known = endpoint === undefined ? undefined : systems?.owning(endpoint);
  const targets = endpoint === undefined
    ? systems?.all() ?? []
    : [known ?? { name: formatEndpoint(endpoint), endpoint, arrays: [] }];
  return await Promise.all(
    targets.map(({ name, endpoint, arrays }) => reportOf(ctx, dagents.at(endpoint), name, arrays)),
  );
}

async function reportOf(
  ctx: RequestContext,
  dagent: Dagent,
  name: string,
  arrays: readonly string[],
): Promise<SystemReport> {
  const report = { name: `system ${name}`, discovery: [], connected: undefined, inBandAuth: false };
  const started = performance.now();
  let subsystems;
  try {
    subsystems = await withinTime(ctx, askMs, (ctx) => readSubsystems(ctx, dagent));
  } catch (error) {
    const check: Check = {
      name: `DAgent ${dagent.address}`,
      verdict: "problem",
      found: reasonOf(error),
      advice: "is DAgent running, is its port open to the controller?",
    };
    return { ...report, addresses: [], checks: [check] };
  }
  const ms = Math.round(performance.now() - started);
  const checks: Check[] = [{
    name: `DAgent ${dagent.address}`,
    verdict: "ok",
    found: `answers after ${ms} ms, ${dagent.version === "" ? "of unknown version" : `PoseidonOS ${dagent.version}`}`,
  }, {
    name: "management API",
    verdict: "warning",
    found: "plain HTTP without credentials: everybody who can connect to the port may do everything",
    advice: "keep its port reachable from the controller alone",
  }];
  const simulator = simulatorCheck(dagent.version);
  if (simulator !== undefined) checks.push(simulator.check);
  checks.push(
    await runCheck(
      "TCP transport",
      async () =>
        await withinTime(ctx, askMs, (ctx) => hasTcpTransport(ctx, dagent))
          ? { verdict: "ok", found: "there" }
          : { verdict: "problem", found: "missing", advice: "make one on PoseidonOS: nodes connect over TCP" },
    ),
  );
  for (const array of arrays) checks.push(await runCheck(`array ${array}`, () => checkArray(ctx, dagent, array)));
  // Where volumes are exported now; without any, nothing shows the address that a StorageClass will name.
  const listening = subsystems.flatMap(({ listenAddresses }) => listenAddresses)
    .filter(({ transportType }) => transportType.toUpperCase() === "TCP")
    .map(({ targetAddress, transportServiceId }) =>
      parseAddress(formatAddress({ traddr: targetAddress, trsvcid: transportServiceId }))
    ).filter((address) => address !== undefined);
  const addresses = [...new Map(listening.map((address) => [formatAddress(address), address])).values()];
  return { ...report, addresses, hasDataPath: simulator?.hasDataPath ?? true, checks };
}

async function checkArray(ctx: RequestContext, dagent: Dagent, name: string): Promise<Omit<Check, "name">> {
  let seen;
  try {
    seen = await withinTime(ctx, askMs, (ctx) => readVolumes(ctx, dagent, name));
  } catch (error) {
    return { verdict: "problem", found: reasonOf(error) };
  }
  const { array, volumes } = seen;
  const free = array.capacity > array.used ? array.capacity - array.used : 0n;
  const found = `${volumes.length} of ${mostVolumes} volumes, ${free} bytes left`;
  const condition = arrayCondition(array);
  if (condition !== undefined) {
    return { verdict: condition.usable ? "warning" : "problem", found: `${condition.message}; ${found}` };
  }
  const isFull = volumes.length >= mostVolumes || free === 0n;
  if (!isFull && volumes.length <= mostVolumes - fewVolumes) return { verdict: "ok", found };
  return { verdict: "warning", found, advice: "delete volumes, or use another array" };
}

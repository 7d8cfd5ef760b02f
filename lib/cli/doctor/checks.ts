/**
 * `lbcsi doctor`: what is wrong with this machine, and with its storage, before the first pod finds out.
 *
 * It only reads. Nothing on the machine or the cluster is changed, no subsystem is connected, no volume is touched. What
 * does not answer costs a bounded time, and fails its own check only.
 */
import { timeLimit } from "../../timing.ts";
import { type Check, formatList } from "../../check.ts";
import type { RequestContext } from "../../context.ts";
import { connectProblem, ownNames } from "../../host/tcp_probe.ts";
import { formatAddress, hostNqn, type TransportAddress } from "../../namespace.ts";
import type { SystemReport } from "../../storage/backend.ts";
import { type MachineCheckOptions, runMachineChecks } from "./machine.ts";

/** The checks of the machine, or of one storage system. */
export interface Section {
  /** `machine`, or `cluster rack1`. */
  readonly of: string;
  readonly checks: readonly Check[];
}

/**
 * Runs all checks. A check that fails is part of the result; only the abort of `ctx.signal` is thrown.
 *
 * @param machine undefined: this machine is not checked, and is not a node
 * @param reports what the storage systems report of themselves; they are awaited while the machine is checked
 */
export async function runChecks(
  ctx: RequestContext,
  machine: MachineCheckOptions | undefined,
  reports: Promise<readonly SystemReport[]>,
): Promise<readonly Section[]> {
  const [checks, systems] = await Promise.all([
    machine === undefined ? undefined : runMachineChecks(ctx, machine),
    reports,
  ]);
  const sections = checks === undefined ? [] : [{ of: "machine", checks }];
  const ofSystems = systems.map(async (report) => ({
    of: report.name,
    checks: [
      ...report.checks,
      ...machine === undefined ? [] : await combinedChecks(ctx, machine, report, checks ?? []),
    ],
  }));
  return [...sections, ...await Promise.all(ofSystems)];
}

/** The checks that need the results of both the machine and the cluster. */
async function combinedChecks(
  ctx: RequestContext,
  machine: MachineCheckOptions,
  report: SystemReport,
  ofMachine: readonly Check[],
): Promise<readonly Check[]> {
  const { attach, nodeId } = machine;
  const hasDataPath = report.hasDataPath ?? true;
  return [
    ...hasDataPath ? await checkAddresses(ctx, "data addresses", report.addresses) : [],
    ...hasDataPath && attach === "discovery-client"
      ? await checkAddresses(ctx, "discovery addresses", report.discovery)
      : [],
    ...report.connected === undefined || nodeId === undefined ? [] : [checkConnectedHost(nodeId, report.connected)],
    ...report.inBandAuth === true ? [checkAuthentication(ofMachine)] : [],
  ];
}

/** All addresses are tried at the same time. */
const connectMs = 3000;

async function checkAddresses(
  ctx: RequestContext,
  name: string,
  addresses: readonly TransportAddress[],
): Promise<readonly Check[]> {
  if (addresses.length === 0) return [];
  using limit = timeLimit(ctx.signal, connectMs);
  const results = await Promise.all(addresses.map(async (address) => ({
    text: formatAddress(address),
    problem: await connectProblem(address, limit.signal),
  })));
  const answering = results.filter(({ problem }) => problem === undefined);
  const failed = results.flatMap(({ text, problem }) => problem === undefined ? [] : [`${text}: ${problem}`]);
  if (failed.length === 0) {
    return [{
      name,
      verdict: "ok",
      found: `${formatList(answering.map(({ text }) => text))} reached`,
    }];
  }
  return [{
    name,
    verdict: answering.length === 0 ? "problem" : "warning",
    found: `${answering.length} of ${results.length} reached; ${formatList(failed, "; ")}`,
    advice: "let this machine connect to each server's data address (firewall, routes)",
  }];
}

/** Machines that were cloned with their names look the same to the cluster, so each has access to the other's volumes. */
function checkConnectedHost(nodeId: string, { address, hostname }: NonNullable<SystemReport["connected"]>): Check {
  const name = "connected as this node";
  const own = ownNames();
  const who = `${address === "" ? "an unknown address" : address}${hostname === "" ? "" : ` (${hostname})`}`;
  if (address === "") return { name, verdict: "not checked", found: `the cluster shows ${who}` };
  if (own.addresses.has(address)) return { name, verdict: "ok", found: `this machine, from ${who}` };
  return {
    name,
    verdict: "problem",
    found: `another machine is connected as ${hostNqn(nodeId)}: ${who} is not one of this machine's addresses`,
    advice:
      "give each machine a node ID of its own: this one has access to the other's volumes; it can be this machine only " +
      "where addresses are translated on the way",
  };
}

function checkAuthentication(ofMachine: readonly Check[]): Check {
  const name = "authentication of this node";
  const machine = ofMachine.find(({ name }) => name === "in-band authentication");
  if (machine?.verdict === "ok") {
    return { name, verdict: "ok", found: "the cluster demands it, and this machine supports it" };
  }
  if (machine?.verdict !== "warning") {
    return { name, verdict: "not checked", found: `the cluster demands it; this machine: ${machine?.found}` };
  }
  return {
    name,
    verdict: "problem",
    found: `the cluster demands DH-HMAC-CHAP, and ${machine.found}`,
    advice: "use a kernel that supports it",
  };
}

/**
 * `lbcsi doctor`: what is wrong with this machine, and with the storage that it is to use, before the first pod finds out.
 *
 * It only looks. Nothing on the machine or the cluster is changed, no subsystem is connected, no volume is touched, and a
 * thing that does not answer costs a bounded time and makes its own check fail, and no other.
 */
import { type Check, shortList, type Verdict } from "../../check.ts";
import { type RequestContext, timeLimit } from "../../context.ts";
import { connectProblem, ownNames } from "../../host/tcp_probe.ts";
import { formatAddress, hostNqn, type TransportAddress } from "../../namespace.ts";
import type { SystemReport } from "../../storage/backend.ts";
import { machineChecks, type MachineOptions } from "./machine.ts";
import { columns } from "../table.ts";

/** Checks of one thing. */
export interface Section {
  /** `machine`, or `cluster rack1`. */
  readonly of: string;
  readonly checks: readonly Check[];
}

/**
 * Everything that is to be looked at.
 *
 * @param machine undefined: this machine is not to be looked at, and is no node
 * @param reports what storage systems said of themselves, while the machine is looked at
 */
export async function runChecks(
  ctx: RequestContext,
  machine: MachineOptions | undefined,
  reports: Promise<readonly SystemReport[]>,
): Promise<readonly Section[]> {
  const [checks, systems] = await Promise.all([
    machine === undefined ? undefined : machineChecks(ctx, machine),
    reports,
  ]);
  const sections = checks === undefined ? [] : [{ of: "machine", checks }];
  const ofSystems = systems.map(async (report) => ({
    of: report.name,
    checks: [...report.checks, ...machine === undefined ? [] : await betweenThem(ctx, machine, report, checks ?? [])],
  }));
  return [...sections, ...await Promise.all(ofSystems)];
}

/** What only the machine and the cluster together tell. */
async function betweenThem(
  ctx: RequestContext,
  machine: MachineOptions,
  report: SystemReport,
  ofMachine: readonly Check[],
): Promise<readonly Check[]> {
  const { attach, nodeId } = machine;
  const isTried = report.hasDataPath ?? true;
  return [
    ...isTried ? await addressCheck(ctx, "data addresses", report.addresses) : [],
    ...isTried && attach === "discovery-client" ? await addressCheck(ctx, "discovery addresses", report.discovery) : [],
    ...report.connected === undefined || nodeId === undefined ? [] : [sameMachine(nodeId, report.connected)],
    ...report.inBandAuth === true ? [authenticationCheck(ofMachine)] : [],
  ];
}

const connectMs = 3000;

async function addressCheck(
  ctx: RequestContext,
  name: string,
  addresses: readonly TransportAddress[],
): Promise<readonly Check[]> {
  if (addresses.length === 0) return [];
  using limit = timeLimit(ctx.signal, connectMs);
  const tried = await Promise.all(addresses.map(async (address) => ({
    text: formatAddress(address),
    problem: await connectProblem(address, limit.signal),
  })));
  const reached = tried.filter(({ problem }) => problem === undefined);
  const failed = tried.flatMap(({ text, problem }) => problem === undefined ? [] : [`${text}: ${problem}`]);
  if (failed.length === 0) {
    return [{
      name,
      verdict: "ok",
      found: `${shortList(reached.map(({ text }) => text))} reached`,
    }];
  }
  return [{
    name,
    verdict: reached.length === 0 ? "problem" : "warning",
    found: `${reached.length} of ${tried.length} reached; ${shortList(failed, "; ")}`,
    advice: "let this machine through to each server's data address (firewall, routes)",
  }];
}

/** Machines that were cloned with their names look the same to the cluster, and each is let into the other's volumes. */
function sameMachine(nodeId: string, { address, hostname }: NonNullable<SystemReport["connected"]>): Check {
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
      "give each machine a node ID of its own, for this one is let into the other's volumes; only where addresses " +
      "are translated on the way can it be this machine",
  };
}

function authenticationCheck(ofMachine: readonly Check[]): Check {
  const name = "authentication of this node";
  const machine = ofMachine.find(({ name }) => name === "in-band authentication");
  if (machine?.verdict === "ok") return { name, verdict: "ok", found: "the cluster demands it, and this machine can" };
  if (machine?.verdict !== "warning") {
    return { name, verdict: "not checked", found: `the cluster demands it; of this machine: ${machine?.found}` };
  }
  return {
    name,
    verdict: "problem",
    found: `the cluster demands DH-HMAC-CHAP, and ${machine.found}`,
    advice: "use a kernel that can",
  };
}

// ------------------------------------------------------------------------------------------------------------ showing

/** How many checks came to what. */
export function tally(sections: readonly Section[]): Readonly<Record<Verdict, number>> {
  const counts = { "problem": 0, "warning": 0, "ok": 0, "not checked": 0 };
  for (const { verdict } of sections.flatMap(({ checks }) => checks)) counts[verdict]++;
  return counts;
}

/** For programs; ends without a newline. */
export function doctorAsJson(sections: readonly Section[]): string {
  const { problem, warning } = tally(sections);
  const checks = sections.flatMap(({ of, checks }) =>
    checks.map(({ name, verdict, found, advice }) => ({ of, check: name, result: verdict, found, advice }))
  );
  return JSON.stringify({ problems: problem, warnings: warning, checks }, undefined, 2);
}

/** For people; ends without a newline. */
export function doctorAsText(sections: readonly Section[]): string {
  const all = sections.flatMap(({ checks }) => checks);
  const heads = columns(all.map(({ name, verdict }) => [verdict === "problem" ? "PROBLEM" : verdict, name]));
  const width = Math.max(0, ...heads.map((head) => head.length));
  const lines: string[] = [];
  for (const { of, checks } of sections) {
    lines.push(...lines.length === 0 ? [] : [""], oneLine(of));
    for (const { found, advice } of checks) {
      lines.push(`  ${(heads.shift() ?? "").padEnd(width)}  ${oneLine(found)}`);
      if (advice !== undefined) lines.push(`  ${" ".repeat(width)}  -> ${oneLine(advice)}`);
    }
  }
  const counts = tally(sections);
  const text = (["problem", "warning", "ok", "not checked"] as const).map((verdict) => {
    const number = counts[verdict];
    return `${number} ${verdict}${number !== 1 && /m$|g$/.test(verdict) ? "s" : ""}`;
  });
  return [...lines, "", text.join(", ")].join("\n");
}

/** Words of clusters and tools must not steer the terminal, nor look like other lines. */
function oneLine(text: string): string {
  return text.replace(/\s+/g, " ").replace(/[^\x20-\x7e]/g, (c) => JSON.stringify(c).slice(1, -1))
    .replace(/[\x7f-\x9f]/g, "?");
}

/**
 * Checks what a command needs of the machine before it begins, so that everything that is missing is reported at once, in
 * the words of `lbcsi doctor`, instead of the first failure of a tool.
 *
 * It runs no program and waits for nothing.
 */
import { type Check, runCheck } from "../check.ts";
import type { RequestContext } from "../context.ts";
import type { FsType } from "../host/filesystem/fs_type.ts";
import type { Host } from "../host/host.ts";
import { programProblem } from "../host/programs.ts";
import type { Logger } from "../log.ts";
import { checkNvmeTcp, checkRights } from "./doctor/kernel.ts";
import { fileSystemTools, mountTools, type Tool } from "./doctor/tools.ts";

/** What a command needs of the machine. */
export interface Needs {
  /** Whether the command changes the machine: mounts, connects, or opens devices. */
  readonly rights: boolean;
  /** Whether the command makes the kernel connect, or waits until another program has done so. */
  readonly nvme: boolean;
  /** Programs, by the name of the check that covers them. */
  readonly programs: Readonly<Record<string, readonly string[]>>;
}

/** The programs that mount a file system, and those that make it unless `fsType` is undefined (not known yet). */
export function mountPrograms(fsType: FsType | undefined): Needs["programs"] {
  const names = (tools: readonly Tool[]) => tools.map(([program]) => program);
  return {
    "mount tools": names(mountTools),
    ...(fsType === undefined ? {} : { [`${fsType} tools`]: names(fileSystemTools[fsType]) }),
  };
}

/** The checks that found a problem with what a command needs. */
export async function findMissing(
  host: Host,
  { rights: needsRights, nvme, programs }: Needs,
): Promise<readonly Check[]> {
  // Other directories for /sys and /dev most often mean a simulated machine, which has no modules and an nvme of its own.
  const isThisMachine = host.roots.sysfs === "/sys" && host.roots.dev === "/dev";
  const checks = await Promise.all([
    ...(needsRights ? [runCheck("rights", () => checkRights(host))] : []),
    ...(nvme && isThisMachine ? [runCheck("NVMe/TCP", () => checkNvmeTcp(host))] : []),
    ...Object.entries(programs).map(([name, names]) =>
      runCheck(name, () => {
        const missing = names.flatMap((program) => {
          const problem = programProblem(program);
          return problem === undefined ? [] : [`${program}: ${problem}`];
        });
        return Promise.resolve(
          missing.length === 0
            ? { verdict: "ok", found: names.join(", ") }
            : { verdict: "problem", found: missing.join("; ") },
        );
      })
    ),
  ]);
  return checks.filter(({ verdict }) => verdict === "problem");
}

/** One check on one line, with what to do. */
export function describeCheck({ name, found, advice }: Check): string {
  return `${name}: ${found}${advice === undefined ? "" : ` -> ${advice}`}`;
}

/** Throws FAILED_PRECONDITION that names everything a command lacks. */
export async function assertReady(ctx: RequestContext, host: Host, needs: Needs): Promise<void> {
  const missing = await findMissing(host, needs);
  if (missing.length === 0) return;
  throw ctx.error("FAILED_PRECONDITION", `this machine is not ready for it, ${missing.map(describeCheck).join("; ")}`);
}

/** Logs one warning for each problem among `checks`. */
export function logProblems(log: Logger, checks: readonly Check[]): void {
  for (const { name, verdict, found, advice } of checks) {
    if (verdict !== "problem") continue;
    const error = advice === undefined ? found : `${found} -> ${advice}`;
    log.warning("found a problem with this machine", { name, error });
  }
}

/**
 * What a command at the shell needs of the machine, looked at before it begins: all that is missing is told at once, in the
 * words of `lbcsi doctor`, instead of what the first tool that fails makes of it.
 *
 * It runs no program and waits for nothing.
 */
import { type Check, runCheck } from "../check.ts";
import type { Logger } from "../context.ts";
import { StatusError } from "../error.ts";
import type { FsType } from "../host/filesystem/fs_type.ts";
import type { Host } from "../host/host.ts";
import { programProblem } from "../host/programs.ts";
import { checkNvmeTcp, checkRights } from "./doctor/kernel.ts";
import { fileSystemTools, mountTools, type Tool } from "./doctor/tools.ts";

/** What a command needs of the machine. */
export interface Needs {
  /** Whether it changes the machine: mounts, connects, or opens devices. */
  readonly rights: boolean;
  /** Whether it makes the kernel connect, or waits until another program has. */
  readonly nvme: boolean;
  /** Programs, each by the name of the check that has it. */
  readonly programs: Readonly<Record<string, readonly string[]>>;
}

/** Names of programs that are needed to mount, or to mount and make, a file system; undefined: one that is not known yet. */
export function mountPrograms(fsType: FsType | undefined): Needs["programs"] {
  const names = (tools: readonly Tool[]) => tools.map(([program]) => program);
  return {
    "mount tools": names(mountTools),
    ...(fsType === undefined ? {} : { [`${fsType} tools`]: names(fileSystemTools[fsType]) }),
  };
}

/** What a command lacks: the checks that are problems, and none that is well. */
export async function findMissing(
  host: Host,
  { rights: needsRights, nvme, programs }: Needs,
): Promise<readonly Check[]> {
  // Another place for /sys and /dev is most often a simulated machine, which has no modules and an nvme of its own.
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

/** Throws FAILED_PRECONDITION with all that a command lacks. */
export async function assertReady(action: string, host: Host, needs: Needs): Promise<void> {
  const missing = await findMissing(host, needs);
  if (missing.length === 0) return;
  throw new StatusError(
    "FAILED_PRECONDITION",
    `Cannot ${action}: this machine is not ready for it, ${missing.map(describeCheck).join("; ")}`,
  );
}

/** One warning for each problem among `checks`. */
export function logProblems(log: Logger, checks: readonly Check[]): void {
  for (const { name, verdict, found, advice } of checks) {
    if (verdict !== "problem") continue;
    const error = advice === undefined ? found : `${found} -> ${advice}`;
    log.warning("found a problem with this machine", { name, error });
  }
}

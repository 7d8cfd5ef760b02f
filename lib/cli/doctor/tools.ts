/** What `lbcsi doctor` checks of the programs that the driver runs. */
import { timeLimit } from "../../timing.ts";
import { type Finding, reasonOf } from "../../check.ts";
import type { RequestContext } from "../../context.ts";
import type { FsType } from "../../host/filesystem/fs_type.ts";
import type { Host } from "../../host/host.ts";
import { hasAes } from "../../host/luks.ts";
import { hasKernelModule } from "./kernel.ts";
import type { MachineCheckOptions } from "./machine.ts";

/** A program, with the arguments that make it print its version and do nothing else. */
export type Tool = readonly [program: string, ...args: readonly string[]];

/** The programs that every mount needs. */
export const mountTools: readonly Tool[] = ["mount", "umount", "blkid", "wipefs", "blockdev"]
  .map((program) => [program, "--version"]);

/** The programs that each file system needs. */
export const fileSystemTools: Readonly<Record<FsType, readonly Tool[]>> = {
  // resize2fs has no option for its version, but prints it when it is called without a device.
  ext4: [["mkfs.ext4", "-V"], ["e2fsck", "-V"], ["resize2fs"]],
  xfs: [["mkfs.xfs", "-V"], ["xfs_growfs", "-V"], ["xfs_logprint", "-V"]],
  btrfs: [["mkfs.btrfs", "--version"], ["btrfs", "--version"]],
};

const longestVersionMs = 5000;

/** What a tool prints as its version, or why it cannot be run. */
async function readVersionText(
  ctx: RequestContext,
  host: Host,
  [program, ...args]: Tool,
): Promise<{ readonly text: string } | { readonly problem: string }> {
  using limit = timeLimit(ctx.signal, longestVersionMs);
  try {
    const { stdout, stderr } = await host.run(program, args, { signal: limit.signal, onAbort: "kill", log: ctx.log });
    return { text: stdout + stderr };
  } catch (error) {
    ctx.signal.throwIfAborted();
    return { problem: reasonOf(error) };
  }
}

function parseVersion(text: string): string {
  return /(?<![\d.])\d+(?:\.\d+)+/.exec(text)?.[0] ?? "of unknown version";
}

/** Checks that all `tools` can be run. */
export async function checkTools(
  ctx: RequestContext,
  host: Host,
  tools: readonly Tool[],
  ifMissing: "problem" | "warning",
): Promise<Finding> {
  const results = await Promise.all(
    tools.map(async (tool) => ({ program: tool[0], ...await readVersionText(ctx, host, tool) })),
  );
  const missing = results.flatMap((result) => "problem" in result ? [`${result.program}: ${result.problem}`] : []);
  if (missing.length > 0) {
    return { verdict: ifMissing, found: missing.join("; "), advice: "use lbcsi's image, or install what is missing" };
  }
  const byVersion = Map.groupBy(results, (result) => "text" in result ? parseVersion(result.text) : "");
  return {
    verdict: "ok",
    found: [...byVersion].map(([version, same]) => `${same.map(({ program }) => program).join(", ")} ${version}`)
      .join("; "),
  };
}

/** Checks that nvme-cli can be run. */
export async function checkNvmeCli(ctx: RequestContext, { host, attach }: MachineCheckOptions): Promise<Finding> {
  const finding = await checkTools(ctx, host, [["nvme", "version"]], attach === "direct" ? "problem" : "warning");
  if (finding.verdict === "ok" || attach === "direct") return finding;
  return { ...finding, found: `${finding.found}; lbcsi discovery-client and growing volumes need it` };
}

// Older versions have no sector sizes, and do not distinguish a device that has gone from one that is in use.
const oldestCryptsetup = [2, 4] as const;

/** Checks that volumes with host encryption can be opened. */
export async function checkHostEncryption(
  ctx: RequestContext,
  { host, modulesDirectory = "/lib/modules" }: MachineCheckOptions,
): Promise<Finding> {
  const answer = await readVersionText(ctx, host, ["cryptsetup", "--version"]);
  if ("problem" in answer) {
    return {
      verdict: "warning",
      found: `cryptsetup: ${answer.problem}`,
      advice: "volumes with host encryption need it",
    };
  }
  const version = parseVersion(answer.text);
  const [major = 0, minor = 0] = version.split(".").map(Number);
  if (major < oldestCryptsetup[0] || major === oldestCryptsetup[0] && minor < oldestCryptsetup[1]) {
    return {
      verdict: "warning",
      found: `cryptsetup ${version}`,
      advice: `volumes with host encryption need ${oldestCryptsetup.join(".")} or later`,
    };
  }
  const isLoaded = await host.kindOf(`${host.roots.sysfs}/module/dm_crypt`) !== "absent" ||
    await hasKernelModule(host, modulesDirectory, "dm_crypt");
  if (isLoaded === false) {
    return {
      verdict: "warning",
      found: `cryptsetup ${version}, but this kernel has no dm-crypt`,
      advice: "volumes with host encryption need it",
    };
  }
  const kernel = isLoaded === undefined
    ? "dm-crypt is not loaded, and its module cannot be seen from here"
    : "dm-crypt";
  const found = `cryptsetup ${version}, ${kernel}`;
  if (isLoaded === undefined) return { verdict: "not checked", found };
  if (await hasAes(host) === false) {
    return {
      verdict: "warning",
      found: `${found}, but the processor has no AES instructions`,
      advice: "host encryption is slow here",
    };
  }
  return { verdict: "ok", found };
}

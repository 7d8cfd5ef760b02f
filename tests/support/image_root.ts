/**
 * A root file system of k8s/image/root.ts, entered as a container enters its image: read-only, with the machine's /dev and
 * /sys, and with one directory that both sides see, also what is mounted in it (as kubelet's, `Bidirectional`).
 *
 * Deno comes from outside: it runs the program's bundle as the compiled executable would.
 */
import { join } from "node:path";

export interface Entered {
  /** Where it is. */
  readonly root: string;
  /** Begins a command that runs in it. */
  readonly words: readonly string[];
}

async function tool(program: string, ...args: readonly string[]): Promise<void> {
  const { success, stderr } = await new Deno.Command(program, { args: [...args] }).output();
  if (!success) throw new Error(`${program} ${args.join(" ")}: ${new TextDecoder().decode(stderr)}`);
}

/**
 * Mounts it all below `work`. Everything stays mounted; so call it in a mount namespace, or a machine, that ends soon.
 *
 * @param image what root.ts made; it is not changed
 * @param shared directories that are at the same place in it, writable, with all that is mounted there
 * @param readOnly directories that are at another place, from outside to inside
 * @param user who runs commands
 */
export async function enter(
  image: string,
  work: string,
  shared: readonly string[],
  readOnly: Readonly<Record<string, string>>,
  user?: string,
): Promise<Entered> {
  const [root, memory] = [join(work, "root"), join(work, "memory")];
  await Promise.all([Deno.mkdir(root, { recursive: true }), Deno.mkdir(memory, { recursive: true })]);
  await tool("mount", "-t", "tmpfs", "image", memory);
  await Promise.all([Deno.mkdir(join(memory, "upper")), Deno.mkdir(join(memory, "work"))]);
  // Over it, so that places for mounts can be made.
  const layers = `lowerdir=${image},upperdir=${memory}/upper,workdir=${memory}/work`;
  await tool("mount", "-t", "overlay", "image", "-o", layers, root);
  const denoDir = "/run/deno";
  for (const path of [...shared, ...Object.values(readOnly)]) await Deno.mkdir(join(root, path), { recursive: true });
  for (const path of ["/dev", "/sys"]) await tool("mount", "--rbind", path, join(root, path));
  await tool("mount", "-t", "proc", "proc", join(root, "proc"));
  await tool("mount", "-t", "tmpfs", "-o", "mode=1777", "run", join(root, "run"));
  for (const path of shared) {
    await tool("mount", "--bind", path, path);
    await tool("mount", "--make-shared", path);
    await tool("mount", "--bind", path, join(root, path));
  }
  for (const [outside, inside] of Object.entries(readOnly)) {
    await tool("mount", "--bind", "-o", "ro", outside, join(root, inside));
  }
  // The mount alone: an overlay itself takes no changes with the mount of util-linux 2.41.
  await tool("mount", "-o", "remount,bind,ro", root);
  // A cache of `deno run`, which the compiled executable does not have.
  await Deno.mkdir(join(root, denoDir));
  await Deno.chmod(join(root, denoDir), 0o777);
  return { root, words: ["chroot", ...(user === undefined ? [] : [`--userspec=${user}`]), root] };
}

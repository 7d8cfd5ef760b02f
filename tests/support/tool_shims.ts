/**
 * Programs that stand in the place of the node's tools and run them, but can be told to wait before or after the n-th
 * run: what a driver has done to its machine is then known exactly at the moment when it is killed.
 */
import { join } from "node:path";

/** Where a run of a tool waits. */
export interface HeldTool {
  readonly program: string;
  /** Of the waiting process, which becomes the tool when it is released before its run. */
  readonly pid: number;
}

export interface ToolShims {
  /** PATH for the driver. */
  readonly path: string;
  /** Makes the n-th run from now (from 1) wait before the tool is started, or after it has ended. */
  arm(n: number, when: "before" | "after"): Promise<void>;
  disarm(): Promise<void>;
  /** The run that waits. */
  held(): Promise<HeldTool | undefined>;
  /** Lets it go on. */
  release(): Promise<void>;
  /** Ends it with SIGKILL, as a container that ends takes its processes along. */
  kill(): Promise<void>;
}

/** What the node service runs that changes the machine or decides what is changed. */
const tools = [
  ...["blkid", "blockdev", "wipefs", "mount", "umount"],
  ...["mkfs.ext4", "e2fsck", "resize2fs", "mkfs.xfs", "xfs_growfs", "mkfs.btrfs", "btrfs"],
];

/**
 * Makes them in a directory of their own below `home`.
 *
 * @param nvmeDirectory where an `nvme` is that the driver runs, if it does
 */
export async function toolShims(home: string, nvmeDirectory?: string): Promise<ToolShims> {
  const directory = join(home, "tools");
  const armed = join(directory, "armed");
  const held = join(directory, "held");
  const go = join(directory, "go");
  const bin = join(directory, "bin");
  const path = [...(nvmeDirectory === undefined ? [] : [nvmeDirectory]), Deno.env.get("PATH") ?? ""].join(":");
  await Deno.mkdir(bin, { recursive: true });
  const fifo = await new Deno.Command("mkfifo", { args: [go] }).output();
  if (!fifo.success) throw new Error(`mkfifo ${go}: ${new TextDecoder().decode(fifo.stderr)}`);
  const shim = join(directory, "shim");
  await Deno.writeTextFile(shim, script(directory, path), { mode: 0o755 });
  for (const tool of [...tools, ...(nvmeDirectory === undefined ? [] : ["nvme"])]) {
    await Deno.symlink(shim, join(bin, tool));
  }

  const read = async (): Promise<HeldTool | undefined> => {
    const text = await Deno.readTextFile(held).catch(absentAsUndefined);
    if (text === undefined) return undefined;
    const [pid = "", program = ""] = text.trim().split(" ");
    return { pid: Number(pid), program };
  };
  return {
    path: `${bin}:${path}`,
    async arm(n, when) {
      await Deno.writeTextFile(`${armed}.new`, `${n} ${when}\n`);
      await Deno.rename(`${armed}.new`, armed);
    },
    async disarm() {
      await Deno.remove(armed).catch(absentAsUndefined);
    },
    held: read,
    async release() {
      await Deno.remove(held);
      // Opening waits for a reader.
      await Deno.writeTextFile(go, "go\n", { create: false });
    },
    async kill() {
      const tool = await read();
      if (tool === undefined) return;
      await Deno.remove(held);
      Deno.kill(tool.pid, "SIGKILL");
    },
  };
}

function script(directory: string, path: string): string {
  return `#!/bin/sh
PATH='${path}'
export PATH
name=\${0##*/}
cd '${directory}' 2>/dev/null && [ -e armed ] || exec "$name" "$@"
read -r left when <armed
if [ "$left" -gt 1 ]; then
  echo "$((left - 1)) $when" >armed
  exec "$name" "$@"
fi
rm armed
hold() {
  echo "$$ $name" >held.new
  mv held.new held
  read -r word <go
}
if [ "$when" = before ]; then
  hold
  exec "$name" "$@"
fi
"$name" "$@"
status=$?
hold
exit $status
`;
}

function absentAsUndefined(error: unknown): undefined {
  if (error instanceof Deno.errors.NotFound) return undefined;
  throw error;
}

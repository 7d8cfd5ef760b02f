import assert from "node:assert/strict";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { fileURLToPath } from "node:url";

/** The path of a program in this directory. */
export const support = (name: string) => fileURLToPath(new URL(name, import.meta.url));

/**
 * How a server process fares while clients in other processes connect, call and close with GOAWAY.
 * glibc's MALLOC_PERTURB_ overwrites freed memory, so that the use of a freed session is noticed at once and not only
 * on unlucky days.
 */
export async function fate(
  server: (socket: string) => readonly string[],
  rounds: number,
  connections: number,
): Promise<{ end: string; served: number }> {
  const directory = mkdtempSync("/tmp/lbcsi-goaway-");
  const path = `${directory}/csi.sock`;
  const child = new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-check", "--quiet", ...server(path)],
    env: { MALLOC_PERTURB_: "165" },
    stdout: "null",
    stderr: "null",
  }).spawn();
  let end = "alive";
  const ended = child.status.then(({ code, signal }) => end = signal ?? `exit ${code}`);
  try {
    for (let tries = 0; !existsSync(path); tries++) {
      assert.ok(tries < 1000 && end === "alive", "the server does not listen");
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
    let served = 0;
    for (let round = 0; round < rounds && end === "alive"; round++) {
      const { success } = await new Deno.Command(Deno.execPath(), {
        args: ["run", "-A", "--no-check", "--quiet", support("probe_client.ts"), path, "3", String(connections)],
        stdout: "null",
        stderr: "null",
      }).output();
      if (success) served++;
    }
    // Gives a crash that the last close has caused the time to show.
    await Promise.race([ended, new Promise((resolve) => setTimeout(resolve, 300))]);
    return { end, served };
  } finally {
    if (end === "alive") child.kill("SIGKILL");
    await ended;
    rmSync(directory, { recursive: true });
  }
}

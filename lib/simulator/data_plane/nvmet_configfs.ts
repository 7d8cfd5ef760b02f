/** The kernel's NVMe target in configfs: attributes, addresses, links and namespaces. */
import { basename, join } from "node:path";
import { messageOf, StatusError } from "../../error.ts";
import { exists } from "./contents.ts";
import { readText } from "./run_command.ts";

/** Directory of the target. */
export const nvmetRoot = "/sys/kernel/config/nvmet";

/**
 * Removes a namespace and waits for its I/O. Absent: nothing.
 *
 * It is disabled first: while a process has one of its files open, the kernel continues to show a namespace without a
 * directory (6.1: hosts found the namespace again at each connect).
 */
export async function removeNamespace(directory: string): Promise<void> {
  if (!exists(directory)) return;
  await writeAttribute(join(directory, "enable"), "0");
  await Deno.remove(directory);
}

/** Writes an attribute; throws INTERNAL, without the text when it is a key. */
export async function writeAttribute(path: string, text: string): Promise<void> {
  try {
    await Deno.writeTextFile(path, text, { create: false });
  } catch (cause) {
    const what = /dhchap_(ctrl_)?key$/.test(path) ? "a key" : `"${text}"`;
    throw new StatusError("INTERNAL", `Cannot write ${what} to ${path}: ${messageOf(cause)}`, { cause });
  }
}

/** Writes the address where a port listens, or where a referral points to. */
export async function writeAddress(directory: string, traddr: string, trsvcid: string): Promise<void> {
  await writeAttribute(join(directory, "addr_trtype"), "tcp");
  await writeAttribute(join(directory, "addr_adrfam"), traddr.includes(":") ? "ipv6" : "ipv4");
  await writeAttribute(join(directory, "addr_traddr"), traddr);
  await writeAttribute(join(directory, "addr_trsvcid"), trsvcid);
}

/**
 * Makes a port serve a subsystem, or stop serving it. The first subsystem opens the port, the last one closes it.
 * Throws FAILED_PRECONDITION when the port cannot listen.
 */
export async function setLink(port: string, subsystem: string, linked: boolean): Promise<void> {
  const path = join(port, "subsystems", basename(subsystem));
  if (exists(path) === linked) return;
  if (!linked) return await Deno.remove(path);
  try {
    await Deno.symlink(subsystem, path);
  } catch (cause) {
    const at = (attribute: string) => readText(join(port, `addr_${attribute}`));
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot serve NVMe/TCP on ${at("traddr")}:${at("trsvcid")}: ${messageOf(cause)}; is somebody else there?`,
      { cause },
    );
  }
}

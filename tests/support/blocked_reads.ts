/**
 * A program for tests of the bundle: begins reads that block, more than Deno has threads for, and prints what a read says
 * that does not. `blocked_reads.ts FILE PIPE…`
 */
import { createLinuxHost } from "../../lib/host/linux_host.ts";
import { createLogger } from "../../lib/log.ts";

const [file = "", ...pipes] = Deno.args;
const host = createLinuxHost({ log: createLogger("error") });
for (const pipe of pipes) host.readBytes(pipe, 0n, 1).catch(() => {});
console.log(new TextDecoder().decode(await host.readBytes(file, 0n, 7)), await host.realPath(file) === file);
Deno.exit(0);

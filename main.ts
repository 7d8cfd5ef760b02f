/** lbcsi: a CSI driver for NVMe/TCP storage. lib/cli/commands.ts has the subcommands. */
import "./lib/grpc/goaway.ts";
import { runCommandLine } from "./lib/cli/commands.ts";

if (import.meta.main) Deno.exit(await runCommandLine(Deno.args));

// A process that sends back what comes in on a socket path, until its stdin ends; `node:net` as second argument: by that
// instead of ours.
import net from "node:net";
import type { Duplex } from "node:stream";
import { listenUnix } from "../../lib/grpc/unix_socket.ts";

// Before descriptors are short: Deno takes some for its first listener.
Deno.addSignalListener("SIGTERM", () => Deno.exit());
const [path = "", by] = Deno.args;
const echo = (connection: Duplex) => connection.on("error", () => {}).pipe(connection);
if (by === "node:net") net.createServer(echo).listen(path);
else listenUnix(path, echo, (error) => console.error(`refused: ${error.message}`));
await Deno.stdin.read(new Uint8Array(1));
Deno.exit();

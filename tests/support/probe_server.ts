// A process that serves Identity.Probe on a socket path through lib/grpc/server.ts; prints a line when it listens.
import { serve, service } from "../../lib/grpc/server.ts";
import { createLogger } from "../../lib/log.ts";
import { Identity } from "../../proto/gen/csi_pb.ts";

const [path = ""] = Deno.args;
await serve({
  listen: { path },
  log: createLogger("warning"),
  services: [service(Identity, { probe: () => Promise.resolve({ ready: true }) })],
});
console.log("listening");

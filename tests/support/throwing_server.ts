// A process that serves Probe and throws out of event callbacks: <socket path> before|after [deaf]. "before" throws before it
// is up; "deaf" loses its listener with it.
import { surviveUncaught } from "../../lib/cli/uncaught.ts";
import { Channel } from "../../lib/grpc/client.ts";
import { serve, service } from "../../lib/grpc/server.ts";
import { createLogger } from "../../lib/log.ts";
import { Identity } from "../../proto/gen/csi_pb.ts";

const [path = "", when = "", more = ""] = Deno.args;
const log = createLogger("error");
const throwAll = () => {
  setTimeout(() => {
    throw null;
  });
  setTimeout(() => {
    throw new Error("out of a callback");
  });
  Promise.reject(new Error("that no code handles"));
};
if (when === "before") {
  throwAll();
  await new Promise((resolve) => setTimeout(resolve, 60_000));
}
let exceptions = 0;
const server = await serve({
  listen: { path },
  log,
  services: [service(Identity, {
    // One call for each exception: then the caller knows that they have all been thrown.
    probe: () => Promise.resolve({ ready: exceptions >= 3 }),
  })],
});
for (const name of ["error", "unhandledrejection"]) globalThis.addEventListener(name, () => exceptions++);
using _survival = surviveUncaught(log, async () => {
  using channel = new Channel({ address: `unix://${path}` });
  return await channel.call(Identity.method.probe, {}, { signal: AbortSignal.timeout(60_000) }).then(() => true);
}, () => Deno.exit(1));
if (more === "deaf") await server.stop(0);
throwAll();
await new Promise((resolve) => setTimeout(resolve, 60_000));

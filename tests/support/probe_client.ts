// A process that connects, calls Probe, and closes with GOAWAY, again and again: <socket path> <calls> <connections>.
import { Channel } from "../../lib/grpc/client.ts";
import { Identity } from "../../proto/gen/csi_pb.ts";

const [path = "", calls = "1", connections = "1"] = Deno.args;
for (let connection = 0; connection < Number(connections); connection++) {
  using channel = new Channel({ address: `unix://${path}` });
  for (let call = 0; call < Number(calls); call++) {
    const { ready } = await channel.call(Identity.method.probe, {}, { signal: AbortSignal.timeout(10_000) });
    if (ready !== true) throw new Error("not ready");
  }
}
console.log("done");

// A process that calls a server by turns which fails every call, and exits when it has been told so: <host:port> <calls>.
import { CallError, Channel } from "../../lib/rpc.ts";
import { Identity } from "../../proto/gen/csi_pb.ts";

const [address = "", calls = "1"] = Deno.args;
using channel = new Channel({ address });
for (let call = 0; call < Number(calls); call++) {
  try {
    await channel.call(Identity.method.probe, {}, { signal: AbortSignal.timeout(5000) });
    throw new Error("the call did not fail");
  } catch (error) {
    if (!(error instanceof CallError) && !(error instanceof DOMException)) throw error;
  }
}

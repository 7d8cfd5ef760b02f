// A process that makes calls to a server, one after the other, and exits when each has failed: <host:port> <calls>
// [ms after which it gives up every other call].
import { CallError, Channel } from "../../lib/grpc/client.ts";
import { Identity } from "../../proto/gen/csi_pb.ts";

const [address = "", calls = "1", impatientMs = "5000"] = Deno.args;
using channel = new Channel({ address });
for (let call = 0; call < Number(calls); call++) {
  try {
    const signal = AbortSignal.timeout(call % 2 === 0 ? Number(impatientMs) : 5000);
    await channel.call(Identity.method.probe, {}, { signal });
    throw new Error("the call did not fail");
  } catch (error) {
    if (!(error instanceof CallError) && !(error instanceof DOMException)) throw error;
  }
}

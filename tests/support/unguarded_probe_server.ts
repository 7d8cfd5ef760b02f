// The same service as probe_server.ts by grpc-js alone: without lib/grpc/goaway.ts, a GOAWAY kills this process.
import grpc from "@grpc/grpc-js";

const [path = ""] = Deno.args;
const server = new grpc.Server();
const bytes = (value: unknown) => value as Buffer;
server.addService({
  Probe: {
    path: "/csi.v1.Identity/Probe",
    requestStream: false,
    responseStream: false,
    requestSerialize: bytes,
    requestDeserialize: bytes,
    responseSerialize: bytes,
    responseDeserialize: bytes,
  },
}, {
  Probe: (_call: unknown, reply: grpc.sendUnaryData<Buffer>) => reply(null, Buffer.from("0a020801", "hex")),
});
await new Promise<void>((resolve, reject) => {
  server.bindAsync(
    `unix://${path}`,
    grpc.ServerCredentials.createInsecure(),
    (error) => error ? reject(error) : resolve(),
  );
});
console.log("listening");

/** Describes protobuf-es methods to grpc-js, for the server and the client. */
import "./goaway.ts";
import { create, type DescMethod, fromBinary, type Message, toBinary } from "@bufbuild/protobuf";
import grpc from "@grpc/grpc-js";
import { readRequest } from "./request.ts";

/** The definition of a method, with its path and its serialization. */
export function methodDefinition(method: DescMethod): grpc.MethodDefinition<Message, unknown> {
  const serializeRequest = (message: Message) => toBuffer(toBinary(method.input, message));
  return {
    path: `/${method.parent.typeName}/${method.name}`,
    requestStream: method.methodKind === "client_streaming" || method.methodKind === "bidi_streaming",
    responseStream: method.methodKind === "server_streaming" || method.methodKind === "bidi_streaming",
    requestSerialize: serializeRequest,
    requestDeserialize: (bytes) => readRequest(method, bytes),
    responseSerialize: (message) => toBuffer(toBinary(method.output, create(method.output, message as never))),
    responseDeserialize: (bytes) => fromBinary(method.output, bytes),
  };
}

function toBuffer(bytes: Uint8Array): Buffer {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

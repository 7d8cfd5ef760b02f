/** Requests as bytes and as messages. */
import { type DescMethod, fromBinary, type Message } from "@bufbuild/protobuf";
import { messageOf, StatusError } from "../error.ts";

/** Stands for a request that is not a message of the schema. */
class UnreadableRequest {
  readonly error: StatusError;

  constructor(error: StatusError) {
    this.error = error;
  }
}

/** Reads a request. Its error is thrown later, by `requestOf`, because grpc-js would answer INTERNAL. */
export function readRequest(method: DescMethod, bytes: Uint8Array): Message {
  try {
    return fromBinary(method.input, bytes);
  } catch (error) {
    const message = `Cannot read the request of ${method.name}: ${messageOf(error)}`;
    return new UnreadableRequest(new StatusError("INVALID_ARGUMENT", message)) as unknown as Message;
  }
}

/** The request of a call; throws INVALID_ARGUMENT when it could not be read. */
export function requestOf(call: { readonly request: Message }): Message {
  const request: unknown = call.request;
  if (request instanceof UnreadableRequest) throw request.error;
  return call.request;
}

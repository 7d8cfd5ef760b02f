import type { Socket } from "node:net";
import type { Duplex } from "node:stream";

export function acceptAnyAuthority(socket: Socket): Duplex {
  return socket;
}

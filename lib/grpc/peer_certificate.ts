/**
 * Keeps the process alive when a server shows certificates that cannot be read.
 *
 * Deno's TLS reads the whole chain during the handshake, in an event callback, and throws there when it cannot: one server
 * with three bytes of junk after its certificate would end the process. This module ends the connection instead, with an
 * error like that of any other failed handshake.
 *
 * This module must be imported before anything that uses `node:tls`.
 */
import tls from "node:tls";

/** The message of the error of such a connection. */
export const unreadableCertificates = "the certificates that the server shows cannot be read";

type Read = (this: tls.TLSSocket, ...args: unknown[]) => unknown;

const prototype = tls.TLSSocket.prototype as unknown as { getPeerCertificate: Read };
const read = prototype.getPeerCertificate;
prototype.getPeerCertificate = function (...args) {
  try {
    return Reflect.apply(read, this, args);
  } catch (cause) {
    this.destroy(new Error(unreadableCertificates, { cause }));
    return {};
  }
};

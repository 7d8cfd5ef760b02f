/**
 * Keeps the process alive when a server shows certificates that cannot be read.
 *
 * Deno's TLS reads the whole chain within the handshake, in an event callback, and throws there what it cannot read: one
 * server with three bytes of junk behind its certificate would end the process. So the connection is ended instead, with
 * an error as of any other failed handshake.
 *
 * This module must be imported before anything that uses `node:tls`.
 */
import tls from "node:tls";

/** What the error of such a connection says. */
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

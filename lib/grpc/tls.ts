/** How a server that this side calls proves who it is: certificate authorities, pinned keys, names, and dates. */
import "./goaway.ts";
import { createHash, X509Certificate } from "node:crypto";
import net from "node:net";
import tls from "node:tls";
import grpc from "@grpc/grpc-js";
import { messageOf } from "../error.ts";
import { splitPem } from "../pem.ts";
import type { ChannelOptions } from "./client.ts";
import { unreadableCertificates } from "./peer_certificate.ts";

/** How a server has to prove who it is. */
export interface Trust {
  /**
   * PEM certificates to trust instead of the built-in ones, as `readPem` returns them. A server that shows one of them
   * is trusted, no matter which CA has signed it.
   */
  readonly ca?: string;
  /** False accepts any certificate. */
  readonly verify: boolean;
  /** The name that the certificate must be for; default: the host of the address. */
  readonly serverName?: string;
  /** `publicKeyPin`s, one of which the server's key must have in addition. Ignored when `verify` is false. */
  readonly pins?: readonly string[];
}

/** The credentials of a channel: clear text, or TLS that checks the server as `Trust` says. */
export function credentials({ address, tls: trust }: ChannelOptions): grpc.ChannelCredentials {
  if (trust === undefined) return grpc.credentials.createInsecure();
  const ca = trust.ca === undefined ? null : Buffer.from(trust.ca);
  const certificateProblem = (certificate: tls.PeerCertificate) => {
    try {
      return tls.checkServerIdentity(nameOf(address, trust), certificate) ?? pinProblem(trust.pins, certificate);
    } catch (cause) {
      // TLS calls this in an event callback, where a thrown error could not be caught.
      return new Error(`the server's certificate cannot be checked (${messageOf(cause)})`, { cause });
    }
  };
  const leaves = trust.verify ? signedByOthers(trust.ca) : new Set<string>();
  const made = grpc.credentials.createSsl(ca, null, null, {
    rejectUnauthorized: trust.verify && leaves.size === 0,
    checkServerIdentity: (_name, certificate) => trust.verify ? certificateProblem(certificate) : undefined,
  });
  if (!trust.verify) return made;
  const createConnector = made._createSecureConnector.bind(made);
  made._createSecureConnector = (...args) => {
    const connector = createConnector(...args);
    return {
      connect: async (socket) => {
        const connected = await connector.connect(socket).catch(async (error) => {
          throw await datesProblemAt(address, trust) ?? error;
        });
        if (leaves.size === 0) return connected;
        // TLS itself trusts what a trusted certificate has signed, and not such a certificate itself unless it is
        // self-signed. So TLS only proves that the server has the key of the certificate that it shows; the certificate
        // itself is checked here.
        const secured = connected.socket as tls.TLSSocket;
        const problem = leafProblem(secured, leaves) ?? certificateProblem(secured.getPeerCertificate(true));
        if (problem === undefined) return connected;
        secured.destroy();
        throw problem;
      },
      waitForReady: () => connector.waitForReady(),
      getCallCredentials: () => connector.getCallCredentials(),
      destroy: () => connector.destroy(),
    };
  };
  return made;
}

/** The certificates (DER, base64) of a PEM text that are not self-signed: a server may show one of them as its own. */
function signedByOthers(ca: string | undefined): ReadonlySet<string> {
  return new Set(
    splitPem(ca ?? "").filter(({ issuer, subject }) => issuer !== subject).map(({ raw }) => raw.toString("base64")),
  );
}

/** OpenSSL's words for its codes. */
const errorWords: Readonly<Record<string, string>> = {
  CERT_HAS_EXPIRED: "certificate has expired",
  CERT_NOT_YET_VALID: "certificate is not yet valid",
  DEPTH_ZERO_SELF_SIGNED_CERT: "self-signed certificate",
  SELF_SIGNED_CERT_IN_CHAIN: "self-signed certificate in certificate chain",
  UNABLE_TO_GET_ISSUER_CERT_LOCALLY: "unable to get local issuer certificate",
  UNABLE_TO_VERIFY_LEAF_SIGNATURE: "unable to verify the first certificate",
};

/** Why a server is not trusted, its name and pins apart; undefined: it is trusted. */
function leafProblem(socket: tls.TLSSocket, leaves: ReadonlySet<string>): Error | undefined {
  if (socket.authorized) return undefined;
  const shown = socket.getPeerCertificate(true);
  const { raw } = shown ?? {};
  if (raw === undefined) return new Error(unreadableCertificates);
  // A certificate that is trusted itself does not need the others that the server shows.
  if (leaves.has(Buffer.from(raw).toString("base64"))) return datesProblemOf(shown.raw);
  // Deno gives an error where TLS itself rejects the server, and a code here.
  const error: unknown = socket.authorizationError;
  return datesProblem(shown) ??
    new Error(error instanceof Error ? error.message : errorWords[String(error)] ?? String(error));
}

/**
 * How long the second connection to a server may take, which is made for a better message: well below the 3 s of the
 * first.
 */
const secondLookMs = 1000;

/**
 * What is wrong with the dates of the certificates of a server that TLS has rejected; undefined: nothing, or it cannot
 * be found out. Deno's TLS says of each bad chain only that it cannot be verified, and shows nothing of it, so a second
 * connection is made. Nothing is sent over it, and the server is not trusted.
 */
async function datesProblemAt(address: string, trust: Trust): Promise<Error | undefined> {
  try {
    return await readCertificates(address, trust, AbortSignal.timeout(secondLookMs), datesProblem);
  } catch {
    // The first error is reported instead.
    return undefined;
  }
}

/**
 * What is wrong with the dates of the certificates that a server shows: its own, and those between it and a root. The
 * dates of a root that it shows are ignored, as TLS ignores them.
 */
function datesProblem(shown: tls.DetailedPeerCertificate): Error | undefined {
  const seen = new Set<tls.DetailedPeerCertificate>();
  for (let at: tls.DetailedPeerCertificate | undefined = shown; at?.raw !== undefined; at = at.issuerCertificate) {
    if (seen.has(at)) return undefined;
    seen.add(at);
    const { subject, issuer } = new X509Certificate(at.raw);
    if (at !== shown && subject === issuer) return undefined;
    const problem = datesProblemOf(at.raw);
    if (problem !== undefined) return problem;
  }
  return undefined;
}

/** What is wrong with the dates of one certificate (DER). */
function datesProblemOf(raw: Uint8Array): Error | undefined {
  const { subject, subjectAltName, validFrom, validTo } = new X509Certificate(raw);
  const name = oneLine(subject) || oneLine(subjectAltName) || "one without a name";
  const now = Date.now();
  if (now < Date.parse(validFrom)) {
    return new Error(`certificate is not yet valid: ${name} is valid from ${new Date(validFrom).toISOString()} on`);
  }
  if (now > Date.parse(validTo)) {
    return new Error(`certificate has expired: ${name} was valid until ${new Date(validTo).toISOString()}`);
  }
  return undefined;
}

/** The name of a certificate on one line; at most 200 characters, because the server may have chosen it. */
function oneLine(name: string | undefined): string {
  // deno-lint-ignore no-control-regex
  return (name ?? "").trim().replaceAll(/[\x00-\x1f\x7f]+/g, ", ").slice(0, 200);
}

function pinProblem(pins: readonly string[] = [], certificate: tls.PeerCertificate): Error | undefined {
  if (pins.length === 0) return undefined;
  const pin = publicKeyPin(certificate.raw);
  if (pins.includes(pin)) return undefined;
  return new Error(`the server's public key is ${pin}, which is not pinned`);
}

/**
 * `sha256//` and base64 of the SHA-256 of a certificate's public key (its SubjectPublicKeyInfo), as curl's
 * `--pinnedpubkey` takes it.
 *
 * @param certificate PEM or DER
 */
export function publicKeyPin(certificate: string | Uint8Array): string {
  const key = new X509Certificate(certificate).publicKey.export({ type: "spki", format: "der" });
  return `sha256//${createHash("sha256").update(key).digest("base64")}`;
}

/** What a server's certificate says, whether it is trusted or not. */
export interface ShownCertificate {
  /** `CN=lightos.example`; its alternative names where it has no subject. */
  readonly subject: string;
  readonly issuer: string;
  readonly validFrom: Date;
  readonly validTo: Date;
}

/**
 * The certificate that a server shows. It is read and not trusted: nothing is sent, and the connection ends at once.
 *
 * @throws the error of the system when there is no TLS connection; `signal.reason` when the signal aborts first
 */
export function shownCertificate(address: string, trust: Trust, signal: AbortSignal): Promise<ShownCertificate> {
  return readCertificates(address, trust, signal, (shown) => {
    const certificate = new X509Certificate(shown.raw);
    return {
      subject: oneLine(certificate.subject) || oneLine(certificate.subjectAltName) || "nobody",
      issuer: oneLine(certificate.issuer) || "nobody",
      validFrom: new Date(certificate.validFrom),
      validTo: new Date(certificate.validTo),
    };
  });
}

/**
 * What `read` returns for the certificates that a server shows. They are not trusted: nothing is sent, and the
 * connection ends at once.
 *
 * @throws the error of the system when there is no TLS connection; what `read` throws; `signal.reason` when the signal
 *   aborts first
 */
function readCertificates<T>(
  address: string,
  trust: Trust,
  signal: AbortSignal,
  read: (shown: tls.DetailedPeerCertificate) => T,
): Promise<T> {
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const socket = tls.connect({
      host: address.replace(/:\d+$/, "").replace(/^\[(.*)\]$/, "$1"),
      port: Number(/:(\d+)$/.exec(address)?.[1]),
      servername: sentName(address, trust),
      ALPNProtocols: ["h2"],
      rejectUnauthorized: false,
      // A list of its own keeps Deno from resuming a session, which would show the certificate of that time.
      ca: [...tls.rootCertificates.slice(0, 1)],
    });
    const giveUp = () => end(() => reject(signal.reason));
    const end = (settle: () => void) => {
      signal.removeEventListener("abort", giveUp);
      settle();
      socket.destroy();
    };
    signal.addEventListener("abort", giveUp, { once: true });
    socket.on("error", (error) => end(() => reject(error)));
    socket.once("secureConnect", () =>
      end(() => {
        try {
          resolve(read(socket.getPeerCertificate(true)));
        } catch (error) {
          reject(error);
        }
      }));
  });
}

/** The channel options of grpc-js that set the TLS server name. */
export function tlsNameOptions(address: string, trust: Trust): Record<string, string> {
  return { "grpc.ssl_target_name_override": sentName(address, trust) };
}

/**
 * The TLS server name that is sent (SNI). Deno does not allow an IP address there (Node only warns), so a placeholder
 * is sent for one; the certificate is still checked against the address itself, in `credentials`.
 *
 * Deno keeps TLS sessions by that name, and a resumed session shows no certificate again (seen with 2.9.5, where no
 * list of CAs is given). So each pair of endpoint and Trust has a placeholder of its own: what was verified for one
 * server, or with less care, must not count for another.
 */
function sentName(address: string, trust: Trust): string {
  const name = nameOf(address, trust);
  if (net.isIP(name) === 0) return name;
  const { ca, verify, serverName, pins } = trust;
  const digest = createHash("sha256").update(JSON.stringify([address, ca, verify, serverName, pins])).digest("hex");
  return `ip-address-${digest.slice(0, 16)}.invalid`;
}

/** The name that the certificate has to be for. */
function nameOf(address: string, trust: Trust): string {
  return trust.serverName ?? address.replace(/:\d+$/, "").replace(/^\[(.*)\]$/, "$1");
}

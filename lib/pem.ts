/**
 * Certificates in PEM texts, read before anything of them reaches TLS.
 *
 * Deno's TLS parses all certificates to trust within the handshake. For one that it cannot read it throws in an event
 * callback, where no caller can catch the error: a text of one Secret would end the process.
 */
import { Buffer } from "node:buffer";
import { X509Certificate } from "node:crypto";

/** What a PEM text holds. */
export interface PemCertificates {
  /** The certificates that can be read, in a text with nothing else. Empty: there are none. */
  readonly pem: string;
  /** What is wrong, by block: `certificate 2 is not base64`. */
  readonly problems: readonly string[];
}

/** The texts that were read last, because the same few come with every call. */
const known = new Map<string, PemCertificates>();
const mostKnown = 16;

/** Reads a PEM text. Blocks of other kinds, and text between blocks, are passed over. Never throws. */
export function readPem(text: string): PemCertificates {
  const found = known.get(text) ?? read(text);
  known.delete(text);
  known.set(text, found);
  const [oldest] = known.keys();
  if (known.size > mostKnown && oldest !== undefined) known.delete(oldest);
  return found;
}

/**
 * What is wrong with a PEM text in which each certificate has to be good, for use after "it"; undefined: nothing.
 */
export function pemProblem({ pem, problems }: PemCertificates): string | undefined {
  if (problems.length > 0) return `has a bad block: ${problems.join(", ")}`;
  return pem === "" ? "holds no PEM certificate" : undefined;
}

/** The certificates of a PEM text that readPem has returned, one by one. */
export function splitPem(pem: string): readonly X509Certificate[] {
  return (pem.match(/-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----/g) ?? []).map((block) =>
    new X509Certificate(block)
  );
}

function read(text: string): PemCertificates {
  const good: string[] = [];
  const problems: string[] = [];
  const begins = /-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----/g;
  let number = 0;
  for (const begin of text.matchAll(begins)) {
    number++;
    const rest = text.slice(begin.index + begin[0].length);
    const body = /^((?:(?!-----)[^])*)-----END (?:X509 |TRUSTED )?CERTIFICATE-----/.exec(rest)?.[1];
    const outcome = readBlock(body);
    if (outcome instanceof Uint8Array) good.push(pemOf(outcome));
    else problems.push(`certificate ${number} ${outcome}`);
  }
  return { pem: good.join(""), problems };
}

/** The certificate (DER) of one block, or what is wrong with it. */
function readBlock(body: string | undefined): Uint8Array | string {
  if (body === undefined) return "has no END line";
  // A text that was pasted into YAML may be indented.
  const base64 = body.replace(/\s+/g, "");
  if (base64 === "") return "is empty";
  if (!/^[A-Za-z0-9+/]+={0,2}$/.test(base64) || base64.length % 4 !== 0) return "is not base64";
  const der = Buffer.from(base64, "base64");
  try {
    // TLS makes both objects from it.
    new X509Certificate(der).toLegacyObject();
    // TLS passes over a certificate that something follows, and X509Certificate does not mind.
    return lengthOfDer(der) === der.length ? der : "has more than a certificate in it";
  } catch {
    return "cannot be read as a certificate";
  }
}

/** How many bytes the first value of a DER text takes, as its head says (X.690, 8.1.3). */
function lengthOfDer(der: Uint8Array): number {
  const [, first = 0] = der;
  if (first < 0x80) return 2 + first;
  const size = first - 0x80;
  return der.subarray(2, 2 + size).reduce((length, byte) => length * 256 + byte, 0) + 2 + size;
}

function pemOf(der: Uint8Array): string {
  const lines = Buffer.from(der).toString("base64").match(/.{1,64}/g) ?? [];
  return ["-----BEGIN CERTIFICATE-----", ...lines, "-----END CERTIFICATE-----", ""].join("\n");
}

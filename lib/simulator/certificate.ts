/**
 * TLS certificates for the simulated cluster: a CA of its own and a server certificate that the CA issues.
 *
 * It uses `@peculiar/x509`, because neither Deno nor `node:crypto` can issue certificates. Imported only when TLS is served.
 */
// tsyringe, inside @peculiar/x509, looks for this polyfill when it is loaded.
import "reflect-metadata";
import * as x509 from "@peculiar/x509";
import { isIP } from "node:net";

/** Key and certificates in PEM form. */
export interface Certificate {
  readonly key: string;
  readonly cert: string;
  /** The CA's certificate, which clients must trust. */
  readonly ca: string;
}

const algorithm = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" };
const dayMs = 24 * 3600 * 1000;

/**
 * Makes a CA and a certificate for `hosts`, names and IP addresses, `localhost` and the loopback addresses included.
 *
 * @param days how long the certificate is valid. It begins yesterday, so that a clock that is slow accepts it
 */
export async function selfSigned(hosts: readonly string[], days = 3650): Promise<Certificate> {
  const notBefore = new Date(Date.now() - dayMs);
  const notAfter = new Date(Date.now() + 3650 * dayMs);
  const caKeys = await generateKeys();
  const ca = await x509.X509CertificateGenerator.createSelfSigned({
    name: "CN=lbcsi simulator CA",
    notBefore,
    notAfter,
    keys: caKeys,
    signingAlgorithm: algorithm,
    extensions: [
      new x509.BasicConstraintsExtension(true, 0, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.keyCertSign | x509.KeyUsageFlags.cRLSign, true),
      await x509.SubjectKeyIdentifierExtension.create(caKeys.publicKey),
    ],
  });
  const keys = await generateKeys();
  const names = [...new Set(["localhost", "127.0.0.1", "::1", ...hosts])];
  const leaf = await x509.X509CertificateGenerator.create({
    subject: "CN=lbcsi simulator",
    issuer: ca.subject,
    notBefore,
    notAfter: new Date(Date.now() + days * dayMs),
    publicKey: keys.publicKey,
    signingKey: caKeys.privateKey,
    signingAlgorithm: algorithm,
    extensions: [
      new x509.BasicConstraintsExtension(false),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.digitalSignature, true),
      new x509.ExtendedKeyUsageExtension([x509.ExtendedKeyUsage.serverAuth]),
      new x509.SubjectAlternativeNameExtension(
        names.map((name) => ({ type: isIP(name) === 0 ? "dns" as const : "ip" as const, value: name })),
      ),
      await x509.AuthorityKeyIdentifierExtension.create(ca),
    ],
  });
  const pkcs8 = await crypto.subtle.exportKey("pkcs8", keys.privateKey);
  return {
    key: x509.PemConverter.encode(pkcs8, "PRIVATE KEY"),
    cert: leaf.toString("pem"),
    ca: ca.toString("pem"),
  };
}

async function generateKeys(): Promise<CryptoKeyPair> {
  return await crypto.subtle.generateKey(algorithm, true, ["sign", "verify"]) as CryptoKeyPair;
}

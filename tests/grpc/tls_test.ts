/** Which servers a Channel trusts; neither a bad PEM text nor a server's certificates end the process. */
// tsyringe, inside @peculiar/x509, looks for this polyfill when it is loaded.
import "reflect-metadata";
import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert/strict";
import { Buffer } from "node:buffer";
import { X509Certificate } from "node:crypto";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import * as x509 from "@peculiar/x509";
import { CallError, Channel } from "../../lib/grpc/client.ts";
import { serve, service } from "../../lib/grpc/server.ts";
import { publicKeyPin, type Trust } from "../../lib/grpc/tls.ts";
import { createLogger } from "../../lib/log.ts";
import { pemProblem, readPem } from "../../lib/pem.ts";
import { type Certificate, selfSigned } from "../../lib/simulator/certificate.ts";
import { adviceFor } from "../../lib/storage/lightos/advice.ts";
import { Identity } from "../../proto/gen/csi_pb.ts";
import { needs } from "../support/needs.ts";

let made: Promise<Certificate> | undefined;
const certificate = () => made ??= selfSigned([]);
const quiet = createLogger("error", "json", () => {});

async function serveTls({ key, cert }: Certificate) {
  const server = await serve({
    // All addresses, so that one which is not in the certificate can be tried.
    listen: { host: "0.0.0.0", port: 0, tls: { key, cert } },
    log: quiet,
    services: [service(Identity, { probe: () => Promise.resolve({ ready: true }) })],
  });
  return { port: server.port, [Symbol.asyncDispose]: () => server.stop(1000) };
}

async function probe(address: string, tls: Trust): Promise<boolean> {
  using channel = new Channel({ address, tls });
  return (await channel.call(Identity.method.probe, {}, { signal: AbortSignal.timeout(20_000) })).ready ?? false;
}

function notConnected(words: RegExp) {
  return (error: unknown) => {
    ok(error instanceof CallError, String(error));
    deepStrictEqual([error.code, error.origin], ["UNAVAILABLE", "not connected"], error.message);
    match(error.message, words);
    return true;
  };
}

// --------------------------------------------------------------------------------------------------------------- texts

const block = (body: string) => `-----BEGIN CERTIFICATE-----\n${body}\n-----END CERTIFICATE-----\n`;
const pemTexts: readonly (readonly [string, (good: string) => string, number, string | undefined])[] = [
  ["one certificate", (good) => good, 1, undefined],
  ["two certificates", (good) => good + good, 2, undefined],
  ["CRLF", (good) => good.replaceAll("\n", "\r\n"), 1, undefined],
  ["lines that YAML has indented", (good) => good.replaceAll("\n", "\n  "), 1, undefined],
  ["a mark of UTF-8 in front", (good) => `\ufeff${good}`, 1, undefined],
  ["text around", (good) => `# my CA\nsubject=x\n${good}\nend`, 1, undefined],
  [
    "a private key besides",
    (good) => `${good}-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n`,
    1,
    undefined,
  ],
  ["nothing", () => "", 0, "holds no PEM certificate"],
  ["something else", () => "token", 0, "holds no PEM certificate"],
  [
    "one line with \\n as text",
    (good) => good.replaceAll("\n", "\\n"),
    0,
    "has a bad block: certificate 1 is not base64",
  ],
  ["an empty block", (good) => good + block(""), 1, "has a bad block: certificate 2 is empty"],
  ["a block of blanks", (good) => good + block(" \n "), 1, "has a bad block: certificate 2 is empty"],
  ["a block that is not base64", (good) => good + block("!!!!"), 1, "has a bad block: certificate 2 is not base64"],
  [
    "a block that is no certificate",
    (good) => good + block("AAAA"),
    1,
    "certificate 2 cannot be read as a certificate",
  ],
  [
    "bytes behind the certificate",
    (good) => good + block(Buffer.concat([new X509Certificate(good).raw, Buffer.from("abc")]).toString("base64")),
    1,
    "certificate 2 has more than a certificate in it",
  ],
  [
    "a certificate with OpenSSL's settings of trust",
    (good) =>
      good.replaceAll(" CERTIFICATE", " TRUSTED CERTIFICATE").replace(
        /(?<=-\n)[^-]+/,
        Buffer.concat([new X509Certificate(good).raw, Buffer.from("300c300a06082b06010505070301", "hex")]).toString(
          "base64",
        ),
      ),
    0,
    "certificate 1 has more than a certificate in it",
  ],
  ["a lost line", (good) => good.replace(/\n[^\n-]{64}\n/, "\n"), 0, "certificate 1 cannot be read as a certificate"],
  ["a lost character", (good) => good.replace(/\n[^\n-]/, "\n"), 0, "certificate 1 is not base64"],
  ["a comment within", (good) => good.replace(/\n/, "\n# my CA\n"), 0, "certificate 1 is not base64"],
  ["headers within", (good) => good.replace(/\n/, "\nProc-Type: 4\n\n"), 0, "certificate 1 is not base64"],
  ["a cut end", (good) => good + good.slice(0, good.length / 2), 1, "certificate 2 has no END line"],
  [
    "dashes of a document",
    (good) => good + good.replaceAll("-----END", "–––––END"),
    1,
    "certificate 2 has no END line",
  ],
  [
    "two bad blocks",
    (good) => block("") + good + block("AAAA"),
    1,
    "has a bad block: certificate 1 is empty, certificate 3 ",
  ],
];

for (const [what, textOf, count, problem] of pemTexts) {
  Deno.test(`promise 27: a PEM text with ${what} is read without harm`, async () => {
    const { ca } = await certificate();
    const read = readPem(textOf(ca));

    strictEqual(read.pem.split("BEGIN").length - 1, count);
    for (const one of read.pem.match(/-----BEGIN[^]*?-----END CERTIFICATE-----/g) ?? []) {
      deepStrictEqual(new X509Certificate(one).raw, new X509Certificate(ca).raw);
    }
    const found = pemProblem(read);
    if (problem === undefined) strictEqual(found, undefined);
    else ok(found?.includes(problem), String(found));
  });
}

// ------------------------------------------------------------------------------------------- the certificate itself

Deno.test("promise 11: a server's own certificate can be trusted instead of the CA that signed it", async () => {
  const own = await certificate();
  await using server = await serveTls(own);

  strictEqual(await probe(`localhost:${server.port}`, { ca: own.cert, verify: true }), true);
  strictEqual(await probe(`127.0.0.1:${server.port}`, { ca: own.cert, verify: true }), true);
  const other = await selfSigned([]);
  strictEqual(await probe(`127.0.0.1:${server.port}`, { ca: other.cert + own.cert, verify: true }), true);
  // What it was signed by is good as well, in a text that has both.
  strictEqual(await probe(`127.0.0.1:${server.port}`, { ca: own.ca + other.cert, verify: true }), true);
});

Deno.test("promise 11: name, dates and pins of a certificate that is trusted itself are checked", async () => {
  const own = await certificate();
  await using server = await serveTls(own);
  const trust = { ca: own.cert, verify: true };

  await rejects(probe(`127.0.0.2:${server.port}`, trust), notConnected(/127\.0\.0\.2 is not in the cert's list/));
  await rejects(
    probe(`127.0.0.1:${server.port}`, { ...trust, serverName: "other.example" }),
    notConnected(/other\.example\. is not in the cert's altnames/),
  );
  strictEqual(await probe(`127.0.0.1:${server.port}`, { ...trust, pins: [publicKeyPin(own.cert)] }), true);
  const { cert: another } = await selfSigned([]);
  await rejects(
    probe(`127.0.0.1:${server.port}`, { ...trust, pins: [publicKeyPin(another)] }),
    notConnected(/which is not pinned/),
  );
  const expired = await selfSigned([], -0.5);
  await using old = await serveTls(expired);
  await rejects(probe(`127.0.0.1:${old.port}`, { ca: expired.cert, verify: true }), notConnected(/has expired/));
});

Deno.test("promise 11: a certificate that is trusted itself makes no other one trusted", async () => {
  const [own, other] = await Promise.all([certificate(), selfSigned([])]);
  await using server = await serveTls(own);

  await rejects(
    probe(`127.0.0.1:${server.port}`, { ca: other.cert, verify: true }),
    notConnected(/unable to verify the first certificate/),
  );
});

Deno.test("promise 11: without verification a server with any certificate is accepted", async () => {
  const [own, expired, other] = await Promise.all([certificate(), selfSigned([], -0.5), selfSigned([])]);
  await using server = await serveTls(own);
  await using old = await serveTls(expired);
  const trust = { verify: false };

  for (const ca of [undefined, other.ca, own.cert, other.cert]) {
    const trust = ca === undefined ? { verify: false } : { verify: false, ca };
    strictEqual(await probe(`127.0.0.2:${server.port}`, trust), true, "another name");
    strictEqual(await probe(`127.0.0.1:${old.port}`, trust), true, "expired");
  }
  strictEqual(await probe(`127.0.0.1:${server.port}`, { ...trust, serverName: "other.example" }), true);
});

// ---------------------------------------------------------------------------------------------------------------- dates

const dayMs = 24 * 3600 * 1000;
const valid = [-30, 30] as const;

interface Issued {
  readonly cert: x509.X509Certificate;
  readonly keys: CryptoKeyPair;
}

/** A certificate that is valid from and until so many days from now; without `issuer` it is self-signed. */
async function issue(name: string, [from, until]: readonly [number, number], isCa: boolean, issuer?: Issued) {
  const algorithm = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" };
  const keys = await crypto.subtle.generateKey(algorithm, true, ["sign", "verify"]) as CryptoKeyPair;
  const cert = await x509.X509CertificateGenerator.create({
    subject: `CN=${name}`,
    issuer: issuer?.cert.subject ?? `CN=${name}`,
    notBefore: new Date(Date.now() + from * dayMs),
    notAfter: new Date(Date.now() + until * dayMs),
    publicKey: keys.publicKey,
    signingKey: (issuer?.keys ?? keys).privateKey,
    signingAlgorithm: algorithm,
    extensions: [
      new x509.BasicConstraintsExtension(isCa, undefined, true),
      new x509.SubjectAlternativeNameExtension([{ type: "ip", value: "127.0.0.1" }]),
    ],
  });
  return { cert, keys };
}

const pemOf = (...issued: readonly Issued[]) => issued.map(({ cert }) => `${cert.toString("pem")}\n`).join("");

/** Serves a certificate with the rest of its chain. */
async function serveChain(leaf: Issued, ...chain: readonly Issued[]) {
  const key = x509.PemConverter.encode(await crypto.subtle.exportKey("pkcs8", leaf.keys.privateKey), "PRIVATE KEY");
  return await serveTls({ key, cert: pemOf(leaf, ...chain), ca: "" });
}

for (
  const [dates, words, period] of [
    ["expired", "certificate has expired: CN=NAME was valid until", [-30, -1]],
    ["not yet valid", "certificate is not yet valid: CN=NAME is valid from", [1, 30]],
  ] as const
) {
  const datesError = (name: string) =>
    notConnected(new RegExp(`^${words.replace("NAME", name)} \\d{4}-\\d\\d-\\d\\dT[\\d:.]+Z( on)?$`));

  Deno.test(`a server's certificate that is ${dates} is reported as such, with any signer and any trust`, async () => {
    const [ca, other] = await Promise.all([issue("ca", valid, true), issue("other", valid, true)]);
    const [own, leaf, another] = await Promise.all([
      issue("own", period, false),
      issue("leaf", period, false, ca),
      issue("another", valid, false, ca),
    ]);
    await using bySelf = await serveChain(own);
    await using byCa = await serveChain(leaf);
    const trusts = [undefined, pemOf(ca), pemOf(other), pemOf(own), pemOf(leaf), pemOf(ca, another)];

    for (const ca of trusts) {
      const trust = ca === undefined ? { verify: true } : { verify: true, ca };
      await rejects(probe(`127.0.0.1:${bySelf.port}`, trust), datesError("own"));
      await rejects(probe(`127.0.0.1:${byCa.port}`, trust), datesError("leaf"));
    }
  });

  Deno.test(`an intermediate certificate that is ${dates} is reported as such, unless the server's own is trusted`, async () => {
    const ca = await issue("ca", valid, true);
    const middle = await issue("middle", period, true, ca);
    const leaf = await issue("leaf", valid, false, middle);
    await using server = await serveChain(leaf, middle);

    await rejects(probe(`127.0.0.1:${server.port}`, { verify: true, ca: pemOf(ca) }), datesError("middle"));
    strictEqual(await probe(`127.0.0.1:${server.port}`, { verify: true, ca: pemOf(leaf) }), true);
  });

  Deno.test(`a root that a server shows and that is ${dates} is not reported when another one is trusted`, async () => {
    const [root, other] = await Promise.all([issue("root", period, true), issue("other", valid, true)]);
    const leaf = await issue("leaf", valid, false, root);
    await using server = await serveChain(leaf, root);

    await rejects(
      probe(`127.0.0.1:${server.port}`, { verify: true, ca: pemOf(other) }),
      notConnected(/^unable to verify the first certificate$/),
    );
  });
}

Deno.test("doctor's advice for a certificate with bad dates is to renew it", () => {
  const reason = "certificate has expired: CN=lightos was valid until 2026-01-01T00:00:00.000Z";

  match(adviceFor(reason, { verify: true }), /^renew the cluster's certificate/);
});

// ------------------------------------------------------------------------------------------------- servers that cheat

const ignore = !needs("go");

async function withCheat(args: readonly string[], body: (address: string, own: Certificate) => Promise<void>) {
  const directory = mkdtempSync("/tmp/lbcsi-tls-");
  try {
    const own = await certificate();
    writeFileSync(`${directory}/cert.pem`, own.cert);
    writeFileSync(`${directory}/key.pem`, own.key);
    const built = await new Deno.Command("go", {
      args: ["build", "-o", `${directory}/server`, "."],
      cwd: fileURLToPath(new URL("../go/tls_server", import.meta.url)),
      env: { GOFLAGS: "-mod=readonly -buildvcs=false", GOWORK: "off", GOTOOLCHAIN: "local" },
    }).output();
    ok(built.success, new TextDecoder().decode(built.stderr));
    const child = new Deno.Command(`${directory}/server`, {
      args: [`${directory}/cert.pem`, ...args.map((arg) => arg === "key" ? `${directory}/key.pem` : arg)],
      stdout: "piped",
      stderr: "null",
    }).spawn();
    try {
      const reader = child.stdout.pipeThrough(new TextDecoderStream()).getReader();
      const { value = "" } = await reader.read();
      await body(`127.0.0.1:${value.trim()}`, own);
      await reader.cancel();
    } finally {
      child.kill();
      await child.status;
    }
  } finally {
    rmSync(directory, { recursive: true });
  }
}

Deno.test({
  name: "promise 11: a server that shows a trusted certificate without its key is refused",
  ignore,
  fn: () =>
    withCheat(["forged"], async (address, own) => {
      await rejects(probe(address, { ca: own.ca, verify: true }), notConnected(/./));
      await rejects(probe(address, { ca: own.cert, verify: true }), notConnected(/./));
    }),
});

Deno.test({
  name: "promise 27: a server with junk in its chain of certificates is a failed connection, and the process goes on",
  ignore,
  fn: () =>
    withCheat(["key", "junk"], async (address, own) => {
      const words = notConnected(/^the certificates that the server shows cannot be read$/);
      await rejects(probe(address, { ca: own.ca, verify: true }), words);
      await rejects(probe(address, { ca: own.cert, verify: true }), words);
    }),
});

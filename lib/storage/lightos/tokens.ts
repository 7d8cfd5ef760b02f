/**
 * The tokens (JWT) that calls to LightOS' management API carry: where a call gets its token from, which servers may
 * receive the token of the process, and what may be shown of a token.
 */
import { Buffer } from "node:buffer";
import { StatusError } from "../../error.ts";
import type { Trust } from "../../grpc/tls.ts";
import type { KnownCluster } from "./cluster_file.ts";
import type { LightosOptions } from "./cluster.ts";

/** What may be shown of a token: none of its characters. */
export interface TokenFacts {
  /** Where it came from, or why there is none. */
  readonly source: string;
  /** `other` is something that is not a JSON Web Token. */
  readonly kind: "none" | "JWT" | "other";
  readonly expires: Date | undefined;
  /** It is valid from then on, or was made then. */
  readonly begins: Date | undefined;
}

/** The token of one call. */
export interface Credentials {
  readonly jwt: string | undefined;
  /** Where the token came from, for messages. */
  readonly source: string;
}

/** What decides which token a call gets. */
export interface TokenRequest {
  /** The token in the secrets of the call. */
  readonly secretJwt: string | undefined;
  /** Whether the secrets of the call bring the certificates to trust. */
  readonly hasSecretCa: boolean;
  /** The cluster that is called, when the cluster file has it. */
  readonly known: KnownCluster | undefined;
  /** How the server has to prove who it is; undefined: clear text. */
  readonly trust: Trust | undefined;
}

/**
 * The token of a call: that of its secrets, else that of the cluster file, else that of the process, if the server may
 * receive it.
 *
 * @throws StatusError INVALID_ARGUMENT when the token holds blanks or control characters
 */
export function selectCredentials(options: LightosOptions, request: TokenRequest): Credentials {
  const { secretJwt, known } = request;
  if (secretJwt !== undefined) {
    return toCredentials(secretJwt, 'key "jwt" of the call\'s secrets', 'key "jwt" in the secrets is empty');
  }
  const missing = (source: string) => `no key "jwt" in the secrets, and none that can be read in ${source}`;
  if (known?.jwtPath !== undefined) {
    const source = `${known.jwtPath} of cluster "${known.name}"`;
    return toCredentials(known.jwt(), source, missing(source));
  }
  const { globalJwt, globalJwtPath } = options;
  const token = globalJwt();
  const obstacle = obstacleToGlobalToken(options, request);
  if (obstacle === undefined || (token ?? "").trim() === "") {
    return toCredentials(token, globalJwtPath, missing(globalJwtPath));
  }
  const withheld =
    `no key "jwt" in the secrets, and that of ${globalJwtPath} is not sent here: ${obstacle}; ${tokenAdvice}`;
  return toCredentials(undefined, globalJwtPath, withheld);
}

/** What may be shown of the token of a call. */
export function tokenFacts({ jwt, source }: Credentials): TokenFacts {
  const facts = { source, expires: undefined, begins: undefined };
  if (jwt === undefined) return { ...facts, kind: "none" };
  const [, claims, signature, ...rest] = jwt.split(".");
  if (claims === undefined || signature === undefined || rest.length > 0) return { ...facts, kind: "other" };
  try {
    const { exp, nbf, iat } = JSON.parse(Buffer.from(claims, "base64url").toString());
    return { source, kind: "JWT", expires: claimDate(exp), begins: claimDate(nbf) ?? claimDate(iat) };
  } catch {
    return { ...facts, kind: "other" };
  }
}

/** When a token ends, as the end of a message about a token that was not accepted; nothing else of it is shown. */
export function describeLifetime(credentials: Credentials): string {
  const { kind, expires } = tokenFacts(credentials);
  if (kind === "other") return ", which is not a JSON Web Token";
  if (expires === undefined) return "";
  return `, which ${expires.getTime() < Date.now() ? "expired" : "is valid until"} ${expires.toISOString()}`;
}

/** What a user can do when the token of the process is withheld. */
const tokenAdvice =
  'put "jwt" into the Secret of the StorageClass, or the cluster with its "jwt" into the cluster file ' +
  "(--config), or give the CA of the clusters by --mgmt-ca and speak TLS, or start the controller with --jwt-for-any-endpoint";

/**
 * The token as a header can carry it.
 *
 * @param source where it comes from, for messages
 * @param missing what a message says when there is none
 * @throws StatusError INVALID_ARGUMENT when it holds blanks or control characters
 */
function toCredentials(text: string | undefined, source: string, missing: string): Credentials {
  const jwt = text?.trim() ?? "";
  if (jwt === "") return { jwt: undefined, source: `none was given: ${missing}` };
  if (!/^[\x21-\x7e]+$/.test(jwt)) {
    throw new StatusError(
      "INVALID_ARGUMENT",
      `Cannot use the JWT of ${source}: it holds blanks or control characters`,
    );
  }
  return { jwt, source };
}

/**
 * Why the server does not receive the token of the process; undefined: it does.
 *
 * Users who may write a StorageClass choose the endpoint, the Secret and with it the certificates to trust. They must
 * not be able to have the token of the process sent to a server of their own, or sent where others can read it.
 */
function obstacleToGlobalToken(
  { globalJwtFor, verifyTls }: LightosOptions,
  { hasSecretCa, known, trust }: TokenRequest,
): string | undefined {
  if (globalJwtFor === "any endpoint") return undefined;
  if (trust === undefined) return "clear text would show it";
  if (known !== undefined) {
    // The operator decides whether a cluster of the file is verified; a Secret does not.
    const isVerifiedByOperator = known.trust.verify ?? verifyTls;
    return trust.verify || !isVerifiedByOperator ? undefined : "the call's Secret turns verification off";
  }
  if (!trust.verify) return "the server's certificate is not verified";
  if (globalJwtFor === "cluster file") return "the endpoint is not in the cluster file, and there is no --mgmt-ca";
  if (!hasSecretCa) return undefined;
  return "the endpoint is not in the cluster file, and the certificate to trust is the call's and not that of --mgmt-ca";
}

/** RFC 7519: seconds since 1970. The range is that of dates that have a text. */
function claimDate(claim: unknown): Date | undefined {
  return typeof claim === "number" && Math.abs(claim) < 8.64e12 ? new Date(claim * 1000) : undefined;
}

/**
 * The tokens of the simulated cluster: JSON Web Tokens that it signs itself with HMAC-SHA-256.
 *
 * A real cluster verifies RS256 signatures with public keys that an operator stores on it. To a client both are an opaque
 * text in `authorization: Bearer`.
 */
import { createHmac, timingSafeEqual } from "node:crypto";
import * as z from "zod";

/** The rights of a caller. */
export type Caller =
  | { readonly scope: "cluster" }
  | { readonly scope: "projects"; readonly projects: readonly string[] };

/** Issues and checks tokens. */
export interface Tokens {
  /** @param lifeMs how long the token is valid; negative: it has expired */
  issue(caller: Caller, lifeMs?: number): string;
  /** The caller, or what is wrong with the token. */
  check(token: string): Caller | string;
}

const yearMs = 365 * 24 * 3600 * 1000;
const clusterAdmin = "system:cluster-admin";
const claimsSchema = z.object({ exp: z.number(), roles: z.array(z.string()) });

/** Issues and checks tokens that are signed with `key`. */
export function createTokens(key: Uint8Array): Tokens {
  const sign = (text: string) => createHmac("sha256", key).update(text).digest("base64url");
  return {
    issue(caller, lifeMs = 10 * yearMs) {
      const roles = caller.scope === "cluster" ? [clusterAdmin] : caller.projects.map((name) => `${name}:admin`);
      const seconds = Math.floor(Date.now() / 1000);
      const head = encode({ alg: "HS256", typ: "JWT" });
      const body = encode({
        iss: "lbcsi simulate",
        aud: "LightOS",
        sub: caller.scope,
        iat: seconds,
        exp: seconds + Math.floor(lifeMs / 1000),
        roles,
      });
      return `${head}.${body}.${sign(`${head}.${body}`)}`;
    },
    check(token) {
      const [head, body, signature, ...rest] = token.split(".");
      if (head === undefined || body === undefined || signature === undefined || rest.length > 0) {
        return "it is not a JSON Web Token";
      }
      const expected = Buffer.from(sign(`${head}.${body}`));
      const given = Buffer.from(signature);
      if (given.length !== expected.length || !timingSafeEqual(given, expected)) return "its signature is wrong";
      const claims = claimsSchema.parse(JSON.parse(Buffer.from(body, "base64url").toString()));
      if (claims.exp * 1000 <= Date.now()) return "it has expired";
      if (claims.roles.includes(clusterAdmin)) return { scope: "cluster" };
      return { scope: "projects", projects: claims.roles.map((role) => role.replace(/:.*$/, "")) };
    },
  };
}

function encode(value: unknown): string {
  return Buffer.from(JSON.stringify(value)).toString("base64url");
}

/** Removes secrets from what a server says: a server may repeat the token and the keys of hosts that it received. */
import { Buffer } from "node:buffer";

/** The longest text of a server that goes into a message: Kubernetes keeps 1 KiB of an event. */
const longestText = 2000;

/**
 * A server may cut short what it repeats. Pieces of a secret that are shorter than this are of no use to an attacker.
 */
const leastPiece = 16;

/**
 * What a server said, without the token, without the keys of hosts in `request`, and cut to a length that fits into a
 * message.
 */
export function withoutSecrets(text: string, request: unknown, jwt: string | undefined): string {
  const { hostSecret, targetSecret } = request as { readonly hostSecret?: string; readonly targetSecret?: string };
  const secrets = [[jwt, "[token]"], [hostSecret, "[key]"], [targetSecret, "[key]"]] as const;
  let plain = text;
  for (const [secret = "", mark] of secrets) for (const form of formsOf(secret)) plain = plain.replaceAll(form, mark);
  const isCut = plain.length > longestText;
  plain = plain.slice(0, longestText);
  for (const [secret = "", mark] of secrets) plain = withoutPieces(plain, secret, mark);
  return isCut ? `${plain} …` : plain;
}

/** Removes a token from all strings of an answer, in place: names and states in it get into messages. */
export function removeToken(answer: unknown, jwt: string | undefined): void {
  if (jwt === undefined || typeof answer !== "object" || answer === null || ArrayBuffer.isView(answer)) return;
  const fields = answer as Record<string, unknown>;
  for (const key of Object.keys(fields)) {
    const value = fields[key];
    if (typeof value === "object") removeToken(value, jwt);
    else if (typeof value === "string" && value.length >= jwt.length && value.includes(jwt)) {
      fields[key] = value.replaceAll(jwt, "[token]");
    }
  }
}

/**
 * The texts by which a server may repeat a secret, the longest first: as it is, without padding, in base64, and each of
 * these percent-encoded. A server that tries harder can hide it.
 */
function formsOf(secret: string): readonly string[] {
  if (secret === "") return [];
  const base64 = Buffer.from(secret).toString("base64");
  const others = [
    secret.replace(/=+$/, ""),
    base64,
    base64.replace(/=+$/, ""),
    Buffer.from(secret).toString("base64url"),
    ...secret.split(/[.:]/),
  ];
  const plain = [secret, ...others.filter((form) => form.length >= leastPiece)];
  const forms = new Set(plain.flatMap((form) => [form, encodeURIComponent(form)]));
  return [...forms].sort((one, other) => other.length - one.length);
}

/** The text with a mark in place of each piece of the secret. */
function withoutPieces(text: string, secret: string, mark: string): string {
  let plain = "";
  for (let at = 0; at < text.length;) {
    let end = at + leastPiece;
    if (end > text.length || !secret.includes(text.slice(at, end))) {
      plain += text.charAt(at++);
      continue;
    }
    while (end < text.length && secret.includes(text.slice(at, end + 1))) end++;
    plain += mark;
    at = end;
  }
  return plain;
}

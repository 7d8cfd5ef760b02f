/**
 * How a cluster's management API has to prove who it is, over TLS.
 *
 * The secrets of a call say so, else the cluster file, else the options of the process. A StorageClass may say it too,
 * with the keys of the secrets. But only CreateVolume sees the class; the calls that publish, expand and delete the
 * volume have its ID and their secrets, and the driver remembers nothing. A class that says what these calls cannot
 * know would make volumes that cannot be deleted, so it has to agree with what applies without it.
 */
import * as z from "zod";
import type { RequestContext } from "../../context.ts";
import { StatusError } from "../../error.ts";
import type { Trust } from "../../grpc/tls.ts";

/** `192.0.2.1`, `lightos.example`; IPv6 without brackets. */
const serverName = z.string().trim().regex(
  /^[0-9A-Za-z]([0-9A-Za-z.:-]{0,251}[0-9A-Za-z])?$/,
  "is not a host name or IP address",
);

const pins = z.string().transform((text) => text.split(",")).pipe(
  z.array(
    z.string().trim().regex(
      /^sha256\/\/[0-9A-Za-z+/]{43}=$/,
      'is not "sha256//" and the base64 of a SHA-256 (44 characters)',
    ),
  ),
);

const onOff = z.string().trim().toLowerCase().pipe(z.enum(["true", "false"], { error: 'is not "true" or "false"' }))
  .transform((text) => text === "true");

/** Keys of secrets and of StorageClass parameters. */
export const trustSchema = {
  "mgmt-server-name": serverName.optional(),
  "mgmt-tls-pin": pins.optional(),
  "mgmt-tls-verify": onOff.optional(),
};

/** The same as keys of the cluster file. */
export const trustConfigSchema = {
  serverName: serverName.optional(),
  tlsPin: z.union([pins, z.array(z.string()).transform((list) => list.join(",")).pipe(pins)]).optional(),
  tlsVerify: z.boolean({ error: "is not true or false" }).optional(),
};

/** What one of these sources says. */
export interface TrustOptions {
  readonly serverName?: string | undefined;
  readonly pins?: readonly string[] | undefined;
  readonly verify?: boolean | undefined;
}

/** The options in values that `trustSchema` has read. */
export function parseTrustOptions(values: {
  readonly "mgmt-server-name"?: string | undefined;
  readonly "mgmt-tls-pin"?: readonly string[] | undefined;
  readonly "mgmt-tls-verify"?: boolean | undefined;
}): TrustOptions {
  return {
    serverName: values["mgmt-server-name"],
    pins: values["mgmt-tls-pin"],
    verify: values["mgmt-tls-verify"],
  };
}

/**
 * What applies: each part comes from the first source that has it.
 *
 * @throws StatusError INVALID_ARGUMENT when keys are pinned and the certificate is not verified, because then the pins
 *   would have no effect
 */
export function resolveTrust(ca: string | undefined, ...sources: readonly TrustOptions[]): Trust {
  const first = <T>(pick: (source: TrustOptions) => T | undefined) =>
    sources.map(pick).find((value) => value !== undefined);
  const pins = first((source) => source.pins);
  const name = first((source) => source.serverName);
  const verify = first((source) => source.verify) ?? true;
  if (!verify && pins !== undefined) {
    throw new StatusError(
      "INVALID_ARGUMENT",
      "Cannot trust the management API: a public key is pinned, but its certificate is not to be verified (mgmt-tls-verify); " +
        "for a self-signed one, give the certificate itself as the CA",
    );
  }
  return {
    verify,
    ...(ca === undefined ? {} : { ca }),
    ...(name === undefined ? {} : { serverName: name }),
    ...(pins === undefined ? {} : { pins: [...pins].sort() }),
  };
}

/**
 * Rejects a StorageClass that says something else than what applies without it.
 *
 * @param trust what applies; undefined: clear text
 * @throws StatusError INVALID_ARGUMENT that names the parameters
 */
export function assertSameTrust(ctx: RequestContext, stated: TrustOptions, trust: Trust | undefined): void {
  const parts = [
    ["mgmt-server-name", stated.serverName, trust?.serverName],
    ["mgmt-tls-pin", stated.pins?.toSorted().join(","), trust?.pins?.join(",")],
    ["mgmt-tls-verify", stated.verify, trust?.verify],
  ] as const;
  const parameterError = (problem: string) => ctx.error("INVALID_ARGUMENT", `StorageClass parameter ${problem}`);
  for (const [key, value, actual] of parts) {
    if (value === undefined || value === actual) continue;
    if (trust === undefined) {
      throw parameterError(`"${key}" is given, but "mgmt-scheme" is "grpc", which is clear text`);
    }
    throw parameterError(
      `"${key}" "${value}" is not what the secrets, the cluster file or the controller's options say (${
        actual === undefined ? "nothing" : `"${actual}"`
      }); calls that publish or delete the volume do not see the StorageClass, so put "${key}" into its Secret too`,
    );
  }
}

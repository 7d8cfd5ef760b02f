/** The identity of a simulated cluster between runs: UUIDs, addresses, token key, certificate and ports. */
import { join } from "node:path";
import * as z from "zod";
import type { Scheme } from "../../volume_id.ts";
import { readState, stateText, writeState } from "../state_file.ts";
import type { ClusterIdentity } from "./model.ts";

/** The settings that an identity depends on. */
export interface IdentitySettings {
  readonly host: string;
  readonly servers: number;
  readonly schemes: readonly Scheme[];
  readonly clusterName: string;
}

const identitySchema = z.object({
  format: z.literal(1),
  identity: z.object({
    uuid: z.string(),
    name: z.string(),
    subsystemNqn: z.string(),
    servers: z.array(z.object({
      uuid: z.string(),
      nodeUuid: z.string(),
      name: z.string(),
      nvmeEndpoint: z.string(),
      discoveryEndpoint: z.string(),
    })),
  }),
  /** Key of the tokens, base64url. */
  key: z.string(),
  certificate: z.object({ key: z.string(), cert: z.string(), ca: z.string(), host: z.string() }).optional(),
  ports: z.record(z.string(), z.array(z.number())),
  controlPort: z.number().optional(),
});
/** What a simulator keeps between runs besides its model. */
export type IdentityRecord = z.infer<typeof identitySchema>;

/**
 * The identity in a state directory, or a new one, with as many servers as `settings` ask for and a certificate when TLS is
 * served. Throws FAILED_PRECONDITION when the file cannot be read.
 */
export async function readIdentity(stateDir: string | undefined, settings: IdentitySettings): Promise<IdentityRecord> {
  const found = stateDir === undefined
    ? undefined
    : await readState(join(stateDir, "identity.json"), identitySchema, "the simulator's identity");
  const record: IdentityRecord = found ?? {
    format: 1,
    identity: newIdentity(settings.clusterName),
    key: Buffer.from(crypto.getRandomValues(new Uint8Array(32))).toString("base64url"),
    ports: {},
  };
  const { servers } = record.identity;
  for (let number = servers.length; number < settings.servers; number++) servers.push(newServer(number, settings.host));
  servers.length = settings.servers;
  if (settings.schemes.includes("grpcs") && record.certificate?.host !== settings.host) {
    const { selfSigned } = await import("../certificate.ts");
    record.certificate = { ...await selfSigned([settings.host]), host: settings.host };
  }
  if (stateDir !== undefined) writeIdentity(stateDir, record);
  return record;
}

/** Stores the identity in a state directory. */
export function writeIdentity(stateDir: string, record: IdentityRecord): void {
  writeState(join(stateDir, "identity.json"), stateText(record));
}

function newIdentity(name: string): ClusterIdentity & { servers: [] } {
  const uuid = crypto.randomUUID();
  return { uuid, name, subsystemNqn: `nqn.2016-01.com.lightbitslabs:uuid:${uuid}`, servers: [] };
}

function newServer(number: number, host: string): IdentityRecord["identity"]["servers"][number] {
  // On the loopback network each server has its own address: all of 127/8 is this machine.
  const isLoopback = host.startsWith("127.") || host === "localhost";
  const address = isLoopback ? `127.0.0.${number + 1}` : host.includes(":") ? `[${host}]` : host;
  const shift = isLoopback ? 0 : number;
  return {
    uuid: crypto.randomUUID(),
    nodeUuid: crypto.randomUUID(),
    name: `server${number}`,
    nvmeEndpoint: `${address}:${4420 + shift}`,
    discoveryEndpoint: `${address}:${8009 + shift}`,
  };
}

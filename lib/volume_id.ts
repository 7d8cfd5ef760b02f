/**
 * Volume and snapshot IDs of LightOS: the incumbent driver's text form, key for key, so that existing PersistentVolumes
 * keep working (docs/reference/lightos-api.md section 2).
 *
 *     id        = "mgmt:" endpoints "|nguid:" uuid [ "|proj:" project ] [ "|scheme:" scheme ] [ "|hostcrypto:luks2" ]
 *     endpoints = endpoint *( "," endpoint )
 *     endpoint  = ( name-or-IPv4 / "[" IPv6 "]" ) ":" port
 *     scheme    = "grpc" / "grpcs"                      ; absent: grpcs
 *     project   = 1 to 63 of a-z 0-9 "." "-", with a-z 0-9 at both ends
 *
 * An ID says which volume on which cluster, and never changes. Its endpoints are a way to the cluster, and may be out
 * of date.
 *
 * IDs of PoseidonOS have a form of our own, because a name alone does not identify a volume for ever:
 *
 *     id        = "pos:" endpoint "|array:" array-name "|vol:" volume-name "|uuid:" uuid
 *
 * The UUID decides: a volume that was renamed is found by it, and a new volume with an old name is not mistaken for it.
 */
import { StatusError } from "./error.ts";
import { hasUuidForm, isUuid, nilUuid } from "./uuid.ts";

/** How the management API is spoken: `grpc` is clear text, `grpcs` is TLS. */
export const schemes = ["grpc", "grpcs"] as const;
export type Scheme = typeof schemes[number];

/** A management endpoint of a cluster. */
export interface Endpoint {
  /** Host name, IPv4 or IPv6 address, without brackets. */
  readonly host: string;
  readonly port: number;
}

/** Which volume (or snapshot) on which cluster. */
export interface VolumeId {
  /** Sorted by text, without duplicates, never empty. */
  readonly endpoints: readonly Endpoint[];
  /** UUID of the volume or snapshot, lower case; of a volume also the NVMe namespace UUID. */
  readonly uuid: string;
  readonly project: string | undefined;
  readonly scheme: Scheme;
  /** How the node encrypts the volume, if it does. */
  readonly hostEncryption: "luks2" | undefined;
}

/**
 * Reads a volume or snapshot ID.
 *
 * @param what names the object in the error: `volume`, `snapshot`
 * @throws StatusError NOT_FOUND when `text` is not an ID of this driver: nothing of that name can exist (CSI's tools
 *   and admins of static volumes send such IDs, and delete-like calls answer them with success)
 */
export function parseVolumeId(text: string, what = "volume"): VolumeId {
  const malformed = (problem: string) =>
    new StatusError("NOT_FOUND", `Cannot find ${what} "${text}": its ID is not one of this driver, ${problem}`);
  const fields = new Map<string, string>();
  let last = -1;
  for (const segment of text.split("|")) {
    const colon = segment.indexOf(":");
    const key = segment.slice(0, Math.max(colon, 0));
    const at = segmentOrder.indexOf(key);
    if (at < 0) throw malformed(`"${segment}" is not one of ${segmentOrder.join(":…, ")}:…`);
    if (fields.has(key)) throw malformed(`${key} is given twice`);
    if (at < last) throw malformed(`${key} is out of order`);
    last = at;
    fields.set(key, segment.slice(colon + 1));
  }
  const mgmt = fields.get("mgmt");
  if (mgmt === undefined) throw malformed("mgmt is missing");
  const endpoints = parseEndpoints(mgmt);
  if (typeof endpoints === "string") throw malformed(endpoints);
  const uuid = fields.get("nguid")?.toLowerCase();
  if (uuid === undefined) throw malformed("nguid is missing");
  if (!hasUuidForm(uuid)) throw malformed(`nguid "${uuid}" is not a UUID`);
  if (uuid === nilUuid) throw malformed("nguid is the nil UUID");
  const project = fields.get("proj");
  if (project !== undefined && !isProjectName(project)) throw malformed(`proj "${project}" is not a project name`);
  const scheme = fields.get("scheme") ?? "grpcs";
  if (!isScheme(scheme)) throw malformed(`scheme "${scheme}" is not one of ${schemes.join(", ")}`);
  const crypto = fields.get("hostcrypto");
  if (crypto !== undefined && crypto !== "luks2") throw malformed(`hostcrypto "${crypto}" is not luks2`);
  return { endpoints, uuid, project, scheme, hostEncryption: crypto };
}

/** The longest ID that calls take, in bytes: CSI allows 128, IDs with the endpoints of large clusters have more. */
export const longestId = 1024;

/**
 * The length of an ID in bytes, which does not depend on its UUID; without a project, as with one of the longest name.
 */
export function longestIdBytes(id: Omit<VolumeId, "uuid">): number {
  const text = formatVolumeId({ ...id, uuid: nilUuid, project: id.project ?? "p".repeat(63) });
  return new TextEncoder().encode(text).length;
}

/** The canonical text of an ID: fixed order of segments, endpoints sorted, `scheme` always written. */
export function formatVolumeId(id: VolumeId): string {
  const parts = [`mgmt:${formatEndpoints(id.endpoints)}`, `nguid:${id.uuid}`];
  if (id.project !== undefined) parts.push(`proj:${id.project}`);
  parts.push(`scheme:${id.scheme}`);
  if (id.hostEncryption !== undefined) parts.push(`hostcrypto:${id.hostEncryption}`);
  return parts.join("|");
}

/**
 * Reads a comma list of `host:port`, as in volume IDs and in the StorageClass parameter `mgmt-endpoint`; the result is
 * sorted by text and without duplicates. Returns a text that says what is wrong when it cannot be read.
 */
export function parseEndpoints(list: string): readonly Endpoint[] | string {
  const byText = new Map<string, Endpoint>();
  for (const text of list.split(",")) {
    const match = /^(?:\[([A-Za-z0-9.%:-]+)\]|([A-Za-z0-9.%-]+)):(\d+)$/.exec(text);
    if (match === null) return `"${text}" is not host:port`;
    const host = match[1] ?? match[2] ?? "";
    const port = Number(match[3]);
    if (port > 65535) return `port ${match[3]} of "${text}" is above 65535`;
    const endpoint = { host, port };
    byText.set(formatEndpoint(endpoint), endpoint);
  }
  return [...byText].sort(([a], [b]) => a < b ? -1 : 1).map(([, endpoint]) => endpoint);
}

/** `host:port`, with brackets around an IPv6 address. */
export function formatEndpoint({ host, port }: Endpoint): string {
  return host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
}

/** The canonical comma list. */
export function formatEndpoints(endpoints: readonly Endpoint[]): string {
  return endpoints.map(formatEndpoint).join(",");
}

/** Whether LightOS accepts `text` as the name of a project. */
export function isProjectName(text: string): boolean {
  return /^[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?$/.test(text);
}

/** Which volume on which array of a PoseidonOS. */
export interface PoseidonVolumeId {
  /** The DAgent that answered for the array when the ID was made. */
  readonly endpoint: Endpoint;
  readonly array: string;
  /** Its name then. */
  readonly name: string;
  /** UUID of the volume, lower case, and of its NVMe namespace. */
  readonly uuid: string;
}

/** Reads the ID of a volume on PoseidonOS; throws NOT_FOUND for a text that is none, as parseVolumeId does. */
export function parsePoseidonId(text: string): PoseidonVolumeId {
  const malformed = (problem: string) =>
    new StatusError("NOT_FOUND", `Cannot find volume "${text}": its ID is not one of this driver, ${problem}`);
  const match = /^pos:([^|]*)\|array:([^|]*)\|vol:([^|]*)\|uuid:([^|]*)$/.exec(text);
  if (match === null) throw malformed("it is not of the form pos:…|array:…|vol:…|uuid:…");
  const [, pos = "", array = "", name = "", given = ""] = match;
  const endpoints = parseEndpoints(pos);
  if (typeof endpoints === "string") throw malformed(endpoints);
  const [endpoint, ...others] = endpoints;
  if (endpoint === undefined || others.length > 0) throw malformed(`pos "${pos}" is more than one endpoint`);
  if (!isArrayName(array)) throw malformed(`array "${array}" is not the name of an array`);
  if (!isPoseidonVolumeName(name)) throw malformed(`vol "${name}" is not the name of a volume`);
  const uuid = given.toLowerCase();
  if (!isUuid(uuid)) throw malformed(`uuid "${given}" is not a UUID`);
  return { endpoint, array, name, uuid };
}

/** The text of an ID on PoseidonOS. */
export function formatPoseidonId({ endpoint, array, name, uuid }: PoseidonVolumeId): string {
  return `pos:${formatEndpoint(endpoint)}|array:${array}|vol:${name}|uuid:${uuid}`;
}

/** Whether PoseidonOS accepts `text` as the name of an array (docs/reference/poseidonos-api.md 11.1). */
export function isArrayName(text: string): boolean {
  return /^[A-Za-z0-9_-][A-Za-z0-9_ -]{0,61}[A-Za-z0-9_-]$/.test(text);
}

/** Whether PoseidonOS accepts `text` as the name of a volume (docs/reference/poseidonos-api.md 11.1). */
export function isPoseidonVolumeName(text: string): boolean {
  return /^[A-Za-z0-9_-][A-Za-z0-9_ -]{0,253}[A-Za-z0-9_-]$/.test(text);
}

/** The UUID in a volume or snapshot ID of any backend; undefined when `text` is none. */
export function uuidInId(text: string): string | undefined {
  try {
    return text.startsWith("pos:") ? parsePoseidonId(text).uuid : parseVolumeId(text).uuid;
  } catch {
    return undefined;
  }
}

const segmentOrder = ["mgmt", "nguid", "proj", "scheme", "hostcrypto"];

function isScheme(text: string): text is Scheme {
  return schemes.some((scheme) => scheme === text);
}

import * as z from "zod";
import { type AuthKind, authKinds } from "./auth_key.ts";
import { StatusError } from "./error.ts";

/** Where a controller of a subsystem listens: NVMe's `traddr` and `trsvcid`, always over TCP. */
export interface TransportAddress {
  /** IPv4 or IPv6 address, without brackets. */
  readonly traddr: string;
  /** TCP port, decimal. */
  readonly trsvcid: string;
}

/** Which namespace, and where its subsystem answers now. The controller finds it, the node needs nothing else. */
export interface RemoteNamespace {
  /** NVMe namespace UUID, lower case. */
  readonly uuid: string;
  readonly subsystemNqn: string;
  /** I/O controllers. */
  readonly addresses: readonly TransportAddress[];
  /** Discovery controllers; may be empty. */
  readonly discovery: readonly TransportAddress[];
  /** How connections to it have to be authenticated; undefined: nothing is asked for. */
  readonly inBandAuth?: AuthKind;
}

/** `192.0.2.1:4420` or `[2001:db8::1]:4420`. */
export function formatAddress({ traddr, trsvcid }: TransportAddress): string {
  return traddr.includes(":") ? `[${traddr}]:${trsvcid}` : `${traddr}:${trsvcid}`;
}

/** The reverse of formatAddress; undefined for anything that is not an IP address with a port from 1 to 65535. */
export function parseAddress(text: string): TransportAddress | undefined {
  const match = /^(?:\[([0-9A-Fa-f:.]+(?:%[A-Za-z0-9.-]+)?)\]|([0-9.]+)):(\d{1,5})$/.exec(text);
  if (match === null) return undefined;
  const [, v6, v4, port] = match;
  const traddr = v6 ?? v4 ?? "";
  const trsvcid = Number(port);
  if (trsvcid < 1 || trsvcid > 65535) return undefined;
  const plain = traddr.replace(/%.*$/, "");
  const valid = v6 === undefined ? isIpv4(plain) : isIpv6(plain);
  return valid ? { traddr, trsvcid: String(trsvcid) } : undefined;
}

function isIpv4(text: string): boolean {
  return /^(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?:\.|$)){4}$/.test(text) && !text.endsWith(".");
}

function isIpv6(text: string): boolean {
  return URL.canParse(`tcp://[${text}]`) && URL.canParse(`http://[${text}]`);
}

/** StorageClass parameter, key of the volume context and of the publish context: how connections are authenticated. */
export const inBandAuthKey = "in-band-auth";

/** An NQN without the characters that would split it in a Discovery-Client's file or in the kernel's list of options. */
const nqnPattern = /^nqn\.[^\s,#=\p{Cc}]+$/u;
const longestNqn = 223;

/** Whether `text` can be the NQN of a subsystem. */
export function isNqn(text: string): boolean {
  return text.length <= longestNqn && nqnPattern.test(text);
}

// The publish context is stored in VolumeAttachment objects, so its keys are an interface between two versions of this
// driver. `format` tells "made by us" from "made by another driver" (which leaves the map empty) and names the version.
const publishContextSchema = z.object({
  format: z.literal("lbcsi/1"),
  uuid: z.uuid(),
  "subsystem-nqn": z.string().max(longestNqn).regex(nqnPattern, "is not an NQN"),
  addresses: z.string(),
  discovery: z.string(),
  // The kind alone: every user who may read VolumeAttachments may read this map, so no key is ever in it.
  [inBandAuthKey]: z.enum(authKinds, { error: `is not one of ${authKinds.join(", ")}` }).optional(),
});

/** The namespace as a CSI publish context. */
export function toPublishContext(namespace: RemoteNamespace): Record<string, string> {
  return {
    format: "lbcsi/1",
    uuid: namespace.uuid,
    "subsystem-nqn": namespace.subsystemNqn,
    addresses: namespace.addresses.map(formatAddress).join(","),
    discovery: namespace.discovery.map(formatAddress).join(","),
    ...(namespace.inBandAuth === undefined ? {} : { [inBandAuthKey]: namespace.inBandAuth }),
  } satisfies z.input<typeof publishContextSchema>;
}

/**
 * The namespace in a publish context, or undefined when none of our keys is there: the volume was attached by another
 * driver, before this one replaced it. Throws INVALID_ARGUMENT when the context is ours but damaged.
 */
export function fromPublishContext(context: Readonly<Record<string, string>>): RemoteNamespace | undefined {
  if (context["format"] === undefined) return undefined;
  const parsed = publishContextSchema.safeParse(context);
  if (!parsed.success) {
    const problems = parsed.error.issues.map((issue) => `${issue.path.join(".")}: ${issue.message}`);
    throw new StatusError("INVALID_ARGUMENT", `Cannot read the publish context: ${problems.join("; ")}`);
  }
  const inBandAuth = parsed.data[inBandAuthKey];
  return {
    uuid: parsed.data.uuid.toLowerCase(),
    subsystemNqn: parsed.data["subsystem-nqn"],
    addresses: parseAddresses("addresses", parsed.data.addresses),
    discovery: parseAddresses("discovery", parsed.data.discovery),
    ...(inBandAuth === undefined ? {} : { inBandAuth }),
  };
}

function parseAddresses(key: string, list: string): readonly TransportAddress[] {
  if (list === "") return [];
  return list.split(",").map((text) => {
    const address = parseAddress(text);
    if (address !== undefined) return address;
    throw new StatusError(
      "INVALID_ARGUMENT",
      `Cannot read the publish context: ${key} has "${text}", an IP address with a port is needed`,
    );
  });
}

const hostNqnPrefix = "nqn.2019-09.com.lightbitslabs:host:";
// An NQN has 223 bytes at most (NVMe base specification), the prefix takes 35.
const longestNodeId = 223 - hostNqnPrefix.length;

/** What is wrong with a node ID, or undefined when it can be part of a host NQN (docs/reference/lightos-api.md section 4). */
export function nodeIdProblem(nodeId: string): string | undefined {
  if (nodeId === "") return "it is empty";
  if (nodeId.length > longestNodeId) return `it has ${nodeId.length} characters, ${longestNodeId} are allowed`;
  if (!/^[A-Za-z0-9.-]+$/.test(nodeId)) return `only letters, digits, "." and "-" are allowed`;
  return undefined;
}

/** The NVMe host NQN of a node: the same as the incumbent driver's, so that access lists of existing volumes hold. */
export function hostNqn(nodeId: string): string {
  return hostNqnPrefix + nodeId;
}

/** Whether a host NQN is one that hostNqn makes. */
export function isNodeHostNqn(nqn: string): boolean {
  return nqn.startsWith(hostNqnPrefix);
}

/** How the NQNs of the subsystems begin that this driver makes on PoseidonOS, one for each export. */
export const poseidonNqnPrefix = "nqn.2019-04.pos:lbcsi:";

/** The node ID in a host NQN; the NQN itself when another program made it. */
export function nodeIdOf(nqn: string): string {
  return nqn.startsWith(hostNqnPrefix) ? nqn.slice(hostNqnPrefix.length) : nqn;
}

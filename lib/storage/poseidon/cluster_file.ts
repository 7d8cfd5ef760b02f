/**
 * The cluster file for PoseidonOS: systems that the process is told about itself, not by a call (`lbcsi controller
 * --backend poseidon --config FILE`).
 *
 * Lists and mostly the capacity are asked for without parameters; they are served for the arrays that a file names. The
 * same file keeps old volume IDs alive: an ID holds the DAgent endpoint of the time when it was made.
 *
 *     systems:
 *       - name: rack1
 *         endpoint: 192.0.2.1:3000            # where DAgent answers today
 *         formerEndpoints: [198.51.100.1:3000] # where it answered before: volume IDs still have these
 *         idEndpoint: 198.51.100.1:3000       # what lists write into volume IDs; default: endpoint
 *         arrays: [POSArray]                  # what is listed and measured
 */
import * as z from "zod";
import type { Logger } from "../../context.ts";
import { type Endpoint, formatEndpoint, isArrayName, parseEndpoints } from "../../volume_id.ts";
import { type ConfigFiles, entryName, fileInForce, parseConfigText, refusal, textFields } from "../cluster_file.ts";

/** One PoseidonOS of the file. */
export interface KnownSystem {
  readonly name: string;
  /** Where its DAgent answers today. */
  readonly endpoint: Endpoint;
  /** Where it answered before. */
  readonly formerEndpoints: readonly Endpoint[];
  /** The endpoint in the volume IDs of lists. */
  readonly idEndpoint: Endpoint;
  /** The arrays that are listed and measured; never empty. */
  readonly arrays: readonly string[];
}

/** The systems of the file, as it is now. */
export interface KnownSystems {
  /** All of them, never none, in the order of the file. */
  all(): readonly KnownSystem[];
  /** The system that this endpoint is, or was, one of. */
  owning(endpoint: Endpoint): KnownSystem | undefined;
}

/** The systems that `path` names, looked up anew whenever the file has changed; see fileInForce for what it throws. */
export function knownSystems(path: string, files: ConfigFiles, log: Logger): KnownSystems {
  const all = fileInForce(path, files, log, (text) => parseSystems(path, text));
  return {
    all,
    owning: (endpoint) => all().find((system) => endpointsOf(system).includes(formatEndpoint(endpoint))),
  };
}

const endpointSchema = z.string({ error: "is not host:port" }).transform((text, check) => {
  const endpoints = parseEndpoints(text);
  const [endpoint, ...others] = typeof endpoints === "string" ? [] : endpoints;
  if (endpoint !== undefined && others.length === 0) return endpoint;
  check.addIssue(typeof endpoints === "string" ? endpoints : "is more than one host:port");
  return z.NEVER;
});

const systemSchema = z.strictObject({
  name: entryName,
  endpoint: endpointSchema,
  formerEndpoints: z.array(endpointSchema, { error: "is not a list of host:port" }).default([]),
  idEndpoint: endpointSchema.optional(),
  arrays: textFields("is not the name of an array, several with commas or as a list").pipe(
    z.array(z.string().refine(isArrayName, "is not the name of an array")),
  ).transform((names) => [...new Set(names)]),
}, { error: "is not a map of keys" });

const configSchema = z.strictObject({
  systems: z.array(systemSchema, { error: "is missing, give a list of systems" }).min(1, "is empty"),
}, { error: "is not a map with the key systems" });

/**
 * The systems in the text of a file.
 *
 * @param path names the file in errors
 * @throws StatusError INVALID_ARGUMENT that lists each bad key with what is wrong; two systems cannot share a name or an
 *   endpoint, for then nobody could tell whose a volume ID is
 */
export function parseSystems(path: string, text: string): readonly KnownSystem[] {
  const { systems } = parseConfigText(
    path,
    text,
    configSchema,
    (place) => Object.keys((place.length === 0 ? configSchema : systemSchema).shape),
  );
  const known = systems.map((system) => ({ ...system, idEndpoint: system.idEndpoint ?? system.endpoint }));
  const problems: string[] = [];
  const names = new Set<string>();
  const owners = new Map<string, string>();
  for (const system of known) {
    if (names.has(system.name)) problems.push(`two systems have the name "${system.name}"`);
    names.add(system.name);
    for (const endpoint of new Set(endpointsOf(system))) {
      const owner = owners.get(endpoint);
      if (owner !== undefined) problems.push(`endpoint ${endpoint} belongs to both "${owner}" and "${system.name}"`);
      owners.set(endpoint, system.name);
    }
  }
  if (problems.length > 0) throw refusal(path, problems.join("; "));
  return known;
}

function endpointsOf({ endpoint, formerEndpoints, idEndpoint }: KnownSystem): readonly string[] {
  return [endpoint, ...formerEndpoints, idEndpoint].map(formatEndpoint);
}

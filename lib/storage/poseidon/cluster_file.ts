/**
 * The cluster file of PoseidonOS: the systems of a deployment (`lbcsi controller --backend poseidon --config FILE`).
 *
 * ListVolumes, and mostly GetCapacity, come without parameters; they are served for the arrays of the file. The same
 * file keeps old volume IDs valid: an ID holds the DAgent endpoint of the time when it was made.
 *
 *     systems:
 *       - name: rack1
 *         endpoint: 192.0.2.1:3000            # where DAgent answers today
 *         formerEndpoints: [198.51.100.1:3000] # where it answered before: volume IDs still have these
 *         idEndpoint: 198.51.100.1:3000       # what lists write into volume IDs; default: endpoint
 *         arrays: [POSArray]                  # the arrays of lists and of the capacity
 */
import * as z from "zod";
import type { Logger } from "../../log.ts";
import { type Endpoint, formatEndpoint, isArrayName, parseEndpoints } from "../../volume_id.ts";
import {
  assertDistinct,
  type ConfigFiles,
  entryNameSchema,
  parseEntries,
  reloadingFile,
  textListSchema,
} from "../cluster_file.ts";

/** One PoseidonOS of the file. */
export interface KnownSystem {
  readonly name: string;
  /** Where its DAgent answers today. */
  readonly endpoint: Endpoint;
  /** Where it answered before. */
  readonly formerEndpoints: readonly Endpoint[];
  /** The endpoint in the volume IDs of lists. */
  readonly idEndpoint: Endpoint;
  /** The arrays of lists and of the capacity; never empty. */
  readonly arrays: readonly string[];
}

/** The systems of the file, as it is now. */
export interface KnownSystems {
  /** All of them, at least one, in the order of the file. */
  all(): readonly KnownSystem[];
  /** The system that this endpoint belongs to, or did. */
  owning(endpoint: Endpoint): KnownSystem | undefined;
}

/**
 * The systems of the file at `path`, which is read again whenever it has changed.
 *
 * @throws StatusError INVALID_ARGUMENT when the file cannot be used now. Later that is logged, as `reloadingFile` says
 */
export function knownSystems(path: string, files: ConfigFiles, log: Logger): KnownSystems {
  const all = reloadingFile(path, files, log, (text) => parseSystems(path, text));
  return {
    all,
    owning: (endpoint) =>
      all().find((system) => endpointsOf(system).map(formatEndpoint).includes(formatEndpoint(endpoint))),
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
  name: entryNameSchema,
  endpoint: endpointSchema,
  formerEndpoints: z.array(endpointSchema, { error: "is not a list of host:port" }).default([]),
  idEndpoint: endpointSchema.optional(),
  arrays: textListSchema("is not the name of an array, several with commas or as a list").pipe(
    z.array(z.string().refine(isArrayName, "is not the name of an array")),
  ).transform((names) => [...new Set(names)]),
}, { error: "is not a map of keys" });

/**
 * The systems in the text of a file.
 *
 * @param path names the file in errors
 * @throws StatusError INVALID_ARGUMENT that lists each bad key with what is wrong; two systems cannot share a name or an
 *   endpoint, because it would be unclear which of them a volume ID belongs to
 */
export function parseSystems(path: string, text: string): readonly KnownSystem[] {
  const systems = parseEntries(path, text, {
    plural: "systems",
    schema: systemSchema,
    keysAt: () => Object.keys(systemSchema.shape),
  });
  const known = systems.map((system) => ({ ...system, idEndpoint: system.idEndpoint ?? system.endpoint }));
  assertDistinct(path, "systems", known.map((system) => ({ name: system.name, endpoints: endpointsOf(system) })));
  return known;
}

function endpointsOf({ endpoint, formerEndpoints, idEndpoint }: KnownSystem): readonly Endpoint[] {
  return [endpoint, ...formerEndpoints, idEndpoint];
}

/**
 * Whether an answer of LightOS' management API fits what was asked (facts: docs/reference/lightos-api.md sections 6.6, 6.7 and 15.1).
 *
 * UUIDs, names, projects and NQNs in answers become parts of volume IDs, of paths and of arguments of commands, and two
 * claims whose IDs name one volume would destroy each other's data. So an answer about another object, or with something
 * that is not a UUID, name or NQN, is never used.
 */
import { isProjectName, isUuid } from "../../volume_id.ts";
import { isNqn } from "../../namespace.ts";

/** What answers have of a volume or a snapshot. */
interface Described {
  readonly UUID: string;
  readonly name: string;
  readonly projectName: string;
  readonly sourceVolumeUUID?: string;
}

/** What requests have; a field that was not given is empty. */
interface Asked {
  readonly UUID?: string;
  readonly name?: string;
  readonly projectName?: string;
  readonly sourceVolumeUUID?: string;
}

/**
 * Why the answer to a call cannot be used; undefined when it fits.
 *
 * @param method name of the RPC; of one without objects in its answer nothing is checked
 */
export function misfit(method: string, request: unknown, answer: unknown): string | undefined {
  const asked = request as Asked;
  switch (method) {
    case "GetVolume":
    case "CreateVolume":
      return objectMisfit("volume", asked, answer as Described);
    case "GetSnapshot":
    case "CreateSnapshot":
      return objectMisfit("snapshot", asked, answer as Described);
    case "ListVolumes":
      return listMisfit("volume", asked, (answer as { readonly volumes: readonly Described[] }).volumes);
    case "ListSnapshots":
      return listMisfit("snapshot", asked, (answer as { readonly snapshots: readonly Described[] }).snapshots);
    case "GetClusterInfo": {
      const { subsystemNQN } = answer as { readonly subsystemNQN: string };
      // Before its installation has ended, a cluster has none.
      return subsystemNQN === "" || isNqn(subsystemNQN)
        ? undefined
        : `subsystem NQN ${quoted(subsystemNQN)}, which is none`;
    }
    default:
      return undefined;
  }
}

function objectMisfit(what: string, asked: Asked, found: Described): string | undefined {
  const { UUID = "", name = "", sourceVolumeUUID: source = "" } = asked;
  const malformed = malformedPart(what, found);
  if (malformed !== undefined) return malformed;
  if (UUID !== "" && found.UUID.toLowerCase() !== UUID.toLowerCase()) {
    return `${what} ${found.UUID}, asked was ${what} ${UUID}`;
  }
  if (UUID === "" && name !== "" && found.name !== name) {
    return `${what} ${found.UUID} of name ${quoted(found.name)}, asked was name ${quoted(name)}`;
  }
  if (source !== "" && found.sourceVolumeUUID?.toLowerCase() !== source.toLowerCase()) {
    return `${what} ${found.UUID} of volume ${quoted(found.sourceVolumeUUID ?? "")}, asked was volume ${source}`;
  }
  return projectMisfit(what, asked, found);
}

function listMisfit(what: string, asked: Asked, list: readonly Described[]): string | undefined {
  const seen = new Set<string>();
  for (const found of list) {
    const problem = malformedPart(what, found) ?? projectMisfit(what, asked, found);
    if (problem !== undefined) return problem;
    const uuid = found.UUID.toLowerCase();
    if (seen.has(uuid)) return `${what} ${uuid} twice`;
    seen.add(uuid);
  }
  return undefined;
}

function malformedPart(what: string, { UUID, projectName, sourceVolumeUUID = "" }: Described): string | undefined {
  if (!isUuid(UUID)) return `${what} ${quoted(UUID)}, which is not a UUID`;
  if (projectName !== "" && !isProjectName(projectName)) {
    return `${what} ${UUID} in project ${quoted(projectName)}, which is not the name of a project`;
  }
  // Of a snapshot whose volume is gone it may be missing.
  if (sourceVolumeUUID !== "" && !isUuid(sourceVolumeUUID)) {
    return `${what} ${UUID} of volume ${quoted(sourceVolumeUUID)}, which is not a UUID`;
  }
  return undefined;
}

function projectMisfit(what: string, { projectName: asked = "" }: Asked, found: Described): string | undefined {
  if (asked === "" || found.projectName === "" || asked === found.projectName) return undefined;
  return `${what} ${found.UUID} in project ${quoted(found.projectName)}, asked was project ${quoted(asked)}`;
}

/** For messages: visible, and not endless. */
export function quoted(text: string): string {
  return JSON.stringify(text.length <= 100 ? text : `${text.slice(0, 100)}…`);
}

/**
 * Whether an answer of LightOS' management API fits the request (facts: docs/reference/lightos-api.md sections 6.6, 6.7
 * and 15.1).
 *
 * UUIDs, names, projects and NQNs in answers become parts of volume IDs, of paths and of arguments of commands, and two
 * claims whose IDs name the same volume would destroy each other's data. So an answer about another object, or with
 * something that is not a UUID, name or NQN, is never used.
 */
import { isUuid } from "../../uuid.ts";
import { isProjectName } from "../../volume_id.ts";
import { isNqn } from "../../namespace.ts";

/** The fields of a volume or a snapshot in answers. */
interface AnsweredObject {
  readonly UUID: string;
  readonly name: string;
  readonly projectName: string;
  readonly sourceVolumeUUID?: string;
}

/** The fields of requests; one that was not given is empty. */
interface RequestedObject {
  readonly UUID?: string;
  readonly name?: string;
  readonly projectName?: string;
  readonly sourceVolumeUUID?: string;
}

/**
 * Why the answer to a call cannot be used; undefined when it fits.
 *
 * @param method name of the RPC; answers without objects are not checked
 */
export function answerProblem(method: string, request: unknown, answer: unknown): string | undefined {
  const asked = request as RequestedObject;
  switch (method) {
    case "GetVolume":
    case "CreateVolume":
      return objectProblem("volume", asked, answer as AnsweredObject);
    case "GetSnapshot":
    case "CreateSnapshot":
      return objectProblem("snapshot", asked, answer as AnsweredObject);
    case "ListVolumes":
      return listProblem("volume", asked, (answer as { readonly volumes: readonly AnsweredObject[] }).volumes);
    case "ListSnapshots":
      return listProblem("snapshot", asked, (answer as { readonly snapshots: readonly AnsweredObject[] }).snapshots);
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

function objectProblem(what: string, asked: RequestedObject, found: AnsweredObject): string | undefined {
  const { UUID = "", name = "", sourceVolumeUUID: source = "" } = asked;
  const badForm = formProblem(what, found);
  if (badForm !== undefined) return badForm;
  if (UUID !== "" && found.UUID.toLowerCase() !== UUID.toLowerCase()) {
    return `${what} ${found.UUID}, asked was ${what} ${UUID}`;
  }
  if (UUID === "" && name !== "" && found.name !== name) {
    return `${what} ${found.UUID} of name ${quoted(found.name)}, asked was name ${quoted(name)}`;
  }
  if (source !== "" && found.sourceVolumeUUID?.toLowerCase() !== source.toLowerCase()) {
    return `${what} ${found.UUID} of volume ${quoted(found.sourceVolumeUUID ?? "")}, asked was volume ${source}`;
  }
  return projectProblem(what, asked, found);
}

function listProblem(what: string, asked: RequestedObject, list: readonly AnsweredObject[]): string | undefined {
  const seen = new Set<string>();
  for (const found of list) {
    const problem = formProblem(what, found) ?? projectProblem(what, asked, found);
    if (problem !== undefined) return problem;
    const uuid = found.UUID.toLowerCase();
    if (seen.has(uuid)) return `${what} ${uuid} twice`;
    seen.add(uuid);
  }
  return undefined;
}

function formProblem(what: string, { UUID, projectName, sourceVolumeUUID = "" }: AnsweredObject): string | undefined {
  if (!isUuid(UUID)) return `${what} ${quoted(UUID)}, which is not a UUID`;
  if (projectName !== "" && !isProjectName(projectName)) {
    return `${what} ${UUID} in project ${quoted(projectName)}, which is not the name of a project`;
  }
  // The volume of a snapshot may be gone, and its UUID missing.
  if (sourceVolumeUUID !== "" && !isUuid(sourceVolumeUUID)) {
    return `${what} ${UUID} of volume ${quoted(sourceVolumeUUID)}, which is not a UUID`;
  }
  return undefined;
}

function projectProblem(
  what: string,
  { projectName: asked = "" }: RequestedObject,
  found: AnsweredObject,
): string | undefined {
  if (asked === "" || found.projectName === "" || asked === found.projectName) return undefined;
  return `${what} ${found.UUID} in project ${quoted(found.projectName)}, asked was project ${quoted(asked)}`;
}

/** The text in quotes for messages, with invisible characters shown, and cut to 100 characters. */
export function quoted(text: string): string {
  return JSON.stringify(text.length <= 100 ? text : `${text.slice(0, 100)}…`);
}

/** The RPCs of projects and QoS policies. */
import type { MessageInitShape } from "@bufbuild/protobuf";
import { type DurosAPI, Policy_State, type PolicySchema, PolicyVisibility } from "../../../../proto/gen/lightos_pb.ts";
import { StatusError } from "../../../error.ts";
import type { Handlers } from "../../../grpc/server.ts";
import type { SimPolicy } from "../model.ts";
import type { ServiceParts } from "./access.ts";

/** Projects and policies. */
export function projectRpcs({ access, cluster }: ServiceParts): Handlers<typeof DurosAPI> {
  return {
    listProjects: (_request, call) =>
      Promise.try(() => {
        const projects = cluster.listProjects().filter(({ name }) => access.mayUse(call, name));
        return { projects: projects.map(({ uuid, name, description }) => ({ UUID: uuid, name, description })) };
      }),
    getProject: (request, call) =>
      Promise.try(() => {
        const project = cluster.listProjects().find(({ name }) => name === access.admit(call, request.name));
        if (project === undefined) throw new StatusError("NOT_FOUND", `Cannot find project "${request.name}"`);
        return { UUID: project.uuid, name: project.name, description: project.description };
      }),
    listPolicies: (request, call) =>
      Promise.try(() => ({
        policies: cluster.listPolicies(access.projectFilter(call, request.projectName))
          .filter(({ uuid, name }) =>
            (request.UUID === "" || uuid === request.UUID) && (request.name === "" || name === request.name)
          )
          .map(policyMessage),
      })),
    getPolicy: (request, call) =>
      Promise.try(() => {
        const policy = cluster.listPolicies(access.projectFilter(call, request.projectName)).find(({ uuid, name }) =>
          request.UUID === "" ? name === request.name : uuid === request.UUID
        );
        if (policy !== undefined) return policyMessage(policy);
        throw new StatusError("NOT_FOUND", `Cannot find policy "${request.UUID || request.name}"`);
      }),
  };
}

function policyMessage(policy: SimPolicy): MessageInitShape<typeof PolicySchema> {
  const { read, write } = policy.limit;
  const limit = policy.limit.kind === "iops"
    ? { case: "limitIOPS" as const, value: { readIOPSLimit: read, writeIOPSLimit: write } }
    : policy.limit.kind === "bandwidth"
    ? { case: "limitBw" as const, value: { readBWLimit: read, writeBWLimit: write } }
    : { case: "limitIOPSPerGB" as const, value: { readIOPSPerGBLimit: read, writeIOPSPerGBLimit: write } };
  return {
    UUID: policy.uuid,
    name: policy.name,
    description: policy.description,
    state: Policy_State.Active,
    info: {
      case: "QoSRateLimitPolicy",
      value: {
        projectsNamesScope: [...policy.projects ?? []],
        policyVisibility: policy.projects === undefined ? PolicyVisibility.Global : PolicyVisibility.Scoped,
        QoSLimit: limit,
      },
    },
  };
}

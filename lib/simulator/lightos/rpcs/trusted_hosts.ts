/** The RPCs of in-band authentication: trusted hosts and their DH-HMAC-CHAP keys. */
import type { MessageInitShape } from "@bufbuild/protobuf";
import { type DurosAPI, TargetSecretType, type TrustedHostSchema } from "../../../../proto/gen/lightos_pb.ts";
import { StatusError } from "../../../error.ts";
import type { Handlers } from "../../../grpc/server.ts";
import type { Cluster } from "../cluster.ts";
import { longestPage } from "../listing.ts";
import type { SimTrustedHost } from "../model.ts";
import type { Caller } from "../token.ts";
import type { ServiceParts } from "./access.ts";

/** The switch of in-band authentication; creation, look-up, change and deletion of trusted hosts. */
export function trustedHostRpcs({ access, cluster }: ServiceParts): Handlers<typeof DurosAPI> {
  return {
    enableClusterInBandAuth: (_request, call) => Promise.try(() => switchInBand(cluster, access.callerOf(call), true)),
    disableClusterInBandAuth: (_request, call) =>
      Promise.try(() => switchInBand(cluster, access.callerOf(call), false)),
    createTrustedHost: (request, call) =>
      Promise.try(() => {
        const project = access.admit(call, request.projectName);
        if (cluster.trustedHosts.some((host) => host.project === project && host.name === request.name)) {
          throw new StatusError("ALREADY_EXISTS", `Cannot create trusted host "${request.name}": the name is taken`);
        }
        const host: SimTrustedHost = {
          uuid: crypto.randomUUID(),
          name: request.name,
          project,
          hostNqn: request.hostNqn,
          labels: request.labels.map(({ key, value }) => ({ key, value })),
          authRequired: request.authRequired,
          hostSecret: "",
          targetSecret: "",
        };
        cluster.putTrustedHost(host);
        return trustedHostMessage(host);
      }),
    getTrustedHost: (request, call) =>
      Promise.try(() =>
        trustedHostMessage(trustedHost(cluster, access.admit(call, request.projectName), request.name))
      ),
    listTrustedHosts: (request, call) =>
      Promise.try(() => {
        const project = access.projectFilter(call, request.projectName);
        const limit = request.limit > 0n ? Number(request.limit) : longestPage;
        const all = cluster.trustedHosts
          .filter((host) =>
            (project === undefined || host.project === project) && host.uuid > request.offsetUUID &&
            request.labels.every((label) =>
              host.labels.some(({ key, value }) => key === label.key && value === label.value)
            )
          )
          .sort((a, b) => a.uuid < b.uuid ? -1 : 1);
        const hosts = all.slice(0, limit);
        return { hosts: hosts.map(trustedHostMessage), nextOffset: all.length > limit ? hosts.at(-1)?.uuid ?? "" : "" };
      }),
    updateTrustedHost: (request, call) =>
      Promise.try(() => {
        const host: SimTrustedHost = {
          ...trustedHost(cluster, access.admit(call, request.projectName), request.name),
          hostNqn: request.hostNqn,
          labels: request.labels.map(({ key, value }) => ({ key, value })),
          authRequired: request.authRequired,
        };
        cluster.putTrustedHost(host);
        return trustedHostMessage(host);
      }),
    deleteTrustedHost: (request, call) =>
      Promise.try(() => {
        const host = trustedHost(cluster, access.admit(call, request.projectName), request.name);
        cluster.removeTrustedHost(host.project, host.name);
        return {};
      }),
  };
}

/** The keys of trusted hosts. */
export function trustedHostSecretRpcs({ access, cluster }: ServiceParts): Handlers<typeof DurosAPI> {
  return {
    setTrustedHostSecret: (request, call) =>
      Promise.try(() => {
        const host = trustedHost(cluster, access.admit(call, request.projectName), request.name);
        const targetSecret = request.targetSecretType === TargetSecretType.Disabled
          ? ""
          : request.targetSecretType === TargetSecretType.AutoGenSecret
          ? `DHHC-1:00:${Buffer.from(crypto.getRandomValues(new Uint8Array(36))).toString("base64")}:`
          : request.targetSecret;
        cluster.putTrustedHost({ ...host, hostSecret: request.hostSecret, targetSecret });
        return {};
      }),
    getTrustedHostSecret: (request, call) =>
      Promise.try(() => {
        const host = trustedHost(cluster, access.admit(call, request.projectName), request.name);
        return { host: trustedHostMessage(host), hostSecret: host.hostSecret, targetSecret: host.targetSecret };
      }),
  };
}

function trustedHost(cluster: Cluster, project: string, name: string): SimTrustedHost {
  const host = cluster.trustedHosts.find((other) => other.project === project && other.name === name);
  if (host !== undefined) return host;
  throw new StatusError("NOT_FOUND", `Cannot find trusted host "${name}" in project "${project}"`);
}

function trustedHostMessage(host: SimTrustedHost): MessageInitShape<typeof TrustedHostSchema> {
  return {
    UUID: host.uuid,
    name: host.name,
    projectName: host.project,
    hostNqn: host.hostNqn,
    labels: host.labels.map(({ key, value }) => ({ key, value })),
    authRequired: host.authRequired,
  };
}

function switchInBand(cluster: Cluster, caller: Caller, enabled: boolean): Record<string, never> {
  if (caller.scope !== "cluster") {
    throw new StatusError(
      "PERMISSION_DENIED",
      "Cannot switch in-band authentication: that needs a right to the cluster",
    );
  }
  cluster.setInBandAuthentication(enabled);
  return {};
}

/**
 * The LightOS management API over gRPC, spoken for a simulated cluster.
 *
 * One endpoint is one server with one scheme; each can be stopped, started again and made to hang, as servers do.
 * Messages are those of docs/reference/lightos-api.md, meanings those of docs/reference/lightos-api.md sections 6, 14 and 15.
 */
import { timestampFromMs } from "@bufbuild/protobuf/wkt";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { createServer, type Socket } from "node:net";
import { simulatorMark } from "../../check.ts";
import { type Logger, sleep } from "../../context.ts";
import { StatusError } from "../../error.ts";
import { type CallContext, type Handlers, serve, type Server, service } from "../../grpc/server.ts";
import type { Scheme } from "../../volume_id.ts";
import {
  ClusterHealth_State,
  ClusterInfo_AuthenticationMode,
  DurosAPI,
  DurosNodeInfo_State,
  DurosNodeInfo_StatusEnum,
  type DurosNodeInfoSchema,
  Policy_State,
  type PolicySchema,
  PolicyVisibility,
  ProtectionStateEnum,
  Server_RiskOfServiceLossEnum,
  Server_ServerStateEnum,
  type ServerSchema,
  Snapshot_StateEnum,
  type SnapshotSchema,
  TargetSecretType,
  type TrustedHostSchema,
  Volume_StateEnum,
  type VolumeSchema,
} from "../../../proto/gen/lightos_pb.ts";
import { type Cluster, longestPage, type ServerPlace } from "./cluster.ts";
import type { SimPolicy, SimSnapshot, SimTrustedHost, SimVolume, VolumeChange } from "./cluster.ts";
import type { Faults } from "../faults.ts";
import { onFreePort } from "../port.ts";
import type { Caller, Tokens } from "./token.ts";

/** The management API of one server over one scheme. */
export interface ApiEndpoint extends AsyncDisposable {
  readonly scheme: Scheme;
  /** Number of the server, from 0. */
  readonly server: number;
  /** `host:port` to call. */
  readonly address: string;
  readonly state: "running" | "stopped" | "hanging";
  /** Ends its connections and refuses new ones, as a server that is down. */
  stop(): Promise<void>;
  /** Listens again, on the same port. */
  start(): Promise<void>;
  /** Accepts TCP connections and says nothing on them, as a server that is stuck. */
  hang(): Promise<void>;
  /** Ends its connections; new ones are welcome. */
  dropConnections(): void;
}

export interface LightosOptions {
  readonly cluster: Cluster;
  readonly faults: Faults;
  readonly tokens: Tokens;
  /** False admits every call as the cluster's administrator. */
  readonly authentication: boolean;
  /** Address to listen on. */
  readonly host: string;
  /** Port; 0 takes a free one. */
  readonly port: number;
  readonly scheme: Scheme;
  readonly server: number;
  readonly tls: { readonly key: string; readonly cert: string } | undefined;
  /** The endpoints of this scheme that the cluster tells its clients. */
  readonly apiEndpoints: () => readonly string[];
  readonly log: Logger;
}

const clusterRpcs = new Set(["GetCluster", "ListNodes", "GetNode", "ListServers", "GetServer"]);

/** Serves the management API of one server over one scheme. */
export async function serveLightos(options: LightosOptions): Promise<ApiEndpoint> {
  const { host, scheme, log, faults } = options;
  const callers = new WeakMap<CallContext, Caller>();
  let running: Server | undefined;
  let stuck: AsyncDisposable | undefined;
  let port = options.port;
  const address = () => host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;

  const api = handlers(options, (call) => callers.get(call) ?? { scope: "projects", projects: [] });
  const guarded = Object.fromEntries(
    Object.entries(api).map(([name, handler]) => {
      const rpc = name.charAt(0).toUpperCase() + name.slice(1);
      const run = handler as (request: unknown, call: CallContext) => Promise<unknown>;
      return [name, async (request: unknown, call: CallContext) => {
        const rule = faults.take(rpc, address());
        const strike = async (when: "before" | "after") => {
          if (rule?.when !== when) return;
          if (rule.hold === true) await faults.hold({ rpc, endpoint: address(), when }, call.signal);
          if (rule.drop === true) running?.dropConnections();
          if (rule.code === undefined && rule.drop !== true) return;
          const message = rule.message ?? `Cannot answer ${rpc}: the simulator was told to fail`;
          throw new StatusError(rule.code ?? "UNAVAILABLE", message);
        };
        const subject = subjectOf(request);
        faults.tell({ phase: "begin", rpc, subject });
        try {
          if (rule?.delayMs !== undefined) await sleep(rule.delayMs, call.signal);
          await strike("before");
          const answer = await run(request, call);
          await strike("after");
          return answer;
        } finally {
          faults.tell({ phase: "end", rpc, subject });
        }
      }];
    }),
  ) as unknown as Handlers<typeof DurosAPI>;

  const listen = async () => {
    running = await onFreePort(port, (port) => serveOn(port));
    port = running.port;
  };
  const serveOn = (port: number) =>
    serve({
      listen: { host, port, ...(options.tls === undefined ? {} : { tls: options.tls }) },
      services: [service(DurosAPI, guarded)],
      log: log.with({ address: scheme }),
      // A simulator tells of each call when asked for it only.
      quiet: () => true,
      before: (method, _request, call) => {
        faults.count(method.name, address());
        const caller = options.authentication ? authenticate(options.tokens, call) : { scope: "cluster" } as const;
        if (clusterRpcs.has(method.name) && caller.scope !== "cluster") {
          // A token without the right is answered like a bad one (docs/reference/lightos-api.md section 14).
          throw new StatusError("UNAUTHENTICATED", `Cannot call ${method.name}: the token has no right to the cluster`);
        }
        callers.set(call, caller);
      },
    });
  const halt = async () => {
    await stuck?.[Symbol.asyncDispose]();
    stuck = undefined;
    const server = running;
    running = undefined;
    server?.dropConnections();
    await server?.stop(0);
  };
  await listen();

  return {
    scheme,
    server: options.server,
    get address() {
      return address();
    },
    get state() {
      return running !== undefined ? "running" : stuck !== undefined ? "hanging" : "stopped";
    },
    stop: halt,
    async start() {
      if (running !== undefined) return;
      await halt();
      await listen();
    },
    async hang() {
      await halt();
      stuck = await acceptAndIgnore(host, port);
    },
    dropConnections: () => running?.dropConnections(),
    [Symbol.asyncDispose]: halt,
  };
}

/** The UUID in a request, or the name where it has none. */
function subjectOf(request: unknown): string {
  const { UUID = "", name = "" } = request as { readonly UUID?: string; readonly name?: string };
  return UUID === "" ? name : UUID;
}

async function acceptAndIgnore(host: string, port: number): Promise<AsyncDisposable> {
  const connections = new Set<Socket>();
  const server = createServer((socket) => {
    connections.add(socket);
    socket.on("error", () => {}); // The peer gives up; that is what this endpoint is for.
  });
  await new Promise<void>((resolve, reject) => {
    server.once("error", reject);
    server.listen(port, host, resolve);
  });
  return {
    [Symbol.asyncDispose]: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        for (const socket of connections) socket.destroy();
      }),
  };
}

function authenticate(tokens: Tokens, call: CallContext): Caller {
  const header = call.header("authorization");
  const refuse = (problem: string) => new StatusError("UNAUTHENTICATED", `Cannot authenticate the call: ${problem}`);
  if (header === undefined) throw refuse("there is no authorization header");
  const match = /^Bearer +(\S+)$/.exec(header);
  if (match === null) throw refuse(`the authorization header is not "Bearer <token>"`);
  const caller = tokens.check(match[1] ?? "");
  if (typeof caller === "string") throw refuse(`the token is not accepted, ${caller}`);
  return caller;
}

function handlers(options: LightosOptions, callerOf: (call: CallContext) => Caller): Handlers<typeof DurosAPI> {
  const { cluster } = options;
  const { identity } = cluster;

  /** The project, if the caller may use it. */
  const admit = (call: CallContext, project: string): string => {
    const caller = callerOf(call);
    if (project === "" || caller.scope === "cluster" || caller.projects.includes(project)) return project;
    throw new StatusError("PERMISSION_DENIED", `Cannot use project "${project}": the token is not for it`);
  };
  /** The project to list, undefined for all of them, which is the administrator's right. */
  const listed = (call: CallContext, project: string): string | undefined => {
    if (project !== "") return admit(call, project);
    return callerOf(call).scope === "cluster" ? undefined : "";
  };
  const ifMatch = (call: CallContext) => call.header("if-match");
  const trusted = (project: string, name: string): SimTrustedHost => {
    const host = cluster.trustedHosts.find((other) => other.project === project && other.name === name);
    if (host !== undefined) return host;
    throw new StatusError("NOT_FOUND", `Cannot find trusted host "${name}" in project "${project}"`);
  };
  const hosts = (call: CallContext) => {
    const caller = callerOf(call);
    const may = (volume: SimVolume) => caller.scope === "cluster" || caller.projects.includes(volume.project);
    return cluster.dataPlane.connectedHosts().map(({ hostNqn, address, hostname }) => ({
      hostNQN: hostNqn,
      iPAddress: address,
      hostname,
      volumeUUIDs: cluster.volumes.filter((volume) => may(volume) && cluster.hostsOf(volume).includes(hostNqn))
        .map(({ uuid }) => uuid),
    }));
  };

  return {
    getVersion: () => Promise.resolve({ apiVersion: "v2.0" }),

    createVolume: async (request, call) => {
      const volume = await cluster.createVolume({
        project: admit(call, request.projectName),
        name: request.name,
        size: request.size,
        replicaCount: request.replicaCount,
        compression: request.compression,
        acl: request.acl?.values,
        ipAcl: request.IPAcl?.values,
        sectorSizeBytes: request.sectorSize,
        sourceSnapshot: { uuid: request.sourceSnapshotUUID, name: request.sourceSnapshotName },
        qosPolicy: policyRef(request.qosPolicyID),
        labels: request.labels,
      });
      return volumeMessage(cluster, volume);
    },
    getVolume: (request, call) =>
      answer(() =>
        volumeMessage(
          cluster,
          cluster.getVolume({ project: admit(call, request.projectName), uuid: request.UUID, name: request.name }),
        )
      ),
    listVolumes: (request, call) =>
      answer(() => ({
        volumes: cluster.listVolumes({
          project: listed(call, request.projectName),
          uuid: request.UUID,
          name: request.name,
          failureDomain: request.failureDomain,
          offsetUuid: request.offsetUUID,
          limit: Number(request.limit),
          snapshotUuid: request.snapshotUUID,
          showAll: request.showAll,
        }).map((volume) => volumeMessage(cluster, volume)),
      })),
    updateVolume: async (request, call) => {
      const change: VolumeChange = {
        acl: request.acl?.values,
        ipAcl: request.IPAcl?.values,
        size: request.size,
        force: request.Force,
        compression: request.compression,
        newName: request.newName,
        qosPolicy: request.qosPolicyID.case === undefined ? undefined : policyRef(request.qosPolicyID),
        // A repeated field cannot say "none": an empty one leaves the labels alone.
        labels: request.labels.length === 0 ? undefined : request.labels,
      };
      const ref = { project: admit(call, request.projectName), uuid: request.UUID, name: request.name };
      await cluster.updateVolume(ref, change, ifMatch(call));
      return {};
    },
    deleteVolume: (request, call) =>
      answer(() => {
        const ref = { project: admit(call, request.projectName), uuid: request.UUID, name: request.name };
        cluster.deleteVolume(ref, ifMatch(call));
        return {};
      }),
    rollbackVolume: (request, call) =>
      answer(() => {
        const ref = { project: admit(call, request.projectName), uuid: request.UUID, name: request.Name };
        cluster.rollbackVolume(ref, { uuid: request.srcSnapshotUUID, name: request.srcSnapshotName });
        return {};
      }),

    createSnapshot: async (request, call) => {
      const { retentionTime } = request;
      const snapshot = await cluster.createSnapshot({
        project: admit(call, request.projectName),
        name: request.name,
        description: request.description,
        source: { uuid: request.sourceVolumeUUID, name: request.sourceVolumeName },
        retentionMs: retentionTime === undefined
          ? undefined
          : Number(retentionTime.seconds) * 1000 + retentionTime.nanos / 1e6,
      });
      return snapshotMessage(cluster, snapshot);
    },
    getSnapshot: (request, call) =>
      answer(() =>
        snapshotMessage(
          cluster,
          cluster.getSnapshot({ project: admit(call, request.projectName), uuid: request.UUID, name: request.Name }),
        )
      ),
    listSnapshots: (request, call) =>
      answer(() => ({
        snapshots: cluster.listSnapshots({
          project: listed(call, request.projectName),
          uuid: request.UUID,
          name: request.Name,
          offsetUuid: request.offsetUUID,
          limit: Number(request.limit),
          showAll: request.showAll,
        }).map((snapshot) => snapshotMessage(cluster, snapshot)),
      })),
    deleteSnapshot: (request, call) =>
      answer(() => {
        cluster.deleteSnapshot({ project: admit(call, request.projectName), uuid: request.UUID, name: request.name });
        return {};
      }),
    listChangedBlocks: async (request, call) => {
      const withBase = request.baseSnapshotUUID !== "" || request.baseSnapshotName !== "";
      const { snapshot, base } = cluster.changedBlocks(
        admit(call, request.projectName),
        { uuid: request.snapshotUUID, name: request.snapshotName },
        withBase ? { uuid: request.baseSnapshotUUID, name: request.baseSnapshotName } : undefined,
      );
      return await changedRanges(cluster, snapshot, base, request.offsetLBA);
    },

    getCluster: () =>
      answer(() => {
        const count = (protection: SimVolume["protection"]) =>
          cluster.volumes.filter((volume) => volume.protection === protection && volume.state !== "Failed").length;
        const healthy = count("FullyProtected");
        const notAvailable = count("NotAvailable");
        const troubled = count("Degraded") + count("ReadOnly") + notAvailable;
        return {
          ...clusterFacts(options),
          statistics: {
            installedPhysicalStorage: cluster.capacityBytes,
            managedPhysicalStorage: cluster.capacityBytes,
            effectivePhysicalStorage: cluster.capacityBytes,
            logicalStorage: cluster.capacityBytes,
            logicalUsedStorage: cluster.reservedBytes,
            physicalUsedStorage: cluster.reservedBytes,
            physicalUsedStorageIncludingParity: cluster.reservedBytes,
            freePhysicalStorage: cluster.freeBytes,
            estimatedFreeLogicalStorage: cluster.freeBytes,
            estimatedLogicalStorage: cluster.capacityBytes,
            compressionRatio: 1,
          },
          health: {
            state: notAvailable > 0
              ? ClusterHealth_State.Error
              : troubled > 0
              ? ClusterHealth_State.Warning
              : ClusterHealth_State.OK,
            numDegradedVolumes: count("Degraded"),
            numReadOnlyVolumes: count("ReadOnly"),
            numNotAvailableVolumes: notAvailable,
            numHealthyVolumes: healthy,
          },
        };
      }),
    getClusterInfo: () =>
      answer(() => ({
        ...clusterFacts(options),
        // Nobody reads the ETag of a cluster's facts but lbcsi doctor, for this.
        ETag: `${simulatorMark}:${cluster.dataPlane.kind}`,
        nvmeEndpoints: identity.servers.map(({ nvmeEndpoint }) => nvmeEndpoint),
      })),
    listNodes: (request) =>
      answer(() => ({
        nodes: identity.servers
          .filter((server) =>
            (request.UUID === "" || server.nodeUuid === request.UUID) &&
            (request.name === "" || nodeName(server) === request.name) &&
            (request.failureDomain === "" || server.name === request.failureDomain)
          )
          .map((server) => nodeMessage(cluster, server)),
      })),
    getNode: (request) =>
      answer(() => {
        const server = identity.servers.find(({ nodeUuid }) => nodeUuid === request.UUID);
        if (server !== undefined) return nodeMessage(cluster, server);
        throw new StatusError("NOT_FOUND", `Cannot find node ${request.UUID}`);
      }),
    listServers: (request) =>
      answer(() => ({
        servers: identity.servers
          .map((server, number) => ({ server, number }))
          .filter(({ server }) =>
            (request.UUID === "" || server.uuid === request.UUID) &&
            (request.Name === "" || server.name === request.Name)
          )
          .map(({ server, number }) => serverMessage(options, server, number)),
      })),
    getServer: (request) =>
      answer(() => {
        const number = identity.servers.findIndex(({ uuid }) => uuid === request.UUID);
        const server = identity.servers[number];
        if (server !== undefined) return serverMessage(options, server, number);
        throw new StatusError("NOT_FOUND", `Cannot find server ${request.UUID}`);
      }),
    getHost: (request, call) =>
      answer(() => {
        const host = hosts(call).find(({ hostNQN }) => hostNQN === request.hostNQN);
        if (host !== undefined) return host;
        throw new StatusError("NOT_FOUND", `Cannot find host ${request.hostNQN}: it is not connected`);
      }),
    listHosts: (request, call) =>
      answer(() => ({
        connectedHosts: hosts(call).filter((host) =>
          (request.hostNQN === "" || host.hostNQN === request.hostNQN) &&
          (request.volumeUUID === "" || host.volumeUUIDs.includes(request.volumeUUID))
        ),
      })),

    listProjects: (_request, call) =>
      answer(() => {
        const caller = callerOf(call);
        const may = (name: string) => caller.scope === "cluster" || caller.projects.includes(name);
        const projects = cluster.listProjects().filter(({ name }) => may(name));
        return { projects: projects.map(({ uuid, name, description }) => ({ UUID: uuid, name, description })) };
      }),
    getProject: (request, call) =>
      answer(() => {
        const project = cluster.listProjects().find(({ name }) => name === admit(call, request.name));
        if (project === undefined) throw new StatusError("NOT_FOUND", `Cannot find project "${request.name}"`);
        return { UUID: project.uuid, name: project.name, description: project.description };
      }),
    listPolicies: (request, call) =>
      answer(() => ({
        policies: cluster.listPolicies(listed(call, request.projectName))
          .filter(({ uuid, name }) =>
            (request.UUID === "" || uuid === request.UUID) && (request.name === "" || name === request.name)
          )
          .map(policyMessage),
      })),
    getPolicy: (request, call) =>
      answer(() => {
        const policy = cluster.listPolicies(listed(call, request.projectName)).find(({ uuid, name }) =>
          request.UUID === "" ? name === request.name : uuid === request.UUID
        );
        if (policy !== undefined) return policyMessage(policy);
        throw new StatusError("NOT_FOUND", `Cannot find policy "${request.UUID || request.name}"`);
      }),
    getFeatureFlag: (request) =>
      answer(() => {
        const enabled = cluster.features[request.name];
        if (enabled !== undefined) return { name: request.name, enabled };
        throw new StatusError("INVALID_ARGUMENT", `Cannot get feature flag "${request.name}": it is unknown`);
      }),
    listFeatureFlags: () =>
      answer(() => ({
        featureFlags: Object.fromEntries(
          Object.entries(cluster.features).map(([name, enabled]) => [name, { name, enabled }]),
        ),
      })),

    enableClusterInBandAuth: (_request, call) => answer(() => switchInBand(cluster, callerOf(call), true)),
    disableClusterInBandAuth: (_request, call) => answer(() => switchInBand(cluster, callerOf(call), false)),
    createTrustedHost: (request, call) =>
      answer(() => {
        const project = admit(call, request.projectName);
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
      answer(() => trustedHostMessage(trusted(admit(call, request.projectName), request.name))),
    listTrustedHosts: (request, call) =>
      answer(() => {
        const project = listed(call, request.projectName);
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
      answer(() => {
        const host: SimTrustedHost = {
          ...trusted(admit(call, request.projectName), request.name),
          hostNqn: request.hostNqn,
          labels: request.labels.map(({ key, value }) => ({ key, value })),
          authRequired: request.authRequired,
        };
        cluster.putTrustedHost(host);
        return trustedHostMessage(host);
      }),
    deleteTrustedHost: (request, call) =>
      answer(() => {
        const host = trusted(admit(call, request.projectName), request.name);
        cluster.removeTrustedHost(host.project, host.name);
        return {};
      }),
    setTrustedHostSecret: (request, call) =>
      answer(() => {
        const host = trusted(admit(call, request.projectName), request.name);
        const targetSecret = request.targetSecretType === TargetSecretType.Disabled
          ? ""
          : request.targetSecretType === TargetSecretType.AutoGenSecret
          ? `DHHC-1:00:${Buffer.from(crypto.getRandomValues(new Uint8Array(36))).toString("base64")}:`
          : request.targetSecret;
        cluster.putTrustedHost({ ...host, hostSecret: request.hostSecret, targetSecret });
        return {};
      }),
    getTrustedHostSecret: (request, call) =>
      answer(() => {
        const host = trusted(admit(call, request.projectName), request.name);
        return { host: trustedHostMessage(host), hostSecret: host.hostSecret, targetSecret: host.targetSecret };
      }),
  };
}

/** Runs a handler that waits for nothing, turning what it throws into a rejection. */
async function answer<T>(handler: () => T): Promise<T> {
  return await handler();
}

function policyRef(
  id: { readonly case: "qosPolicyUUID" | "qosPolicyName"; readonly value: string } | { readonly case: undefined },
): { uuid: string; name: string } {
  return {
    uuid: id.case === "qosPolicyUUID" ? id.value : "",
    name: id.case === "qosPolicyName" ? id.value : "",
  };
}

function clusterFacts({ cluster, apiEndpoints }: LightosOptions) {
  const { uuid, name, subsystemNqn, servers } = cluster.identity;
  return {
    UUID: uuid,
    subsystemNQN: subsystemNqn,
    clusterName: name,
    currentMaxReplicas: cluster.maxReplicas,
    supportedMaxReplicas: cluster.maxReplicas,
    ETag: "1",
    apiEndpoints: [...apiEndpoints()],
    discoveryEndpoints: servers.map(({ discoveryEndpoint }) => discoveryEndpoint),
    inBandAuthMode: cluster.inBandAuthentication
      ? ClusterInfo_AuthenticationMode.Enabled
      : ClusterInfo_AuthenticationMode.Disabled,
  };
}

function volumeMessage(cluster: Cluster, volume: SimVolume): MessageInitShape<typeof VolumeSchema> {
  return {
    state: Volume_StateEnum[volume.state],
    protectionState: ProtectionStateEnum[volume.protection],
    replicaCount: volume.replicaCount,
    nodeList: [...volume.nodeUuids],
    UUID: volume.uuid,
    nsid: volume.nsid,
    acl: { values: [...volume.acl] },
    compression: String(volume.compression),
    size: volume.sizeBytes,
    name: volume.name,
    rebuildProgress: "",
    statistics: { physicalCapacity: volume.sizeBytes, compressionRatio: 1, totalCompressionRatio: 1 },
    IPAcl: { values: [...volume.ipAcl] },
    ETag: volume.etag,
    connectedHosts: cluster.hostsOf(volume),
    sectorSize: volume.sectorSizeBytes,
    projectName: volume.project,
    sourceSnapshotUUID: volume.sourceSnapshotUuid ?? "",
    sourceSnapshotName: volume.sourceSnapshotName ?? "",
    qosPolicyUUID: volume.qosPolicyUuid ?? "",
    qosPolicyName: cluster.policyName(volume),
    primaryNodeUUID: volume.nodeUuids[0] ?? "",
    creationTime: timestampFromMs(volume.createdAtMs),
    labels: volume.labels.map(({ key, value }) => ({ key, value })),
    clusterId: cluster.identity.uuid,
  };
}

function snapshotMessage(cluster: Cluster, snapshot: SimSnapshot): MessageInitShape<typeof SnapshotSchema> {
  const { expiresAtMs, createdAtMs } = snapshot;
  return {
    state: Snapshot_StateEnum[snapshot.state],
    UUID: snapshot.uuid,
    name: snapshot.name,
    description: snapshot.description,
    creationTime: timestampFromMs(createdAtMs),
    ...(expiresAtMs === undefined
      ? {}
      : { retentionTime: { seconds: BigInt(Math.floor((expiresAtMs - createdAtMs) / 1000)) } }),
    sourceVolumeUUID: snapshot.sourceVolumeUuid,
    sourceVolumeName: snapshot.sourceVolumeName,
    replicaCount: snapshot.replicaCount,
    nodeList: [...snapshot.nodeUuids],
    nsid: snapshot.nsid,
    compression: snapshot.compression,
    size: snapshot.sizeBytes,
    sectorSize: snapshot.sectorSizeBytes,
    statistics: { physicalCapacity: snapshot.sizeBytes },
    ETag: cluster.behaviour.asDocumented ? snapshot.etag : "",
    projectName: snapshot.project,
    primaryNodeUUID: snapshot.nodeUuids[0] ?? "",
    labels: snapshot.labels.map(({ key, value }) => ({ key, value })),
    clusterId: cluster.identity.uuid,
  };
}

function nodeName(server: ServerPlace): string {
  return `${server.name}-0`;
}

function nodeMessage(cluster: Cluster, server: ServerPlace): MessageInitShape<typeof DurosNodeInfoSchema> {
  const share = BigInt(cluster.identity.servers.length);
  return {
    name: nodeName(server),
    UUID: server.nodeUuid,
    state: DurosNodeInfo_State.Active,
    status: DurosNodeInfo_StatusEnum.ConnectivityOK,
    nvmeEndpoint: server.nvmeEndpoint,
    failureDomains: [server.name],
    hostname: server.name,
    numManagedDevices: 4,
    maxNvmeDevices: 24,
    statistics: {
      managedPhysicalStorage: cluster.capacityBytes / share,
      estimatedLogicalStorage: cluster.capacityBytes / share,
      estimatedFreeLogicalStorage: cluster.freeBytes / share,
      compressionRatio: 1,
    },
    serverUUID: server.uuid,
    ETag: "1",
  };
}

function serverMessage(
  { apiEndpoints }: LightosOptions,
  server: ServerPlace,
  number: number,
): MessageInitShape<typeof ServerSchema> {
  const endpoint = apiEndpoints()[number];
  return {
    UUID: server.uuid,
    name: server.name,
    RiskOfServiceLossState: Server_RiskOfServiceLossEnum.NoRiskOfServiceLoss,
    NodesUUIDs: [server.nodeUuid],
    state: Server_ServerStateEnum.Enabled,
    ServerEndpoints: [server.nvmeEndpoint],
    ETag: "1",
    LightOSVersion: "simulated",
    ApiEndpoints: endpoint === undefined ? [] : [endpoint],
    health: ClusterHealth_State.OK,
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

/** Blocks in one range, and ranges in one answer. */
const windowBlocks = 64n;
const longestAnswer = 10_000;

// The wire facts name the fields and the rounding to 64 blocks, not the order of the bits nor whether lbaEnd belongs to
// the range. Taken here: one range per 64 blocks, lbaEnd is its last block, bit n of byte n/8 (lowest first) is block n.
async function changedRanges(
  cluster: Cluster,
  snapshot: SimSnapshot,
  base: SimSnapshot | undefined,
  offset: bigint,
) {
  const blocks = snapshot.sizeBytes / BigInt(snapshot.sectorSizeBytes);
  const start = offset - offset % windowBlocks;
  const ranges: { lbaStart: bigint; lbaEnd: bigint; dataBitMap: Uint8Array }[] = [];
  const runs = cluster.dataPlane.changedRuns(snapshot.uuid, base?.uuid, snapshot.sectorSizeBytes, start);
  for await (const run of runs) {
    for (let block = run.start; block < run.end; block++) {
      const lbaStart = block - block % windowBlocks;
      let range = ranges.at(-1);
      if (range?.lbaStart !== lbaStart) {
        if (ranges.length === longestAnswer) return { nextOffsetLBA: lbaStart, lbaRanges: ranges };
        const last = lbaStart + windowBlocks <= blocks ? lbaStart + windowBlocks - 1n : blocks - 1n;
        range = { lbaStart, lbaEnd: last, dataBitMap: new Uint8Array(8) };
        ranges.push(range);
      }
      const bit = Number(block - lbaStart);
      range.dataBitMap[bit >> 3] = (range.dataBitMap[bit >> 3] ?? 0) | (1 << (bit & 7));
    }
  }
  return { nextOffsetLBA: 0n, lbaRanges: ranges };
}

/** GetCapacity, over real sockets, against simulated clusters. */
import { deepStrictEqual, rejects, strictEqual } from "node:assert/strict";
import { type MessageInitShape } from "@bufbuild/protobuf";
import {
  Controller,
  ControllerServiceCapability_RPC_Type as Rpc,
  type GetCapacityRequestSchema,
  VolumeCapability_AccessMode_Mode as Mode,
} from "../../../proto/gen/csi_pb.ts";
import { answers, startController, writer } from "../../support/controller_service.ts";
import { gib } from "../../support/backends.ts";
import { startSimulator } from "../../support/simulator.ts";
import { creation, entry, startListing } from "../../support/listing.ts";

const method = Controller.method;

const free = 90n * gib;

async function startCapacity(more = "jwt: /admin") {
  return await startListing({ capacityBytes: free }, more);
}

Deno.test("GetCapacity without parameters adds up the clusters of the file, least volume 1 GiB", async () => {
  await using first = await startSimulator({ capacityBytes: free });
  await using second = await startSimulator({ capacityBytes: 10n * gib });
  await using controller = await startController({
    clusterFile: `clusters: [${entry("a", first, "jwt: /jwt-a")}, ${entry("b", second, "jwt: /jwt-b")}]`,
    files: { "/jwt-a": first.addresses.adminJwt, "/jwt-b": second.addresses.adminJwt },
  });

  const answer = await controller.call(method.getCapacity, {});

  strictEqual(answer.availableCapacity, 100n * gib);
  strictEqual(answer.minimumVolumeSize, gib);
  strictEqual(answer.maximumVolumeSize, undefined);
});

for (const [replicas, expected] of [["1", 90n], ["2", 45n], ["3", 30n], ["4", 0n]] as const) {
  Deno.test(`GetCapacity for ${replicas} replicas on three servers is ${expected} of 90 GiB`, async () => {
    await using env = await startCapacity();
    const { parameters = {} } = creation(env.simulator, "x");

    const { availableCapacity } = await env.call(method.getCapacity, {
      parameters: { ...parameters, "replica-count": replicas },
    });

    strictEqual(availableCapacity, expected * gib);
  });
}

Deno.test("GetCapacity shrinks by what volumes and their replicas take", async () => {
  await using env = await startCapacity();
  const creationRequest = creation(env.simulator, "one");
  const parameters = { ...creationRequest.parameters, "replica-count": "3" };
  await env.call(method.createVolume, { ...creationRequest, parameters });

  const { availableCapacity } = await env.call(method.getCapacity, { parameters });

  strictEqual(availableCapacity, 29n * gib);
});

Deno.test("GetCapacity passes over keys that are for the orchestrator or the node", async () => {
  await using env = await startCapacity();
  const { parameters } = creation(env.simulator, "x");
  const sidecar = {
    "csi.storage.k8s.io/fstype": "ext4",
    "csi.storage.k8s.io/provisioner-secret-name": "s",
    "mkfs-options": "-m 0",
  };

  const { availableCapacity } = await env.call(method.getCapacity, {
    parameters: { ...parameters, ...sidecar },
    volumeCapabilities: [writer],
  });
  const withoutOthers = await env.call(method.getCapacity, { parameters: sidecar });

  strictEqual(availableCapacity, free);
  strictEqual(withoutOthers.availableCapacity, free);
});

type CapacityRequest = Extract<MessageInitShape<typeof GetCapacityRequestSchema>, { readonly $typeName?: never }>;
const badRequests: readonly (readonly [what: string, request: CapacityRequest, message: RegExp])[] = [
  [
    "an unknown parameter",
    { parameters: { "replica-cout": "3" } },
    /"replica-cout" \(did you mean "replica-count"\?\) unknown/,
  ],
  ["parameters without endpoints", { parameters: { "replica-count": "3" } }, /"mgmt-endpoint" is missing/],
  [
    "topology",
    { accessibleTopology: { segments: { zone: "a" } } },
    /accessible_topology asks for "zone" "a", but every node reaches every volume/,
  ],
];

for (const [what, request, message] of badRequests) {
  Deno.test(`GetCapacity rejects ${what} with INVALID_ARGUMENT`, async () => {
    await using env = await startCapacity();

    await rejects(
      env.call(method.getCapacity, request),
      answers("INVALID_ARGUMENT", /^Cannot measure the capacity: /, message),
    );
  });
}

const mount = { case: "mount" as const, value: {} };
const emptyTopology = { segments: {} };
const adviceOfCapacity: readonly (readonly [what: string, request: CapacityRequest, expected: bigint])[] = [
  ["a topology without segments, as csi-provisioner 5 sends it", { accessibleTopology: emptyTopology }, free],
  [
    "access mode UNKNOWN, as csi-provisioner 3.6 sends it",
    {
      volumeCapabilities: [{ accessType: mount, accessMode: { mode: Mode.UNKNOWN } }],
      accessibleTopology: emptyTopology,
    },
    free,
  ],
  ["a capability with nothing in it", { volumeCapabilities: [{}] }, free],
  ["a capability without access type", { volumeCapabilities: [{ accessMode: writer.accessMode }] }, free],
  [
    "a file system that no node has",
    {
      volumeCapabilities: [{
        accessType: { case: "mount", value: { fsType: "zfs" } },
        accessMode: { mode: Mode.SINGLE_NODE_WRITER },
      }],
    },
    0n,
  ],
  [
    "a file system that two nodes write to",
    { volumeCapabilities: [writer, { accessType: mount, accessMode: { mode: Mode.MULTI_NODE_MULTI_WRITER } }] },
    0n,
  ],
];

for (const [what, request, expected] of adviceOfCapacity) {
  Deno.test(`GetCapacity with ${what} answers ${expected === 0n ? "that there is none" : "what is free"}`, async () => {
    await using env = await startCapacity();
    const { parameters = {} } = creation(env.simulator, "x");

    const { availableCapacity } = await env.call(method.getCapacity, { parameters, ...request });

    strictEqual(availableCapacity, expected);
  });
}

Deno.test("GetCapacity with a project's token answers UNAUTHENTICATED and says which token is needed", async () => {
  await using env = await startCapacity("jwt: /jwt-a");

  await rejects(
    env.call(method.getCapacity, {}),
    answers("UNAUTHENTICATED", /need a token with a right to the cluster$/, /\/jwt-a of cluster "a"/),
  );
});

Deno.test("GetCapacity with a token of the process' own and no cluster file measures the StorageClass' cluster", async () => {
  await using simulator = await startSimulator({ capacityBytes: free });
  await using controller = await startController({ globalJwt: () => simulator.addresses.adminJwt });
  const { parameters = {} } = creation(simulator, "x");

  const { capabilities } = await controller.call(method.controllerGetCapabilities, {});
  const { availableCapacity } = await controller.call(method.getCapacity, { parameters });

  const names = capabilities.map(({ type }) => type.case === "rpc" ? Rpc[type.value.type] : "");
  deepStrictEqual(names.filter((name) => /GET_CAPACITY|LIST_VOLUMES|GET_VOLUME/.test(name)), ["GET_CAPACITY"]);
  strictEqual(availableCapacity, free);
  await rejects(controller.call(method.getCapacity, {}), answers("INVALID_ARGUMENT", /"mgmt-endpoint" is missing/));
});

Deno.test("GET_CAPACITY is announced once a token of the process' own has appeared, and while it is there", async () => {
  await using simulator = await startSimulator({ capacityBytes: free });
  let token: string | undefined;
  await using controller = await startController({ globalJwt: () => token });
  const { parameters = {} } = creation(simulator, "x");
  const announced = async () => {
    const { capabilities } = await controller.call(method.controllerGetCapabilities, {});
    return capabilities.some(({ type }) => type.case === "rpc" && type.value.type === Rpc.GET_CAPACITY);
  };
  const seen = [await announced()];
  await rejects(
    controller.call(method.getCapacity, { parameters }),
    answers("UNIMPLEMENTED", /no credentials of its own/),
  );

  token = `${simulator.addresses.adminJwt}\n`;
  seen.push(await announced());
  strictEqual((await controller.call(method.getCapacity, { parameters })).availableCapacity, free);
  token = "\n";
  seen.push(await announced());

  deepStrictEqual(seen, [false, true, false]);
});

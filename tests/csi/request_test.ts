import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { deepStrictEqual, strictEqual, throws } from "node:assert/strict";
import {
  describeRequest,
  isReaderOnly,
  isShared,
  parseCapability,
  redactRequest,
  requirePath,
  requireText,
  withoutOrchestratorKeys,
} from "../../lib/csi/request.ts";
import { StatusError } from "../../lib/error.ts";
import {
  Controller,
  GroupController,
  Node,
  SnapshotMetadata,
  VolumeCapability_AccessMode_Mode as Mode,
  VolumeCapabilitySchema,
} from "../../proto/gen/csi_pb.ts";
import { callContext } from "../support/node_calls.ts";

type Capability = MessageInitShape<typeof VolumeCapabilitySchema>;
type AccessType = NonNullable<Capability["accessType"]>;
const ctx = callContext().doing("do it");
const capability = (init: Capability) => create(VolumeCapabilitySchema, init);
const mount = (fsType = "", mountFlags: string[] = []): AccessType => ({
  case: "mount",
  value: { fsType, mountFlags },
});
const block: AccessType = { case: "block", value: {} };

const badCapabilities: ReadonlyArray<readonly [string, Capability, RegExp]> = [
  ["no access mode", { accessType: block }, /access_mode is missing/],
  ["access mode UNKNOWN", { accessType: block, accessMode: { mode: Mode.UNKNOWN } }, /access_mode is missing/],
  [
    "an access mode of a later CSI",
    { accessType: block, accessMode: { mode: 42 as Mode } },
    /access mode 42 is unknown/,
  ],
  ["no access type", { accessMode: { mode: Mode.SINGLE_NODE_WRITER } }, /neither mount nor block/],
  [
    "a mounted volume for several writing nodes",
    { accessType: mount(), accessMode: { mode: Mode.MULTI_NODE_MULTI_WRITER } },
    /MULTI_NODE_MULTI_WRITER is for raw block volumes/,
  ],
  [
    "a mounted volume read by others while one node writes",
    { accessType: mount(), accessMode: { mode: Mode.MULTI_NODE_SINGLE_WRITER } },
    /MULTI_NODE_SINGLE_WRITER is for raw block volumes/,
  ],
  [
    "an unknown file system",
    { accessType: mount("ntfs"), accessMode: { mode: Mode.SINGLE_NODE_WRITER } },
    /file system "ntfs" is not one of ext4, xfs, btrfs/,
  ],
  [
    "a volume mount group",
    {
      accessType: { case: "mount", value: { volumeMountGroup: "1000" } },
      accessMode: { mode: Mode.SINGLE_NODE_WRITER },
    },
    /volume_mount_group is not announced/,
  ],
  [
    "an empty mount flag",
    { accessType: mount("ext4", ["noatime", ""]), accessMode: { mode: Mode.SINGLE_NODE_WRITER } },
    /a mount flag is empty/,
  ],
];
for (const [what, init, message] of badCapabilities) {
  Deno.test(`parseCapability rejects ${what} with INVALID_ARGUMENT`, () => {
    throws(() => parseCapability(ctx, capability(init)), (error) => {
      strictEqual((error as StatusError).code, "INVALID_ARGUMENT");
      strictEqual(/^Cannot do it: /.test((error as StatusError).message), true);
      return message.test((error as StatusError).message);
    });
  });
}

Deno.test("parseCapability rejects a missing capability with INVALID_ARGUMENT", () => {
  throws(() => parseCapability(ctx, undefined), /Cannot do it: volume_capability is missing/);
});

Deno.test("parseCapability keeps file system, mount flags and mode", () => {
  const access = parseCapability(
    ctx,
    capability({
      accessType: mount("xfs", ["noatime", "logbsize=64k"]),
      accessMode: { mode: Mode.SINGLE_NODE_WRITER },
    }),
  );

  deepStrictEqual(access, {
    type: "mount",
    mode: Mode.SINGLE_NODE_WRITER,
    fsType: "xfs",
    mountFlags: ["noatime", "logbsize=64k"],
  });
});

Deno.test("parseCapability accepts every access mode for raw block", () => {
  for (const mode of [1, 2, 3, 4, 5, 6, 7] as Mode[]) {
    deepStrictEqual(parseCapability(ctx, capability({ accessType: block, accessMode: { mode } })), {
      type: "block",
      mode,
    });
  }
});

Deno.test("isShared and isReaderOnly follow the names of the access modes", () => {
  const modes = [1, 2, 3, 4, 5, 6, 7] as Mode[];

  deepStrictEqual(modes.filter(isShared).map((mode) => Mode[mode]), [
    "MULTI_NODE_READER_ONLY",
    "MULTI_NODE_SINGLE_WRITER",
    "MULTI_NODE_MULTI_WRITER",
  ]);
  deepStrictEqual(modes.filter(isReaderOnly).map((mode) => Mode[mode]), [
    "SINGLE_NODE_READER_ONLY",
    "MULTI_NODE_READER_ONLY",
  ]);
});

Deno.test("requireText counts bytes, not characters", () => {
  strictEqual(requireText(ctx, "name", "ü".repeat(64)), "ü".repeat(64));
  throws(() => requireText(ctx, "name", "ü".repeat(65)), /Cannot do it: name has 130 bytes, 128 are allowed/);
  throws(() => requireText(ctx, "name", ""), /Cannot do it: name is missing/);
});

for (const path of ["relative", "/a/../b", "/a/..", "/a/.", "/a/./b", "/a\0b"]) {
  Deno.test(`requirePath rejects ${JSON.stringify(path)}`, () => {
    throws(() => requirePath(ctx, "target_path", path), /target_path ".*" is not a plain absolute path/s);
  });
}

Deno.test("withoutOrchestratorKeys leaves a driver its own keys alone", () => {
  const kept = withoutOrchestratorKeys({
    "csi.storage.k8s.io/pod.name": "a",
    "storage.kubernetes.io/csiProvisionerIdentity": "b",
    "mkfs-options": "-m 0",
  });

  deepStrictEqual(kept, { "mkfs-options": "-m 0" });
});

Deno.test("promise 10: a request is logged without any field that the schema marks as secret", () => {
  const marked = "MARKED-SECRET";
  let seen = 0;
  for (const { methods } of [Controller, Node, GroupController, SnapshotMetadata]) {
    for (const method of methods) {
      const request = create(method.input, {});
      const values = request as unknown as Record<string, unknown>;
      if (!("secrets" in values)) continue;
      values["secrets"] = { jwt: marked };
      seen++;

      strictEqual(JSON.stringify(redactRequest(method, request)).includes(marked), false, method.name);
      deepStrictEqual(values["secrets"], { jwt: marked }, "the request itself must stay whole");
    }
  }
  strictEqual(seen, 22);
});

Deno.test("promise 10: service account tokens in a volume context are not logged", () => {
  const request = create(Node.method.nodePublishVolume.input, {
    volumeContext: { "csi.storage.k8s.io/serviceAccount.tokens": "MARKED-SECRET", "csi.storage.k8s.io/pod.name": "p" },
  });

  const text = JSON.stringify(redactRequest(Node.method.nodePublishVolume, request));

  strictEqual(text.includes("MARKED-SECRET"), false);
  strictEqual(text.includes('"p"'), true);
});

Deno.test("describeRequest names the volume by its UUID, and the node", () => {
  const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
  const request = create(Controller.method.controllerPublishVolume.input, {
    volumeId: `mgmt:192.0.2.1:443|nguid:${uuid}`,
    nodeId: "worker.node",
    secrets: { jwt: "x" },
  });

  deepStrictEqual(describeRequest(Controller.method.controllerPublishVolume, request), {
    volume: uuid,
    node: "worker.node",
  });
});

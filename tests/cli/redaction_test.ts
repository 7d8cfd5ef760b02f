/**
 * Secrets through whole lives of volumes, with controller and node as processes that log everything they can: afterwards
 * each place where a secret could have ended up is searched for it.
 */
import assert from "node:assert/strict";
import { join } from "node:path";
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import { DhchapKey } from "../../lib/auth_key.ts";
import { Testbed } from "../../lib/demo/testbed.ts";
import { CallError, type Channel } from "../../lib/grpc/client.ts";
import { Controller, Node, VolumeCapability_AccessMode_Mode as Mode } from "../../proto/gen/csi_pb.ts";
import { mainPath } from "../support/lbcsi.ts";
import { needs } from "../support/needs.ts";

const gib = 1n << 30n;
const program = [Deno.execPath(), "run", "-A", "--no-check", mainPath];
const tools = ["blkid", "blockdev", "wipefs", "mount", "umount", "mkfs.ext4", "e2fsck", "resize2fs"];

/** Makes programs that note how they and the process that started them were started, and become the real tools then. */
async function notingTools(home: string): Promise<{ readonly path: string; readonly notes: string }> {
  const bin = join(home, "bin");
  const notes = join(home, "notes");
  const path = Deno.env.get("PATH") ?? "";
  await Deno.mkdir(bin);
  for (const tool of tools) {
    const script = `#!/bin/sh
{ echo "$0 $*"; tr '\\0' '\\n' </proc/$$/environ; tr '\\0' '\\n' </proc/$PPID/cmdline; tr '\\0' '\\n' </proc/$PPID/environ; } >>'${notes}'
PATH='${path}' exec ${tool} "$@"
`;
    await Deno.writeTextFile(join(bin, tool), script, { mode: 0o755 });
  }
  return { path: `${bin}:${path}`, notes };
}

/** The files below a directory, without what `skip` names. */
async function* filesBelow(directory: string, skip: readonly string[]): AsyncIterable<string> {
  for await (const { name, isFile, isDirectory } of Deno.readDir(directory)) {
    const path = join(directory, name);
    if (skip.includes(path)) continue;
    if (isDirectory) yield* filesBelow(path, skip);
    else if (isFile) yield path;
  }
}

/** A text in the forms in which it could have been written. */
function formsOf(secret: string): readonly string[] {
  const bytes = new TextEncoder().encode(secret);
  return [secret, JSON.stringify(secret).slice(1, -1), bytes.toBase64(), bytes.toHex(), encodeURIComponent(secret)];
}

Deno.test({
  name: "promise 10: whole lives at the most verbose level leave no secret in logs, errors, processes or files",
  ignore: !needs("root", "loop", "mkfs.ext4"),
  async fn() {
    const home = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-redaction-" }));
    const testbed = new Testbed(home, program);
    const signal = AbortSignal.timeout(120_000);
    const outputs: string[] = [];
    try {
      const { path, notes } = await notingTools(home);
      await testbed.startSimulator("loop", signal, ["--in-band-auth"]);
      await Promise.all([
        testbed.startController(signal),
        testbed.startNode("secret.node", signal, { PATH: path }),
      ]);
      const { addresses } = testbed;
      const passphrase = `passphrase "${crypto.randomUUID()}"\\ü`;
      const dhchap = `DHHC-1:01:${crypto.getRandomValues(new Uint8Array(36)).toBase64()}:`;
      const token = addresses.jwt;
      const forged = `${token.slice(0, token.lastIndexOf("."))}.${crypto.randomUUID()}`;
      const keys = [DhchapKey.generate().reveal(), DhchapKey.generate().reveal()] as const;
      // The first two parts of a token are not secret on their own, but they should not be found either.
      const marks = [...token.split("."), forged.split(".")[2] ?? "", passphrase, dhchap];
      // The form of a key is no secret.
      const markKey = (key: string) => marks.push(key.split(":")[2] ?? "");
      for (const key of keys) markKey(key);
      const secrets = {
        jwt: token,
        "host-encryption-passphrase": passphrase,
        "other-secret": dhchap,
        "dhchap-key": keys[0],
        "dhchap-ctrl-key": keys[1],
        unknown: passphrase,
      };

      const call = async <I extends DescMessage, O extends DescMessage>(
        channel: Channel,
        method: DescMethodUnary<I, O>,
        request: MessageInitShape<I>,
      ): Promise<MessageShape<O>> => {
        const answer = await channel.call(method, request, { signal, deadline: new Date(Date.now() + 20_000) });
        outputs.push(JSON.stringify(answer, (_key, value) => typeof value === "bigint" ? String(value) : value));
        return answer;
      };
      const failedCall = async <I extends DescMessage, O extends DescMessage>(
        channel: Channel,
        method: DescMethodUnary<I, O>,
        request: MessageInitShape<I>,
      ): Promise<void> => {
        const error = await call(channel, method, request).then(() => undefined, (error) => error);
        assert(error instanceof CallError, `${method.name} did not fail`);
        outputs.push(error.message);
      };
      const { controller, node } = testbed;
      const volumeCapability = {
        accessType: { case: "mount" as const, value: { fsType: "ext4" } },
        accessMode: { mode: Mode.SINGLE_NODE_WRITER },
      };
      const creation = (name: string) => ({
        name,
        capacityRange: { requiredBytes: gib },
        volumeCapabilities: [volumeCapability],
        parameters: {
          "mgmt-endpoint": addresses.grpcs.join(","),
          "replica-count": "1",
          "project-name": addresses.projects[0] ?? "",
          "mkfs-options": "-J size=4",
        },
        secrets,
      });
      const made = await call(controller, Controller.method.createVolume, creation("kept-secret"));
      const volumeId = made.volume?.volumeId ?? "";
      const volumeContext = made.volume?.volumeContext ?? {};
      const nodeId = "secret.node";
      const attach = { volumeId, nodeId, volumeCapability, secrets };
      const { publishContext } = await call(controller, Controller.method.controllerPublishVolume, attach);
      const stagingTargetPath = join(home, "staging");
      const targetPath = join(home, "pod", "volume");
      for (const directory of [stagingTargetPath, join(home, "pod")]) await Deno.mkdir(directory);
      const stage = { volumeId, publishContext, volumeContext, stagingTargetPath, volumeCapability, secrets };
      await call(node, Node.method.nodeStageVolume, stage);
      const publish = { ...stage, targetPath };
      await call(node, Node.method.nodePublishVolume, publish);
      const grow = { volumeId, capacityRange: { requiredBytes: 2n * gib }, volumeCapability, secrets };
      await call(controller, Controller.method.controllerExpandVolume, grow);
      await call(controller, Controller.method.controllerModifyVolume, {
        volumeId,
        secrets,
        mutableParameters: { compression: "enabled" },
      });
      const snapshot = await call(controller, Controller.method.createSnapshot, {
        name: "kept-snapshot",
        sourceVolumeId: volumeId,
        secrets,
      });
      const snapshotId = snapshot.snapshot?.snapshotId ?? "";

      // Keys that LightOS makes up, keys that the Secret brings, and a node whose connections have none.
      const authenticated = {
        ...creation("kept-key"),
        parameters: { ...creation("").parameters, "in-band-auth": "bidirectional" },
      };
      const second = await call(controller, Controller.method.createVolume, authenticated);
      const keyed = { volumeId: second.volume?.volumeId ?? "", volumeContext: second.volume?.volumeContext ?? {} };
      const { "dhchap-key": _key, "dhchap-ctrl-key": _ctrl, ...withoutKeys } = secrets;
      const granted = { ...attach, ...keyed };
      await call(controller, Controller.method.controllerPublishVolume, { ...granted, secrets: withoutKeys });
      const { trustedHosts } = await testbed.ask("GET", "/model") as {
        trustedHosts: { hostSecret: string; targetSecret: string }[];
      };
      assert.equal(trustedHosts.length, 1);
      for (const { hostSecret, targetSecret } of trustedHosts) {
        for (const key of [hostSecret, targetSecret]) markKey(key);
      }
      const { publishContext: keyedContext } = await call(
        controller,
        Controller.method.controllerPublishVolume,
        granted,
      );
      assert.equal(keyedContext["in-band-auth"], "bidirectional");
      await failedCall(controller, Controller.method.controllerPublishVolume, {
        ...granted,
        secrets: { ...secrets, "dhchap-key": dhchap },
      });
      const unkeyed = { stagingTargetPath: join(home, "staging-unkeyed") };
      await Deno.mkdir(unkeyed.stagingTargetPath);
      await failedCall(node, Node.method.nodeStageVolume, {
        ...stage,
        ...keyed,
        ...unkeyed,
        publishContext: keyedContext,
      });
      await call(node, Node.method.nodeUnstageVolume, { volumeId: keyed.volumeId, ...unkeyed });
      await call(controller, Controller.method.controllerUnpublishVolume, {
        volumeId: keyed.volumeId,
        nodeId,
        secrets,
      });
      await call(controller, Controller.method.deleteVolume, { volumeId: keyed.volumeId, secrets });

      // Calls that fail too: rejected by the driver, by LightOS, and without an answer.
      const bad = { ...secrets, jwt: forged };
      await failedCall(controller, Controller.method.createVolume, { ...creation("b"), secrets: bad });
      await failedCall(controller, Controller.method.createVolume, {
        ...creation("b"),
        secrets: { ...bad, jwt: `${forged} x` },
      });
      await failedCall(controller, Controller.method.createVolume, {
        ...creation("b"),
        secrets: { ...secrets, "mgmt-ca.crt": passphrase, "mgmt-tls-pin": dhchap },
      });
      await failedCall(controller, Controller.method.deleteVolume, { volumeId, secrets });
      await failedCall(controller, Controller.method.deleteVolume, {
        volumeId: volumeId.replace(/mgmt:[^|]*/, "mgmt:127.0.0.1:1"),
        secrets,
      });
      await failedCall(node, Node.method.nodeStageVolume, { ...stage, volumeId: "no ID" });
      await failedCall(node, Node.method.nodePublishVolume, { ...publish, stagingTargetPath: join(home, "pod") });
      await testbed.ask("POST", "/faults", { rpc: "CreateVolume", code: "INTERNAL", count: 1 });
      await failedCall(controller, Controller.method.createVolume, { ...creation("c"), secrets: bad });
      await testbed.ask("DELETE", "/faults");

      await call(controller, Controller.method.deleteSnapshot, { snapshotId, secrets });
      await call(node, Node.method.nodeUnpublishVolume, { volumeId, targetPath });
      await call(node, Node.method.nodeUnstageVolume, { volumeId, stagingTargetPath });
      await call(controller, Controller.method.controllerUnpublishVolume, { volumeId, nodeId, secrets });
      await call(controller, Controller.method.deleteVolume, { volumeId, secrets });

      for (const { pid } of [testbed.running("controller"), testbed.running("node")].flatMap((one) => one ?? [])) {
        for (const file of ["cmdline", "environ"]) outputs.push(await Deno.readTextFile(`/proc/${pid}/${file}`));
      }
      await testbed.stopAll();
      // The simulator knows its own tokens; everything else in the directory was written by the driver, or for this test.
      const searched: string[] = [];
      for await (const file of filesBelow(home, [join(home, "cluster"), join(home, "simulator.log.out")])) {
        outputs.push(await Deno.readTextFile(file));
        searched.push(file);
      }
      for (const mark of marks) {
        for (const form of formsOf(mark)) {
          const found = outputs.find((text) => text.includes(form));
          assert.equal(found, undefined, `"${form}" is in: ${found?.slice(0, 2000)}`);
        }
      }
      // The search would have found something: it reads what the driver wrote, and what its tools were started with.
      const all = outputs.join("\n");
      for (const expected of [/"rpc":"NodeStageVolume"/, /"rpc":"CreateVolume"/, /UNAUTHENTICATED/, /mkfs\.ext4 -q/]) {
        assert.match(all, expected);
      }
      for (const file of [notes, join(home, "controller.log"), join(home, "node.log")]) {
        assert(searched.includes(file), `${file} was not searched`);
      }
    } finally {
      await testbed.stopAll();
      const forced = await testbed.cleanUp(false);
      assert.deepEqual(forced, []);
    }
  },
});

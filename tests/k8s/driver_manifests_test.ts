/** The driver's manifests, compared with the driver and with each other. */
import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { driverManifests, manifestRanges, minorsIn, supportedMinors } from "../../k8s/rendered_files.ts";
import { driverContainer, manifestPath, rbacKinds, readK8sFile } from "../support/charts.ts";
import { objectsOf, podOf } from "../support/objects.ts";

const lightosManifests = driverManifests.filter(({ path }) => path.startsWith("manifests/lightos/"));
const poseidonManifests = driverManifests.filter(({ path }) => path.startsWith("manifests/poseidon/"));

for (const role of ["controller", "node"]) {
  Deno.test(`the ${role} knows every argument and variable that manifests give it`, async () => {
    const { stdout } = await new Deno.Command(Deno.execPath(), {
      args: ["run", "-A", fileURLToPath(new URL("../../main.ts", import.meta.url)), role, "--help"],
      stderr: "null",
    }).output();
    const help = new TextDecoder().decode(stdout);
    const known = new Set([...help.matchAll(/env: (\w+)/g)].map(([, name]) => name));
    const templates = readK8sFile("helm/lb-csi-plugin/templates/controller.yaml") +
      readK8sFile("helm/lb-csi-plugin/templates/node.yaml") + readK8sFile("helm/lb-csi-plugin/templates/_helpers.tpl");

    for (const { path } of driverManifests) {
      const { args, env = [] } = driverContainer(path, role);
      const names = env.map(({ name }) => name);
      assert.deepEqual(args, [role]);
      assert.ok(names.length >= 5);
      assert.deepEqual(names.filter((name) => name !== "KUBE_NODE_NAME" && !known.has(name)), [], path);
    }
    // The templates also name variables that only other values render.
    const named = [...templates.matchAll(/- name: ((?:LB_CSI|CSI)_\w+)/g)].map(([, name]) => name ?? "");
    const ofOtherRole = role === "controller" ? ["LB_CSI_NODE_ID", "LB_CSI_ATTACH", "LB_CSI_MAX_VOLUMES"] : [];
    // Other commands that run in these pods: discovery-client, doctor.
    const ofOtherCommands = ["LB_CSI_DISCOVERY_IO_QUEUES", "LB_CSI_DISCOVERY_METRICS_ADDRESS", "LB_CSI_KUBELET_DIR"];
    assert.ok(named.length > 10);
    assert.deepEqual(
      named.filter((name) => !known.has(name) && ![...ofOtherRole, ...ofOtherCommands].includes(name)),
      [],
    );
  });
}

Deno.test("names, node IDs and paths are those of the vendor's driver, so that existing volumes keep working", () => {
  for (const { path, minors } of lightosManifests) {
    const objects = objectsOf(readK8sFile(path));
    const find = (kind: string) => objects.filter((object) => object.kind === kind);
    const names = (kind: string) => find(kind).map(({ metadata }) => metadata.name).toSorted();
    const [daemonSet] = find("DaemonSet");
    const controller = [...find("Deployment"), ...find("StatefulSet")][0];

    assert.deepEqual(names("CSIDriver"), ["csi.lightbitslabs.com"]);
    assert.deepEqual(names("ServiceAccount"), ["lb-csi-ctrl-sa", "lb-csi-node-sa"]);
    assert.deepEqual(names("ClusterRole"), [
      "lb-csi-attacher-role",
      "lb-csi-provisioner-role",
      "lb-csi-resizer-role",
      "lb-csi-snapshotter-role",
    ]);
    assert.deepEqual(names("ClusterRoleBinding"), [
      "lb-csi-attacher-binding",
      "lb-csi-provisioner-binding",
      "lb-csi-resizer-binding",
      "lb-csi-snapshotter-binding",
    ]);
    assert.equal(controller?.kind, minors.first >= 25 ? "Deployment" : "StatefulSet");
    assert.equal(controller.metadata.name, "lb-csi-controller");
    assert.deepEqual(controller.spec?.selector?.matchLabels, { app: "lb-csi-plugin", role: "controller" });
    assert.ok(controller.kind === "Deployment" || controller.spec.serviceName === "lb-csi-ctrl-svc");
    assert.equal(daemonSet?.metadata.name, "lb-csi-node");
    assert.deepEqual(daemonSet.spec?.selector?.matchLabels, { app: "lb-csi-plugin", role: "node" });

    const pod = daemonSet.spec.template?.spec;
    const node = driverContainer(path, "node");
    const value = (name: string) => node.env?.find((entry) => entry.name === name)?.value;
    assert.equal(value("LB_CSI_NODE_ID"), "$(KUBE_NODE_NAME).node");
    assert.equal(value("CSI_ENDPOINT"), "unix:///csi/csi.sock");
    const hostPaths = pod?.volumes?.flatMap(({ hostPath }) => hostPath?.path ?? []);
    const plugin = "/var/lib/kubelet/plugins/csi.lightbitslabs.com";
    assert.deepEqual(hostPaths, [
      plugin,
      "/var/lib/kubelet/plugins_registry/",
      "/var/lib/kubelet/plugins/kubernetes.io/csi",
      "/var/lib/kubelet/pods",
      "/dev",
      "/",
      path.includes("-dc") ? `${plugin}/discovery.d` : "/etc/discovery-client/discovery.d",
    ]);
    assert.ok(pod?.containers[1]?.args?.includes(`--kubelet-registration-path=${plugin}/csi.sock`));
  }
});

Deno.test("roles and bindings have names that no other CSI driver uses", () => {
  for (const { path } of driverManifests) {
    const prefix = path.startsWith("manifests/lightos/") ? "lb-csi-" : "poscsi-";
    const rights = objectsOf(readK8sFile(path)).filter(({ kind }) => rbacKinds.includes(kind));

    assert.ok(rights.length >= 4);
    assert.deepEqual(rights.filter(({ metadata }) => !metadata.name.startsWith(prefix)), [], path);
  }
});

Deno.test("the driver for PoseidonOS has one controller, and shares no object with the one for LightOS", () => {
  for (const { path } of poseidonManifests) {
    const objects = objectsOf(readK8sFile(path));
    const lightos = objectsOf(readK8sFile(path.replace("poseidon/poscsi-", "lightos/lb-csi-plugin-")));
    const key = ({ kind, metadata }: { kind: string; metadata: { name: string } }) => `${kind} ${metadata.name}`;
    const controller = objects.find(({ metadata }) => metadata.name === "poscsi-controller");
    const value = (role: string, name: string) =>
      driverContainer(path, role).env?.find((entry) => entry.name === name)?.value;

    const shared = objects.map(key).filter((name) => lightos.map(key).includes(name));
    assert.deepEqual(shared, []);
    assert.ok(objects.some((object) => key(object) === "CSIDriver csi.pos.io"));
    assert.equal(controller?.kind, "StatefulSet");
    assert.deepEqual(["controller", "node"].map((role) => value(role, "LB_CSI_BACKEND")), ["poseidon", "poseidon"]);
    assert.equal(value("node", "LB_CSI_ATTACH"), "direct");
    assert.match(readK8sFile(path), /--kubelet-registration-path=.*\/plugins\/csi\.pos\.io\/csi\.sock/);
    assert.doesNotMatch(readK8sFile(path), /lightos|secrets|snapshot/);
  }
  assert.equal(poseidonManifests.length, manifestRanges.length);
});

Deno.test("the CSIDriver has the fields that its Kubernetes version knows, and none that cannot be applied over the vendor's", () => {
  const fieldsOf = (minor: number) => {
    const objects = objectsOf(readK8sFile(manifestPath(`lb-csi-plugin-k8s-v1.${minor}.yaml`)));
    const driver = objects.find(({ kind }) => kind === "CSIDriver");
    return [driver?.apiVersion, driver?.spec];
  };
  const oldest = { attachRequired: true, podInfoOnMount: true, volumeLifecycleModes: ["Persistent"] };
  const since20 = { ...oldest, fsGroupPolicy: "ReadWriteOnceWithFSType", requiresRepublish: false };
  const since23 = { ...since20, storageCapacity: false };
  const since25 = { ...since23, seLinuxMount: true };

  for (const minor of minorsIn(supportedMinors)) {
    const fields = minor < 20
      ? oldest
      : minor < 23
      ? since20
      : minor < 25
      ? since23
      : minor < 29
      ? since25
      : { ...since25, fsGroupPolicy: "File" };
    assert.deepEqual(fieldsOf(minor), [`storage.k8s.io/v1${minor < 18 ? "beta1" : ""}`, fields], `1.${minor}`);
  }
});

Deno.test("only containers that need it are privileged; the controller is not root and has a read-only file system", () => {
  for (const { path } of driverManifests) {
    const pods = objectsOf(readK8sFile(path)).flatMap((object) => podOf(object) ?? []);
    const containers = pods.flatMap(({ spec }) => [...spec.initContainers ?? [], ...spec.containers]);
    const privileged = containers.filter(({ securityContext }) => securityContext?.privileged);
    const controller = pods.find(({ spec }) => spec.containers.some(({ args }) => args?.[0] === "controller"))?.spec;

    assert.deepEqual(privileged.map(({ name }) => name), [
      "init-nvme-tcp",
      driverContainer(path, "node").name,
      ...path.includes("-dc") ? ["lb-nvme-discovery-client"] : [],
    ]);
    assert.ok(containers.length - privileged.length >= 6);
    for (const { name, securityContext } of containers.filter((container) => !privileged.includes(container))) {
      // Sidecars on the node run as root without capabilities, those of the controller as the user of their pod.
      const onNode = pods.some(({ spec }) =>
        spec.hostNetwork && spec.containers.some((one) => one.securityContext === securityContext)
      );
      assert.ok(!onNode || ["csi-node-driver-registrar", "livenessprobe"].includes(name));
      assert.deepEqual(securityContext, {
        ...onNode ? { runAsUser: 0 } : {},
        allowPrivilegeEscalation: false,
        readOnlyRootFilesystem: true,
        capabilities: { drop: ["ALL"] },
      });
    }
    assert.equal(controller?.securityContext?.runAsNonRoot, true);
    assert.equal(controller.hostNetwork, undefined);
  }
});

Deno.test("there is a role for leases for each sidecar that elects a leader, and only then", () => {
  for (const { path, minors } of driverManifests) {
    const objects = objectsOf(readK8sFile(path));
    const controller = objects.find(({ metadata }) => /^(lb-csi|poscsi)-controller$/.test(metadata.name));
    const sidecars = controller?.spec?.template?.spec.containers.filter(({ name }) => name.startsWith("csi-")) ?? [];
    const electing = sidecars.filter(({ args }) => args?.includes("--leader-election"));
    const leases = objects.filter(({ kind, rules }) => kind === "Role" && rules?.[0]?.resources.includes("leases"));

    // PoseidonOS has neither snapshots nor expansion. Its resizer changes volume attributes, since Kubernetes 1.34.
    assert.equal(sidecars.length, path.startsWith("manifests/lightos/") ? 4 : minors.first < 34 ? 2 : 3);
    assert.equal(electing.length, controller?.kind === "Deployment" ? 4 : 0, path);
    assert.equal(leases.length, electing.length, path);
    assert.equal(objects.filter(({ kind }) => kind === "PodDisruptionBudget").length, electing.length > 0 ? 1 : 0);
  }
});

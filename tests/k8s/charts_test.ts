/** The charts of k8s/helm, as Helm renders them. */
import assert from "node:assert/strict";
import { parse } from "yaml";
import { chartNames, render, version } from "../../k8s/charts.ts";
import { minorsIn, supportedMinors } from "../../k8s/rendered_files.ts";
import { controllerOptions } from "../../lib/cli/controller.ts";
import { discoveryClientOptions } from "../../lib/cli/discovery_client.ts";
import { doctorOptions } from "../../lib/cli/doctor.ts";
import { nodeOptions } from "../../lib/cli/node.ts";
import type { Options } from "../../lib/cli/options.ts";
import { parseConfig } from "../../lib/storage/lightos/cluster_file.ts";
import { parseSystems } from "../../lib/storage/poseidon/cluster_file.ts";
import {
  chartMinors,
  driverContainer,
  extraMount,
  extraVolume,
  manifestPath,
  pem,
  rbacKinds,
  readK8sFile,
  renderRequest,
  textOf,
} from "../support/charts.ts";
import { unlessGoLacks } from "../support/go.ts";
import { needs } from "../support/needs.ts";
import { objectsOf } from "../support/objects.ts";

const go = needs("go");
const rack1 = { name: "rack1", endpoints: "192.0.2.1:443" };

Deno.test({
  name: "each chart renders for each Kubernetes version that it is for, and helm lint reports nothing",
  ignore: !go,
  fn: async () => {
    const cases = chartNames.flatMap((chart) => minorsIn(supportedMinors).map((minor) => ({ chart, minor })));
    const rendered = await unlessGoLacks(() =>
      render(cases.map(({ chart, minor }) => ({ ...renderRequest(chart, minor), lint: true })))
    );
    if (rendered === undefined) return;

    for (const [i, { chart, minor }] of cases.entries()) {
      const { first, last } = chartMinors[chart];
      if (minor >= first && minor <= last) {
        assert.deepEqual([chart, minor, rendered[i]?.error, rendered[i]?.messages], [chart, minor, undefined, []]);
      } else {
        assert.match(
          rendered[i]?.error ?? "",
          new RegExp(`^${chart} is for Kubernetes .*, not for v1\\.${minor}\\.0$`),
        );
      }
    }
  },
});

Deno.test("charts and the default image have the driver's version", () => {
  for (const chart of chartNames) {
    const about: { version: string; appVersion: string } = parse(readK8sFile(`helm/${chart}/Chart.yaml`));
    assert.equal(about.version, version, chart);
    if (chart.startsWith("lb-csi")) assert.equal(about.appVersion, version, chart);
  }
  assert.equal(parse(readK8sFile("helm/lb-csi-plugin/values.yaml")).image, `lbcsi:${version}`);
});

Deno.test({
  name: "with vendorRbacNames, roles and bindings have the names of the vendor's driver, each with the same rules",
  ignore: !go,
  fn: async () => {
    const requests = [{}, { vendorRbacNames: true }].map((values) =>
      renderRequest("lb-csi-plugin", 37, { ...values, enableHealthMonitor: true })
    );
    const rendered = await unlessGoLacks(() => render(requests));
    if (rendered === undefined) return;
    const [own = [], vendors = []] = rendered.map((one) =>
      objectsOf(textOf(one)).filter(({ kind }) => rbacKinds.includes(kind))
    );
    const names = (kind: string) => vendors.filter((one) => one.kind === kind).map(({ metadata }) => metadata.name);

    assert.deepEqual(names("ClusterRole"), [
      "external-provisioner-runner",
      "external-attacher-runner",
      "lb-csi-external-resizer-runner-role",
      "external-snapshotter-runner",
      "lb-csi-health-monitor-role",
    ]);
    assert.deepEqual(names("RoleBinding"), [
      "csi-provisioner-role-cfg",
      "csi-attacher-role-cfg",
      "csi-resizer-role-cfg",
      "external-snapshotter-leaderelection",
      "lb-csi-health-monitor-cfg",
    ]);
    assert.deepEqual(vendors.map(({ rules }) => rules), own.map(({ rules }) => rules));
  },
});

Deno.test({
  name: "each cluster of the chart can have a token and certificates of its own, as files of the pod",
  ignore: !go,
  fn: async () => {
    const values = {
      jwtSecret: [{ name: "global" }, { name: "rack1", jwt: "YWJj" }, { name: "secret-of-rack2", file: "rack2.jwt" }],
      caFiles: { "rack1.pem": pem },
      mgmtCa: pem,
      controllerExtraVolumes: [extraVolume],
      controllerExtraVolumeMounts: [extraMount],
      controllerPriorityClassName: "",
      nodePriorityClassName: "",
      clusters: [
        { ...rack1, jwt: "/etc/lb-csi/rack1", ca: "/etc/lb-csi-config/rack1.pem" },
        { name: "rack2", endpoints: "192.0.2.9:443", jwt: "/etc/lb-csi/rack2.jwt", ca: "/etc/lb-csi-config/ca.pem" },
        { name: "rack3", endpoints: "192.0.2.17:443", jwt: "/etc/lbcsi/jwt", ca: "/etc/lbcsi/ca.pem" },
      ],
    };
    const rendered = await unlessGoLacks(() => render([renderRequest("lb-csi-plugin", 37, values)]));
    if (rendered === undefined) return;
    const [only] = rendered;
    assert.ok(only !== undefined && only.error === undefined, JSON.stringify(only));
    const objects = objectsOf(textOf(only));
    const config = objects.find(({ kind }) => kind === "ConfigMap") as unknown as { data: Record<string, string> };
    const pod = objects.find(({ kind }) => kind === "Deployment")?.spec?.template?.spec as unknown as {
      volumes: { name: string; projected?: { sources: { secret: { name: string; items: { path: string }[] } }[] } }[];
    };
    const tokens = pod.volumes.find(({ name }) => name === "jwt")?.projected?.sources ?? [];

    assert.deepEqual(tokens.map(({ secret }) => [secret.name, secret.items.map(({ path }) => path)]), [
      ["global", ["jwt"]],
      ["rack1", ["rack1"]],
      ["secret-of-rack2", ["rack2.jwt"]],
    ]);
    assert.deepEqual(Object.keys(config.data).sort(), ["ca.pem", "clusters.yaml", "rack1.pem"]);
    assert.deepEqual(objects.filter(({ kind }) => kind === "Secret").map(({ metadata }) => metadata.name), ["rack1"]);
    assert.doesNotMatch(textOf(only), /priorityClassName/);
  },
});

Deno.test({
  name: "certificates of the chart may have text around them, in files of any name, and private keys are rejected",
  ignore: !go,
  fn: async () => {
    const bundle = `# our CA\nsubject=CN = ca\n${pem}`;
    const key = "-----BEGIN EC PRIVATE KEY-----\nMHcC\n-----END EC PRIVATE KEY-----\n";
    const rendered = await unlessGoLacks(() =>
      render([
        renderRequest("lb-csi-plugin", 37, { mgmtCa: bundle, caFiles: { "1e3": bundle.replaceAll("\n", "\r\n") } }),
        renderRequest("lb-csi-plugin", 37, { mgmtCa: `${pem}${key}` }),
        renderRequest("lb-csi-plugin", 37, { caFiles: { "ca.crt": `${key}${pem}` } }),
        renderRequest("lb-csi-plugin", 37, { mgmtCa: "/etc/ca.pem" }),
      ])
    );
    if (rendered === undefined) return;
    const [good, ...bad] = rendered;
    assert.ok(good !== undefined && good.error === undefined, JSON.stringify(good));
    const config = objectsOf(textOf(good)).find(({ kind }) => kind === "ConfigMap") as unknown as {
      data: Record<string, string>;
    };

    assert.deepEqual(Object.keys(config.data).sort(), ["1e3", "ca.pem"]);
    for (const text of Object.values(config.data)) assert.equal(text.trim(), bundle.trim());
    for (const [at, { error }] of bad.entries()) assert.match(error ?? "", /mgmtCa|caFiles/, `${at}`);
  },
});

Deno.test({
  name: "the notes of the chart find the pods of the release",
  ignore: !go,
  fn: async () => {
    const backends = ["lightos", "poseidon"].map((backend) => renderRequest("lb-csi-plugin", 37, { backend }));
    const rendered = await unlessGoLacks(() => render(backends));
    if (rendered === undefined) return;

    for (const one of rendered) {
      const notes = one.files["lb-csi-plugin/templates/NOTES.txt"] ?? "";
      const [, apps = ""] = /get pods -l 'app in \(([^)]+)\)'/.exec(notes) ?? [];
      const workloads = objectsOf(textOf(one)).filter(({ kind }) => /^(DaemonSet|Deployment|StatefulSet)$/.test(kind));
      const labels = workloads.map(({ spec }) => (spec?.selector?.matchLabels as { app?: string } | undefined)?.app);
      assert.equal(labels.length, 2);
      assert.deepEqual(labels.filter((app) => !apps.split(", ").includes(app ?? "")), [], notes);
    }
  },
});

Deno.test("the chart's schema knows each variable of the driver that the chart does not set, and each key of cluster files", () => {
  const { properties }: { properties: Record<string, { properties: object; items: { properties: object } }> } = JSON
    .parse(readK8sFile("helm/lb-csi-plugin/values.schema.json"));
  const variables = (...tables: readonly Options[]) =>
    new Set(tables.flatMap((table) => Object.values(table).flatMap(({ env = [] }) => env)));
  const setByChart = (role: string) =>
    driverContainer(manifestPath("lb-csi-plugin-k8s-v1.37.yaml"), role).env?.map(({ name }) => name);
  const allowed = (value: string) => Object.keys(properties[value]?.properties ?? {}).sort();
  const without = (all: ReadonlySet<string>, taken: readonly string[] = []) =>
    [...all].filter((name) => !taken.includes(name)).sort();
  const knownKeys = (parseUnknownKey: () => unknown) => {
    try {
      parseUnknownKey();
    } catch (error) {
      return /known: ([^)]+)\)/.exec(error instanceof Error ? error.message : "")?.[1]?.split(", ").sort();
    }
    return undefined;
  };
  const keysIn = (value: string) => Object.keys(properties[value]?.items.properties ?? {}).sort();

  assert.deepEqual(allowed("controllerOptions"), without(variables(controllerOptions), setByChart("controller")));
  assert.deepEqual(allowed("nodeOptions"), without(variables(nodeOptions, doctorOptions), setByChart("node")));
  assert.deepEqual(
    allowed("discoveryClientOptions"),
    without(variables(discoveryClientOptions), ["LB_CSI_LOG_LEVEL", "LB_CSI_LOG_FMT", "LB_CSI_DISCOVERY_IO_QUEUES"]),
  );
  assert.deepEqual(keysIn("clusters"), knownKeys(() => parseConfig("f", "clusters: [{ zzz: 1 }]")));
  assert.deepEqual(keysIn("systems"), knownKeys(() => parseSystems("f", "systems: [{ zzz: 1 }]")));
});

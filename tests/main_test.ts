import { deepStrictEqual, match, ok, strictEqual } from "node:assert/strict";
import config from "../deno.json" with { type: "json" };
import { permissionsWith } from "../k8s/image/permissions.ts";
import { Channel } from "../lib/grpc/client.ts";
import {
  Controller,
  Identity,
  Node,
  NodeServiceCapability_RPC_Type as NodeRpc,
  VolumeCapability_AccessMode_Mode as Mode,
} from "../proto/gen/csi_pb.ts";
import { lbcsiCommand, mainPath, runLbcsi } from "./support/lbcsi.ts";
import { poseidonParameters, startPoseidon } from "./support/poseidon.ts";
import { startSimulator } from "./support/simulator.ts";

Deno.test("lbcsi version prints the version of deno.json", async () => {
  const { code, out } = await runLbcsi(["version"]);

  strictEqual(code, 0);
  ok(out.startsWith(`lbcsi ${config.version} (commit `) && out.includes(", CSI 1.12, Deno "), out);
});

Deno.test("lbcsi --help lists every command, and each of them explains its options", async () => {
  const { code, out } = await runLbcsi(["--help"]);
  const names = [...out.matchAll(/^ {2}([a-z-]+) {2,}/gm)].flatMap(([, name]) => name === undefined ? [] : [name]);

  strictEqual(code, 0);
  ok(names.length >= 5, out);
  for (const name of names.filter((name) => name !== "version")) {
    const help = await runLbcsi([name, "--help"]);
    strictEqual(help.code, 0, name);
    match(help.out, new RegExp(`^lbcsi ${name}: `));
  }
});

for (
  const [args, code, message] of [
    [[], 2, /usage: lbcsi COMMAND/],
    [["contrller"], 2, /there is no command "contrller", did you mean "controller"\? lbcsi --help lists them/],
    [["constructor"], 2, /there is no command "constructor"/],
    [["node"], 2, /--node-id is missing \(or set LB_CSI_NODE_ID\)/],
    [["node", "--node-id", "worker 1.node"], 2, /only letters, digits/],
    [["node", "--node-id", "worker"], 2, /does not end in "\.node" \(see --node-id-suffix\)/],
    [["controller", "--endpoint", "tcp://127.0.0.1:1"], 2, /is not of the form unix:\/\/\//],
    [["controller", "--mgmt-ca", "/nonexistent/ca.pem"], 2, /--mgmt-ca "\/nonexistent\/ca\.pem": /],
    [["controller", "--backend", "ceph"], 2, /--backend "ceph": is not lightos or poseidon/],
    [["controller", "--backend=poseidon", "--mgmt-ca", "/ca"], 2, /--mgmt-ca cannot be used with PoseidonOS: .* HTTP/],
    [["controller", "--backend=poseidon", "--mgmt-tls-verify=false"], 2, /--mgmt-tls-verify cannot be used with/],
    [["controller", "--backend=poseidon", "--jwt-path", "/jwt"], 2, /--jwt-path cannot .*: it takes no tokens/],
    [["identity", "--backend=poseidon", "--snapshot-metadata"], 2, /--snapshot-metadata cannot .* it has no snapshots/],
    [["controller", "--backend=poseidon", "--config", "/none.yaml"], 2, /Cannot use cluster file \/none\.yaml/],
    [
      ["node", "--backend=poseidon", "--node-id", "a.node", "--attach=discovery-client"],
      2,
      /that daemon is for LightOS/,
    ],
    [
      ["identity", "--endpoint", "unix:///nonexistent/csi/csi.sock"],
      1,
      /its directory is missing, create \/nonexistent/,
    ],
  ] as const
) {
  Deno.test(`lbcsi ${args.join(" ")} ends with status ${code} and says why`, async () => {
    const result = await runLbcsi(args);

    strictEqual(result.code, code, result.err);
    match(result.err + result.out, message);
  });
}

for (const [role, signal] of [["identity", "SIGHUP"], ["controller", "SIGINT"], ["node", "SIGTERM"]] as const) {
  Deno.test(`lbcsi ${role} serves Identity on its socket and ends with 0 on ${signal}`, async () => {
    const directory = await Deno.makeTempDir({ prefix: "lbcsi-main-" });
    const process = lbcsiCommand([role, ...(role === "node" ? ["--node-id", "a.node"] : [])], {
      CSI_ENDPOINT: `unix://${directory}/csi.sock`,
    }).spawn();
    try {
      using channel = new Channel({ address: `unix://${directory}/csi.sock` });
      const info = await untilAnswered(channel);

      strictEqual(info.name, "csi.lightbitslabs.com");
      process.kill(signal);
      const { code, stderr } = await process.output();
      strictEqual(code, 0, new TextDecoder().decode(stderr));
      strictEqual((await Array.fromAsync(Deno.readDir(directory))).length, 0, "the socket must be gone");
    } finally {
      end(process);
      await Deno.remove(directory, { recursive: true });
    }
  });
}

for (const role of ["identity", "controller", "node"] as const) {
  Deno.test(`lbcsi ${role} --backend poseidon is csi.pos.io, and announces no growth`, async () => {
    const directory = await Deno.makeTempDir({ prefix: "lbcsi-main-" });
    const process = lbcsiCommand([role, "--backend", "poseidon", ...(role === "node" ? ["--node-id", "a.node"] : [])], {
      CSI_ENDPOINT: `unix://${directory}/csi.sock`,
    }).spawn();
    try {
      using channel = new Channel({ address: `unix://${directory}/csi.sock` });
      const info = await untilAnswered(channel);

      strictEqual(info.name, "csi.pos.io");
      const options = { signal: AbortSignal.timeout(5000) };
      const plugin = await channel.call(Identity.method.getPluginCapabilities, {}, options);
      deepStrictEqual(plugin.capabilities.map(({ type }) => type.case), ["service"]);
      if (role === "node") {
        const { capabilities } = await channel.call(Node.method.nodeGetCapabilities, {}, options);
        const names = capabilities.map(({ type }) => type.case === "rpc" ? NodeRpc[type.value.type] : "");
        ok(names.length > 0 && !names.includes("EXPAND_VOLUME"), names.join());
      }
      process.kill("SIGTERM");
      strictEqual((await process.output()).code, 0);
    } finally {
      end(process);
      await Deno.remove(directory, { recursive: true });
    }
  });
}

for (
  const [role, who, variables, warned] of [
    ["identity", "the executable with all permissions", {
      LB_CSI_LOG_LEVLE: "debug",
      LB_CSI_RWX: "true",
      LB_CSI_KUBELET_DIR: "/k",
    }, [
      'LB_CSI_LOG_LEVLE is not the variable of any option, did you mean "LB_CSI_LOG_LEVEL"?',
      "LB_CSI_RWX is not the variable of any option",
    ]],
    // The executable for controllers may not list variables, but knows the names of the vendor's.
    ["controller", "the executable for controllers", { LB_CSI_LOG_LEVLE: "debug", LB_CSI_RWX: "true" }, [
      "LB_CSI_RWX is not the variable of any option",
    ]],
  ] as const
) {
  Deno.test(`${who} warns of unknown LB_CSI_ variables at its start`, async () => {
    const directory = await Deno.makeTempDir({ prefix: "lbcsi-main-" });
    const permissions = role === "controller" ? permissionsWith([directory], [directory]) : ["-A"];
    const jwt = role === "controller" ? ["--jwt-path", `${directory}/jwt`] : [];
    const process = new Deno.Command(Deno.execPath(), {
      args: ["run", ...permissions, "--no-check", mainPath, role, "--endpoint", `unix://${directory}/csi.sock`, ...jwt],
      env: { NO_COLOR: "1", ...variables },
      stdin: "null",
      stdout: "null",
      stderr: "piped",
    }).spawn();
    try {
      using channel = new Channel({ address: `unix://${directory}/csi.sock` });
      await untilAnswered(channel);
      process.kill("SIGTERM");
      const { stderr } = await process.output();
      const lines = new TextDecoder().decode(stderr).split("\n").filter((line) => line.startsWith("{"));
      const warnings = lines.map((line) => JSON.parse(line)).filter(({ level }) => level === "warning");

      deepStrictEqual(
        warnings.map(({ event, error }) => [event, error]),
        warned.map((error) => [
          "ignores an unknown environment variable",
          error,
        ]),
      );
    } finally {
      end(process);
      await Deno.remove(directory, { recursive: true });
    }
  });
}

Deno.test("lbcsi controller --backend poseidon calls DAgent and no proxy", async () => {
  await using simulator = await startPoseidon();
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-main-" });
  // Nothing listens there.
  const proxies = ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"].map((name) => [name, "http://127.0.0.1:9"]);
  const args = ["controller", "--backend", "poseidon", "--endpoint", `unix://${directory}/csi.sock`];
  const process = lbcsiCommand(args, Object.fromEntries(proxies)).spawn();
  try {
    using channel = new Channel({ address: `unix://${directory}/csi.sock` });
    await untilAnswered(channel);

    const { volume } = await channel.call(Controller.method.createVolume, {
      name: "pvc-1",
      volumeCapabilities: [{
        accessType: { case: "block", value: {} },
        accessMode: { mode: Mode.SINGLE_NODE_WRITER },
      }],
      parameters: poseidonParameters(simulator),
    }, { signal: AbortSignal.timeout(10_000) });

    strictEqual(volume?.capacityBytes, 1n << 20n);
    // csi-resizer ends unless it gets an answer without capabilities from the controller.
    const { capabilities } = await channel.call(Node.method.nodeGetCapabilities, {}, {
      signal: AbortSignal.timeout(5000),
    });
    deepStrictEqual(capabilities, []);
    process.kill("SIGTERM");
    strictEqual((await process.output()).code, 0);
  } finally {
    end(process);
    await Deno.remove(directory, { recursive: true });
  }
});

Deno.test("lbcsi controller lets a running call end after SIGTERM", async () => {
  await using simulator = await startSimulator();
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-main-" });
  const process = lbcsiCommand(["controller", "--endpoint", `unix://${directory}/csi.sock`]).spawn();
  try {
    using channel = new Channel({ address: `unix://${directory}/csi.sock` });
    await untilAnswered(channel);
    simulator.control.fail({ rpc: "CreateVolume", delayMs: 1000 });

    const created = channel.call(Controller.method.createVolume, {
      name: "pvc-1",
      volumeCapabilities: [{
        accessType: { case: "block", value: {} },
        accessMode: { mode: Mode.SINGLE_NODE_WRITER },
      }],
      parameters: {
        "mgmt-endpoint": simulator.addresses.grpc.join(","),
        "mgmt-scheme": "grpc",
        "replica-count": "1",
        "project-name": "default",
      },
      secrets: { jwt: simulator.addresses.jwt },
    }, { signal: AbortSignal.timeout(10_000) });
    while ((simulator.control.calls()["CreateVolume"]?.total ?? 0) === 0) {
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
    process.kill("SIGTERM");

    ok((await created).volume?.volumeId);
    strictEqual((await process.output()).code, 0);
  } finally {
    end(process);
    await Deno.remove(directory, { recursive: true });
  }
});

async function untilAnswered(channel: Channel) {
  const until = Date.now() + 20_000;
  for (;;) {
    try {
      return await channel.call(Identity.method.getPluginInfo, {}, { signal: AbortSignal.timeout(5000) });
    } catch (error) {
      if (Date.now() > until) throw error;
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }
}

function end(process: Deno.ChildProcess): void {
  try {
    process.kill("SIGKILL");
  } catch {
    return; // It has ended.
  }
}

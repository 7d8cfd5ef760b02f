import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import deno from "../deno.json" with { type: "json" };

/** An import: `from` and local `to` are paths from the root of the repository; others keep their `npm:` or `node:`. */
interface Edge {
  readonly from: string;
  readonly to: string;
  readonly typeOnly: boolean;
}

const root = new URL("../", import.meta.url);

/** Whether a path belongs to a room: a directory ends with "/", a file is itself. */
const within = (path: string, rooms: readonly string[]) =>
  rooms.some((room) => room.endsWith("/") ? path.startsWith(room) : path === room);

function roomOf(path: string): string {
  if (path === "main.ts") return "main";
  if (!path.startsWith("lib/")) {
    return path.startsWith("proto/gen/") ? "gen" : "outside";
  }
  return path.split("/").length === 2 ? "lib" : path.split("/").slice(0, 2).join("/");
}

/** Which local files each room may import, besides its own and the shared vocabulary directly in lib/. */
const mayImport: Readonly<Record<string, readonly string[]>> = {
  "main": ["lib/"],
  "lib": [],
  "gen": [],
  "lib/grpc": [],
  "lib/csi": ["proto/gen/csi_pb.ts", "lib/host/"],
  "lib/storage": ["proto/gen/lightos_pb.ts", "proto/gen/lightos_schedule_pb.ts", "lib/grpc/"],
  "lib/host": [],
  // It takes the place of LightOS' Discovery-Client on this machine.
  "lib/discovery": ["lib/host/"],
  // The subcommands put the rooms together. The simulator and the demo are loaded by their entry files.
  "lib/cli": [
    "proto/gen/csi_pb.ts",
    "lib/grpc/",
    "lib/csi/",
    "lib/storage/",
    "lib/host/",
    "lib/discovery/",
    "lib/simulator/lightos/simulator.ts",
    "lib/simulator/poseidon/simulator.ts",
    "lib/demo/demo.ts",
    "deno.json",
  ],
  // A mistake that it shared with the driver would stay hidden.
  "lib/simulator": ["proto/gen/lightos_pb.ts", "proto/gen/lightos_schedule_pb.ts", "lib/grpc/"],
  // It sees the driver from outside, as an orchestrator does.
  "lib/demo": ["proto/gen/csi_pb.ts", "lib/grpc/"],
};
/** And from where types alone may come. */
const mayImportTypes: Readonly<Record<string, readonly string[]>> = {
  "lib/csi": ["lib/storage/backend.ts", "lib/grpc/"],
};
/** Parts of rooms that never import each other. */
const separateParts: readonly (readonly [string, string])[] = [["lib/storage/lightos/", "lib/storage/poseidon/"]];

/** Modules that only some rooms may use. `node:fs` and its like are `Deno.` under another name. */
const places: readonly (readonly [what: RegExp, where: readonly string[]])[] = [
  [/^npm:@grpc\//, ["lib/grpc/"]],
  [/^node:http2$/, ["lib/grpc/"]],
  [/^node:tls$/, ["lib/grpc/", "lib/simulator/"]],
  [/^node:(fs|fs\/promises|child_process|os|net|http|https|dgram|process)$/, [
    "lib/grpc/",
    "lib/host/",
    "lib/simulator/",
    "lib/cli/",
  ]],
];

const mayUseDeno = [
  "main.ts",
  "lib/cli/",
  "lib/host/linux_host.ts",
  "lib/host/programs.ts",
  "lib/host/run_command.ts",
  "lib/host/shared_watcher.ts",
  "lib/host/volume_operations.ts",
  "lib/host/volume_threads.ts",
  "lib/context.ts",
  "lib/log.ts",
  // Names the symbol Deno.customInspect.
  "lib/secrets.ts",
  "lib/grpc/unix_socket.ts",
  "lib/simulator/",
  "lib/demo/",
  "tests/",
  "proto/generate.ts",
];

/** Why an import is not allowed, or undefined. */
function problemOf({ from, to, typeOnly }: Edge): string | undefined {
  const room = roomOf(from);
  const problem = (rule: string) => `${from} imports ${to}: ${rule}`;
  if (to.startsWith("npm:") || to.startsWith("node:")) {
    if (room === "main") return problem("it imports only files of lib/");
    if (to.startsWith("npm:") && !Object.values(deno.imports).includes(to)) return problem("it is not in deno.json");
    const place = places.find(([what]) => what.test(to));
    if (place === undefined || within(from, place[1])) return undefined;
    return typeOnly ? undefined : problem(`only ${place[1].join(", ")} may`);
  }
  if (/^(https?|jsr|data):/.test(to)) return problem("only local files, npm: and node: are used");
  if (roomOf(to) === "outside") {
    return within(to, mayImport[room] ?? []) ? undefined : problem("it is outside the rooms");
  }
  const areSeparate = separateParts.some(([one, other]) =>
    (from.startsWith(one) && to.startsWith(other)) || (from.startsWith(other) && to.startsWith(one))
  );
  if (areSeparate) return problem("the code of one storage system does not import that of another");
  if (roomOf(to) === room) return undefined;
  if (roomOf(to) === "lib") return room === "gen" ? problem("generated code stands alone") : undefined;
  if (within(to, mayImport[room] ?? [])) return undefined;
  if (typeOnly && within(to, mayImportTypes[room] ?? [])) return undefined;
  return problem(`${room} may not`);
}

interface Resolved {
  readonly specifier?: string;
}
interface Info {
  readonly modules: readonly {
    readonly specifier: string;
    readonly dependencies?: readonly {
      readonly specifier: string;
      readonly code?: Resolved;
      readonly type?: Resolved;
    }[];
  }[];
}

/** Every import of main.ts and of all files of lib/. */
async function edges(): Promise<readonly Edge[]> {
  const found = new Map<string, readonly Edge[]>();
  const local = (specifier: string) => specifier.startsWith(root.href) ? specifier.slice(root.href.length) : specifier;
  for (const start of ["main.ts", ...sources("lib/")]) {
    if (found.has(start)) continue;
    const { code, stdout } = await new Deno.Command(Deno.execPath(), {
      args: ["info", "--json", start],
      cwd: fileURLToPath(root),
      stderr: "null",
    }).output();
    assert.equal(code, 0);
    const { modules }: Info = JSON.parse(new TextDecoder().decode(stdout));
    for (const { specifier, dependencies = [] } of modules) {
      if (!specifier.startsWith(root.href)) continue;
      const from = local(specifier);
      found.set(
        from,
        dependencies.map(({ specifier, code, type }) => {
          const to = local((code ?? type)?.specifier ?? specifier);
          return { from, to, typeOnly: code === undefined };
        }),
      );
    }
  }
  return [...found.values()].flat();
}

/** The TypeScript files under a directory. */
function sources(directory: string): string[] {
  return [...Deno.readDirSync(new URL(directory, root))].flatMap(({ name, isDirectory }) =>
    isDirectory ? sources(`${directory}${name}/`) : name.endsWith(".ts") ? [`${directory}${name}`] : []
  ).sort();
}

Deno.test("every import keeps to the rules of the rooms", async () => {
  const all = await edges();

  assert.ok(all.length > 100);
  assert.ok(all.some(({ from, to }) => from === "lib/grpc/client.ts" && to === "npm:@grpc/grpc-js@1.14.7"));
  assert.deepEqual(all.map(problemOf).filter((problem) => problem !== undefined), []);
});

Deno.test("Deno. appears only in the files that deal with the operating system", () => {
  const users = ["main.ts", ...sources("lib/"), ...sources("proto/")].filter((path) => {
    const text = Deno.readTextFileSync(new URL(path, root));
    const code = text.replace(/\/\*[^]*?\*\//g, "").replace(/(^|\s)\/\/.*$/gm, "");
    return /\bDeno\s*(\?\.|\.|\[)|\bglobalThis\.Deno\b/.test(code);
  });

  assert.ok(users.includes("lib/host/linux_host.ts") && users.includes("main.ts"));
  assert.deepEqual(users.filter((path) => !within(path, mayUseDeno)), []);
});

Deno.test("the guard against GOAWAY is loaded before grpc-js, and by main.ts before anything else", async () => {
  const all = await edges();
  const importsOf = (file: string) =>
    all.filter(({ from, typeOnly }) => from === file && !typeOnly).map(({ to }) => to);
  const usesGrpc = sources("lib/").filter((file) => importsOf(file).some((to) => to.startsWith("npm:@grpc/")));

  const [first] = importsOf("main.ts");

  assert.equal(first, "lib/grpc/goaway.ts");
  assert.ok(usesGrpc.includes("lib/grpc/server.ts") && usesGrpc.includes("lib/grpc/client.ts"));
  for (const file of usesGrpc) assert.equal(importsOf(file)[0], "lib/grpc/goaway.ts", file);
});

const broken: readonly (readonly [from: string, to: string, typeOnly: boolean])[] = [
  ["lib/volume_id.ts", "lib/csi/request.ts", false],
  ["lib/volume_id.ts", "proto/gen/csi_pb.ts", true],
  ["lib/volume_id.ts", "npm:@grpc/grpc-js@1.14.7", false],
  ["lib/csi/controller/service.ts", "lib/storage/lightos/backend.ts", true],
  ["lib/csi/controller/service.ts", "lib/storage/backend.ts", false],
  ["lib/csi/controller/service.ts", "lib/simulator/lightos/cluster.ts", true],
  ["lib/csi/controller/service.ts", "proto/gen/lightos_pb.ts", false],
  ["lib/csi/node/service.ts", "node:fs", false],
  ["lib/storage/lightos/backend.ts", "lib/csi/request.ts", false],
  ["lib/storage/lightos/backend.ts", "lib/host/host.ts", true],
  ["lib/storage/lightos/backend.ts", "lib/simulator/lightos/service.ts", false],
  ["lib/storage/lightos/backend.ts", "proto/gen/csi_pb.ts", false],
  ["lib/storage/lightos/backend.ts", "npm:@grpc/grpc-js@1.14.7", false],
  ["lib/host/nvme/sysfs.ts", "lib/csi/request.ts", true],
  ["lib/host/nvme/sysfs.ts", "proto/gen/lightos_pb.ts", false],
  ["lib/cli/attach_volume.ts", "lib/simulator/lightos/cluster.ts", false],
  ["lib/cli/attach_volume.ts", "lib/demo/testbed.ts", true],
  ["lib/storage/poseidon/backend.ts", "lib/storage/lightos/volumes.ts", false],
  ["lib/storage/lightos/backend.ts", "lib/storage/poseidon/codes.ts", true],
  ["lib/host/nvme/connect.ts", "lib/grpc/client.ts", true],
  ["lib/error.ts", "lib/grpc/client.ts", true],
  ["lib/csi/node/service.ts", "lib/grpc/server.ts", false],
  ["lib/host/nvme/sysfs.ts", "lib/cli/list_volumes.ts", true],
  ["lib/discovery/daemon.ts", "lib/simulator/data_plane/discovery_client.ts", false],
  ["lib/discovery/daemon.ts", "lib/storage/backend.ts", true],
  ["lib/discovery/input.ts", "node:net", false],
  ["lib/csi/node/service.ts", "lib/discovery/daemon.ts", false],
  ["lib/simulator/lightos/service.ts", "lib/storage/lightos/backend.ts", true],
  ["lib/simulator/lightos/service.ts", "lib/host/host.ts", false],
  ["lib/simulator/lightos/service.ts", "proto/gen/csi_pb.ts", false],
  ["lib/demo/testbed.ts", "lib/simulator/lightos/simulator.ts", true],
  ["lib/demo/demo.ts", "lib/csi/controller/service.ts", false],
  ["lib/demo/machine.ts", "lib/host/host.ts", false],
  ["lib/demo/scenario.ts", "lib/storage/backend.ts", true],
  ["lib/demo/demo.ts", "proto/gen/lightos_pb.ts", false],
  ["lib/demo/machine.ts", "node:fs", false],
  ["lib/demo/demo.ts", "main.ts", false],
  ["lib/grpc/server.ts", "lib/demo/testbed.ts", true],
  ["lib/csi/node/service.ts", "lib/demo/machine.ts", false],
  ["lib/simulator/control.ts", "lib/demo/testbed.ts", true],
  ["lib/grpc/server.ts", "main.ts", false],
  ["lib/grpc/server.ts", "tests/support/needs.ts", false],
  ["lib/grpc/server.ts", "npm:left-pad@1.0.0", false],
  ["lib/grpc/server.ts", "https://deno.land/std/assert/mod.ts", false],
  ["main.ts", "jsr:@std/assert", false],
  ["main.ts", "npm:zod@4.6.7", false],
  ["main.ts", "node:fs", false],
  ["main.ts", "deno.json", false],
  ["main.ts", "proto/gen/csi_pb.ts", true],
  ["proto/gen/csi_pb.ts", "lib/grpc/server.ts", false],
];

for (const [from, to, typeOnly] of broken) {
  Deno.test(`the rules of the rooms forbid ${from} to import ${typeOnly ? "types of " : ""}${to}`, () => {
    assert.match(problemOf({ from, to, typeOnly }) ?? "", new RegExp(`^${from} imports `));
  });
}

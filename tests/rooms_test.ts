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
  if (!path.startsWith("lib/")) return path.startsWith("proto/gen/") ? "gen" : "outside";
  return path.split("/").length === 2 ? "words" : path.split("/").slice(0, 2).join("/");
}

/** Which local files each room may import, besides its own and the words. */
const mayImport: Readonly<Record<string, readonly string[]>> = {
  "words": [],
  "gen": [],
  "lib/csi": ["proto/gen/csi_pb.ts", "lib/host/"],
  "lib/storage": ["proto/gen/lightos_pb.ts", "proto/gen/lightos_schedule_pb.ts"],
  "lib/host": [],
  // It plays LightOS' Discovery-Client on this machine.
  "lib/discovery": ["lib/host/"],
  // A person at a shell in the orchestrator's place.
  "lib/shell": ["lib/host/"],
  "lib/sim": ["proto/gen/lightos_pb.ts", "proto/gen/lightos_schedule_pb.ts"],
  // It knows the driver from outside, as an orchestrator does, and nobody but main.ts and tests knows it.
  "lib/demo": ["proto/gen/csi_pb.ts"],
};
/** And from where types alone may come. */
const mayImportTypes: Readonly<Record<string, readonly string[]>> = {
  "lib/csi": ["lib/storage/backend.ts"],
  "lib/shell": ["lib/storage/backend.ts"],
};

/** What has one place. `node:fs` and its like are `Deno.` under another name. */
const places: readonly (readonly [what: RegExp, where: readonly string[]])[] = [
  [/^npm:@grpc\//, ["lib/grpc/server.ts"]],
  [/^node:http2$/, ["lib/grpc/goaway.ts", "lib/grpc/stream_limit.ts"]],
  [/^node:tls$/, ["lib/grpc/server.ts", "lib/grpc/peer_certificate.ts", "lib/sim/"]],
  [/^node:(fs|fs\/promises|child_process|os|net|http|https|dgram|process)$/, [
    "lib/grpc/server.ts",
    "lib/host/",
    "lib/sim/",
  ]],
];

const mayUseDeno = [
  "main.ts",
  "lib/host/host.ts",
  "lib/host/volume_operations.ts",
  "lib/host/volume_threads.ts",
  "lib/context.ts",
  "lib/grpc/unix_socket.ts",
  "lib/sim/",
  "lib/demo/",
  "tests/",
  "proto/generate.ts",
];

/** Why an import is not allowed, or undefined. */
function problemOf({ from, to, typeOnly }: Edge): string | undefined {
  const room = roomOf(from);
  const refuse = (rule: string) => `${from} imports ${to}: ${rule}`;
  if (to.startsWith("npm:") || to.startsWith("node:")) {
    if (to.startsWith("npm:") && !Object.values(deno.imports).includes(to)) return refuse("it is not in deno.json");
    const place = places.find(([what]) => what.test(to));
    if (place === undefined || room === "outside" || within(from, place[1])) return undefined;
    return typeOnly ? undefined : refuse(`only ${place[1].join(", ")} may`);
  }
  if (/^(https?|jsr|data):/.test(to)) return refuse("only local files, npm: and node: are used");
  if (roomOf(to) === "outside") {
    return room === "outside" ? undefined : refuse("nobody imports what is outside the rooms");
  }
  if (room === "outside" || roomOf(to) === room) return undefined;
  if (roomOf(to) === "words") return room === "gen" ? refuse("generated code stands alone") : undefined;
  if (within(to, mayImport[room] ?? [])) return undefined;
  if (typeOnly && within(to, mayImportTypes[room] ?? [])) return undefined;
  return refuse(`${room} may not`);
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

/** Every import under main.ts and the files of lib/ that it does not reach. */
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

Deno.test("every import keeps to the rooms: who may import whom", async () => {
  const all = await edges();

  assert.ok(all.length > 100);
  assert.ok(all.some(({ from, to }) => from === "lib/grpc/server.ts" && to === "npm:@grpc/grpc-js@1.14.7"));
  assert.deepEqual(all.map(problemOf).filter((problem) => problem !== undefined), []);
});

Deno.test("Deno. appears only where the program meets its surroundings", () => {
  const users = ["main.ts", ...sources("lib/"), ...sources("proto/")].filter((path) => {
    const text = Deno.readTextFileSync(new URL(path, root));
    const code = text.replace(/\/\*[^]*?\*\//g, "").replace(/(^|\s)\/\/.*$/gm, "");
    return /\bDeno\s*(\?\.|\.|\[)|\bglobalThis\.Deno\b/.test(code);
  });

  assert.ok(users.includes("lib/host/host.ts") && users.includes("main.ts"));
  assert.deepEqual(users.filter((path) => !within(path, mayUseDeno)), []);
});

Deno.test("rpc.ts loads the guard against GOAWAY before grpc-js, and main.ts before anything else", async () => {
  const all = await edges();
  const importsOf = (file: string) =>
    all.filter(({ from, typeOnly }) => from === file && !typeOnly).map(({ to }) => to);

  const [first] = importsOf("main.ts");
  const rpc = importsOf("lib/grpc/server.ts");

  assert.equal(first, "lib/grpc/goaway.ts");
  assert.ok(rpc.indexOf("lib/grpc/goaway.ts") < rpc.findIndex((to) => to.startsWith("npm:@grpc/")));
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
  ["lib/cli/attach_volume.ts", "lib/csi/node/service.ts", false],
  ["lib/cli/attach_volume.ts", "lib/storage/backend.ts", false],
  ["lib/cli/attach_volume.ts", "lib/storage/lightos/backend.ts", true],
  ["lib/host/nvme/sysfs.ts", "lib/cli/listed_volumes.ts", true],
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
  ["proto/gen/csi_pb.ts", "lib/grpc/server.ts", false],
];

for (const [from, to, typeOnly] of broken) {
  Deno.test(`the rule of the rooms forbids ${from} to import ${typeOnly ? "types of " : ""}${to}`, () => {
    assert.match(problemOf({ from, to, typeOnly }) ?? "", new RegExp(`^${from} imports `));
  });
}

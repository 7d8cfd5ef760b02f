/** The Containerfile, and the lists of what images contain; `deno task test:image` makes the images. */
import assert from "node:assert/strict";
import { parse, parseAllDocuments } from "yaml";
import { nodeTools } from "../../../k8s/image/root.ts";
import { driverManifests } from "../../../k8s/rendered_files.ts";
import { readK8sFile } from "../../support/charts.ts";
import { podOf } from "../../support/objects.ts";

const root = new URL("../../../", import.meta.url);
const read = (path: string) => Deno.readTextFileSync(new URL(path, root));

/** The instructions of a Containerfile, in stages. */
function stagesOf(text: string) {
  const lines = text.replaceAll(/^\s*#.*\n/gm, "").replaceAll("\\\n", " ").split("\n").map((line) => line.trim());
  const stages: { from: string; name: string; instructions: string[] }[] = [];
  for (const line of lines) {
    const [, from = "", name = ""] = /^FROM (?:--platform=\S+ )?(\S+) AS (\S+)$/.exec(line) ?? [];
    if (name !== "") stages.push({ from, name, instructions: [] });
    else if (line !== "") stages.at(-1)?.instructions.push(line);
  }
  return stages;
}
const stages = stagesOf(read("Containerfile"));
const stage = (name: string) => {
  const found = stages.find((stage) => stage.name === name);
  assert(found !== undefined, name);
  return found;
};

function sources(directory: string): string[] {
  return [...Deno.readDirSync(new URL(directory, root))].flatMap(({ name, isDirectory }) =>
    isDirectory ? sources(`${directory}${name}/`) : [`${directory}${name}`]
  );
}

Deno.test("every program that the driver runs is among the tools of the image", () => {
  const tools = Object.values(nodeTools).flat();
  const run = ["lib/csi/", "lib/host/", "lib/cli/", "lib/discovery/"].flatMap(sources).flatMap((path) =>
    [...read(path).matchAll(/(?:\.run|runTool)\(\s*(?:host, ctx, )?"([a-z][\w.]*)"/g)].map(([, name = ""]) => name)
  );
  const known = /const packages: [^{]*\{([^}]*)\}/.exec(read("lib/host/programs.ts"))?.[1] ?? "";
  const named = [...known.matchAll(/^ {2}"([^"]+)":/gm)].map(([, name = ""]) => name);

  assert(run.includes("nvme") && run.includes("mount") && run.includes("getent"), run.join());
  assert(named.length > 10, named.join());
  assert.deepEqual([...run, ...named].filter((name) => !tools.includes(name)), []);
});

Deno.test("the images contain only the root file system and the executable", () => {
  for (const name of ["controller", "node"]) {
    const { from, instructions } = stage(name);
    assert.equal(from, "scratch");
    const executable = name === "node" ? "lbcsi" : "lbcsi-controller";
    assert.deepEqual(instructions.filter((line) => /^(RUN|COPY|ADD|ENTRYPOINT|CMD|USER)/.test(line)), [
      `COPY --from=roots /roots/${name} /`,
      `COPY --from=executable /chosen/${executable} /${executable}`,
      ...(name === "node" ? [] : ["USER 65532:65532"]),
      `ENTRYPOINT ["/${executable}"]`,
      `CMD ["${name}"]`,
    ]);
    const labels = instructions.find((line) => line.startsWith("LABEL")) ?? "";
    for (const label of ["title", "description", "version", "revision", "created"]) {
      assert(labels.includes(`org.opencontainers.image.${label}=`), label);
    }
  }
  assert.equal(stages.at(-1)?.name, "node", "what is built without --target");
});

Deno.test("the files that the Containerfile copies from the context exist and are not ignored", () => {
  const kept = read(".dockerignore").split("\n").filter((line) => line.startsWith("!")).map((line) => line.slice(1));
  const copied = stages.flatMap(({ instructions }) => instructions).flatMap((line) =>
    /^COPY (?!--from)(.*) \S+$/.exec(line)?.[1]?.split(" ") ?? []
  );

  assert(copied.length >= 6, copied.join());
  for (const path of copied) {
    assert(kept.some((one) => path === one || path.startsWith(`${one}/`)), path);
    // Only exists before a build with EXECUTABLES=prebuilt.
    if (path !== "dist") assert(Deno.statSync(new URL(path, root)));
  }
});

Deno.test("build arguments name the base images, and Deno in the image has the version that is tested", () => {
  const text = read("Containerfile");
  const bases = stages.map(({ from }) => from).filter((from) => from !== "scratch");

  assert.deepEqual(bases.filter((from) => !/^\$\{(DEBIAN|DENO|EXECUTABLES)\}$/.test(from)), []);
  const version = /^DENO_VERSION=(.*)$/m.exec(read(".ci/run"))?.[1] ?? "";
  assert.match(text, new RegExp(`^ARG DENO=\\S+:bin-${version.replaceAll(".", "\\.")}$`, "m"));
  assert.match(read("k8s/image/build.ts"), new RegExp(`testedDeno = "${version}"`));
});

for (
  const [arguments_, isAccepted] of [
    [["no", "debian:bookworm-slim", "deno:bin"], false],
    [["no", "debian@sha256:0", "deno:bin"], false],
    [["no", "debian:bookworm-slim", "deno@sha256:0"], false],
    [["no", "debian:bookworm-slim@sha256:0", "deno:bin@sha256:0"], true],
    [["yes", "debian:bookworm-slim", "deno:bin"], true],
  ] as const
) {
  Deno.test(`the Containerfile ${isAccepted ? "accepts" : "rejects"} bases ${arguments_.join(" ")}`, async () => {
    const check = stage("built").instructions.find((line) => line.startsWith("RUN case")) ?? "";
    const [UNPINNED, DEBIAN, DENO] = arguments_;
    const { success, stderr } = await new Deno.Command("/bin/sh", {
      args: ["-c", check.replace("RUN ", "")],
      env: { UNPINNED, DEBIAN, DENO },
    }).output();

    assert.equal(success, isAccepted);
    if (!isAccepted) assert.match(new TextDecoder().decode(stderr), /have to be named by digest/);
  });
}

Deno.test("manifests use the entry point of the image, and run its controller as the user of the image", () => {
  const { runAsUser, runAsGroup } = parse(read("k8s/helm/lb-csi-plugin/values.yaml"));
  assert.equal(
    `USER ${runAsUser}:${runAsGroup}`,
    stage("controller").instructions.find((line) => line.startsWith("USER")),
  );
  for (const { path } of driverManifests) {
    const containers = parseAllDocuments(readK8sFile(path)).flatMap((document) =>
      podOf(document.toJS())?.spec.containers ?? []
    ).filter(({ image }) => /\/lbcsi:/.test(image));
    assert.deepEqual(containers.map(({ args }) => args?.[0]), ["controller", "node"], path);
    assert.deepEqual(containers.filter((container) => "command" in container), [], path);
  }
});

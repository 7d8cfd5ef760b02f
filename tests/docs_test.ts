/** Checks of the documents: links, commands, citations, tables that repeat facts of the code, and messages. */
import { deepStrictEqual, match, ok, strictEqual } from "node:assert/strict";
import { parse, parseAllDocuments } from "yaml";
import config from "../deno.json" with { type: "json" };
import { blocksOf, documentPaths, refreshed, root, run, runsOf } from "../docs/outputs.ts";
import { chartDirectory, render } from "../k8s/charts.ts";
import { minorsIn, supportedMinors } from "../k8s/rendered_files.ts";
import { backgroundContext } from "../lib/context.ts";
import { createLogger } from "../lib/log.ts";
import { Secrets } from "../lib/secrets.ts";
import { lightosBackend } from "../lib/storage/lightos/backend.ts";
import { parseConfig } from "../lib/storage/lightos/cluster_file.ts";
import { parametersSchema, parseParameters } from "../lib/storage/lightos/parameters.ts";
import { trustSchema } from "../lib/storage/lightos/trust.ts";
import { parseSystems } from "../lib/storage/poseidon/cluster_file.ts";
import { parseParameters as parsePoseidonParameters } from "../lib/storage/poseidon/parameters.ts";
import { parsePoseidonId, parseVolumeId } from "../lib/volume_id.ts";
import { manifestPath, readK8sFile } from "./support/charts.ts";
import { unlessGoLacks } from "./support/go.ts";
import { literalsIn } from "./support/literals.ts";
import { needs } from "./support/needs.ts";
import { startSimulator } from "./support/simulator.ts";

const documents = new Map(documentPaths.map((path) => [path, Deno.readTextFileSync(root + path)]));
const textOf = (path: string) => documents.get(path) ?? "";

/** A document without its fenced blocks. */
function prose(markdown: string): string {
  const lines = markdown.split("\n");
  for (const { from, to } of blocksOf(markdown)) lines.fill("", from, to + 1);
  return lines.join("\n");
}

/** The anchor that GitHub gives a heading. */
const anchorOf = (heading: string) =>
  heading.toLowerCase().replace(/\[([^\]]*)\]\([^)]*\)/g, "$1").replace(/[^\p{L}\p{N} _-]/gu, "").replaceAll(" ", "-");

const anchorsOf = (markdown: string) =>
  [...prose(markdown).matchAll(/^#{1,6} (.+)$/gm)].map(([, heading = ""]) => anchorOf(heading));

/** The links of a document to files of the repository, relative to the root. */
function linksOf(path: string): readonly { readonly link: string; readonly file: string; readonly anchor: string }[] {
  return [...prose(textOf(path)).matchAll(/\]\(([^)\s]+)\)/g)].flatMap(([, link = ""]) => {
    if (/^[a-z]+:/.test(link)) return [];
    const url = new URL(link, `file:///${path}`);
    const file = link.startsWith("#") ? path : url.pathname.slice(1);
    return [{ link, file, anchor: decodeURIComponent(url.hash.slice(1)) }];
  });
}

for (const path of documentPaths) {
  Deno.test(`links of ${path} lead to files and headings that exist`, () => {
    const broken = linksOf(path).filter(({ file, anchor }) => {
      const isFile = documents.has(file) || exists(file);
      return !isFile || (anchor !== "" && !anchorsOf(textOf(file)).includes(anchor));
    });

    deepStrictEqual(broken.map(({ link }) => link), []);
  });
}

function exists(path: string): boolean {
  try {
    Deno.statSync(root + path);
    return true;
  } catch {
    return false;
  }
}

Deno.test("links lead from the README to every document", () => {
  const linked = new Set(["README.md"]);
  for (const path of linked) {
    for (const { file } of linksOf(path)) if (documents.has(file)) linked.add(file);
  }

  deepStrictEqual(documentPaths.filter((path) => !linked.has(path)), []);
});

Deno.test("files of the repository that documents name exist", () => {
  const missing = [...documents].flatMap(([path, text]) =>
    [...text.matchAll(/(?<![\w./-])((?:k8s|lib|tests|proto|docs)\/[\w./-]*\w)/g)].flatMap(([, name = ""]) =>
      exists(name) || exists(`docs/${name}`) ? [] : [`${path}: ${name}`]
    )
  );

  deepStrictEqual(missing, []);
});

Deno.test("commands that are marked to run succeed and print what the documents quote", async () => {
  let count = 0;
  for (const [path, text] of documents) {
    strictEqual(await refreshed(text), text, `${path}: run \`deno task docs\``);
    for (const { command, output } of runsOf(text)) {
      if (output === undefined) await run(command);
      count++;
    }
  }

  ok(count > 10, `${count}`);
});

Deno.test("docs/commands.md has each command", () => {
  const text = textOf("docs/commands.md");
  const listed = runsOf(text)[0]?.output?.text ?? "";
  const names = [...listed.matchAll(/^ {2}([a-z-]+) {2,}\S/gm)].map(([, name = ""]) => name);
  const described = names.filter((name) => text.includes(`\`\`\`sh run\nlbcsi ${name} --help\n`));

  ok(names.length > 8, listed);
  deepStrictEqual(described, names.filter((name) => name !== "version"));
});

Deno.test("shell commands in documents have no syntax errors", async () => {
  const problems: string[] = [];
  for (const [path, text] of documents) {
    for (const block of blocksOf(text)) {
      if (!block.info.startsWith("sh")) continue;
      const { code, stderr } = await new Deno.Command("bash", { args: ["-n", "-c", block.text], stderr: "piped" })
        .output();
      if (code !== 0) problems.push(`${path}:${block.from + 1} ${new TextDecoder().decode(stderr)}`);
    }
  }

  deepStrictEqual(problems, []);
});

Deno.test("YAML in documents can be read", () => {
  const problems = [...documents].flatMap(([path, text]) =>
    blocksOf(text).filter(({ info }) => info === "yaml").flatMap(({ text, from }) =>
      parseAllDocuments(text).flatMap((document) =>
        "errors" in document ? document.errors.map((error) => `${path}:${from + 1} ${error.message}`) : []
      )
    )
  );

  deepStrictEqual(problems, []);
});

// ------------------------------------------------------------------------------------------------------- citations

/** A place in the repository that names a document, and the sections that it names in it: `7.5`, `6.5 to 6.7`. */
interface Citation {
  readonly place: string;
  readonly file: string;
  readonly sections: readonly string[];
}

const number = String.raw`\d+(?:\.\d+)*`;
const citation = new RegExp(
  String.raw`(?<![\w./-])((?:docs/[\w./-]+|[A-Z]+)\.md)((?:(?:,| and| to)? (?:sections? )?${number}(?![\w-]))*)`,
  "g",
);

/** The documents that a text names. Lines of one comment are one text. */
function citationsIn(place: string, text: string): readonly Citation[] {
  const joined = text.replace(/\n[ \t]*(?:\*(?!\/)|\/\/|#)?[ \t]*/g, " ");
  return [...joined.matchAll(citation)].map(([, file = "", sections = ""]) => ({
    place,
    file,
    sections: sectionsIn(sections),
  }));
}

/** The sections that ` sections 6.5 to 6.7, 9.4` names, those between the two ends of a range too. */
function sectionsIn(text: string): readonly string[] {
  const range = new RegExp(`(${number}) to (${number})`, "g");
  return text.replace(range, (whole, from: string, to: string) => {
    const parent = /^(?:.*\.)?/.exec(from)?.[0] ?? "";
    const [first, last] = [from, to].map((end) => Number(end.slice(parent.length)));
    if (first === undefined || last === undefined || !to.startsWith(parent) || !(first < last)) return whole;
    return Array.from({ length: last - first + 1 }, (_, at) => `${parent}${first + at}`).join(" ");
  }).match(new RegExp(number, "g")) ?? [];
}

/** Why a citation leads nowhere, or undefined. */
function citationProblem({ place, file, sections }: Citation): string | undefined {
  if (!exists(file)) return `${place}: ${file} does not exist`;
  const isNumbered = file.startsWith("docs/reference/");
  if (isNumbered && sections.length === 0) return `${place}: names no section of ${file}`;
  const headings = [...prose(textOf(file)).matchAll(/^#{2,} (\d+(?:\.\d+)*)\.? /gm)].map(([, number = ""]) => number);
  const missing = sections.filter((section) => !headings.includes(section));
  return missing.length === 0 ? undefined : `${place}: ${file} has no section ${missing.join(", ")}`;
}

/** All code, scripts and templates of the repository, without what is generated. */
const codePaths = [
  "main.ts",
  "Containerfile",
  "deno.json",
  ".ci/run",
  ...["lib", "tests", "k8s", "proto", "docs", ".ci"].flatMap(sourcesOf).filter((path) =>
    /\.(ts|go|proto|sh|ya?ml|tpl)$/.test(path) && !path.startsWith("proto/gen/") && path !== "tests/docs_test.ts"
  ),
];

Deno.test("documents and sections that code, comments and documents cite exist", () => {
  const citations = [
    ...codePaths.flatMap((path) => citationsIn(path, Deno.readTextFileSync(root + path))),
    // Links are in another test; what is left are names in the text.
    ...[...documents].flatMap(([path, text]) =>
      citationsIn(path, text.replace(/\[([^\]]*)\]\([^)]*\)/g, "")).filter(({ file }) => file.startsWith("docs/"))
    ),
  ];

  ok(citations.length > 80, `${citations.length}`);
  ok(citations.some(({ sections }) => sections.length > 3));
  deepStrictEqual(citations.map(citationProblem).filter((problem) => problem !== undefined), []);
});

Deno.test("a citation of a file or section that does not exist is found", () => {
  const wrong = [
    "docs/reference/csi.md 7.99",
    "docs/reference/csi.md sections 7.1, 99",
    "docs/reference/csi.md 7.7 to 7.9.",
    "docs/reference/csi.md\n * section 99",
    "docs/reference/csi.md",
    "docs/nothing.md",
    "NOTHING.md",
  ];
  const right = [
    "(facts: docs/reference/csi.md 7.7, 11). A path",
    "docs/reference/lightos-api.md\n * sections 6.5 to 6.7, 9.4",
    "docs/reference/csi.md 2.3. 8 calls",
    "docs/helm.md",
  ];
  const problemsOf = (text: string) =>
    citationsIn("here", text).map(citationProblem).filter((problem) => problem !== undefined);

  deepStrictEqual(wrong.filter((text) => problemsOf(text).length !== 1), []);
  deepStrictEqual(right.flatMap(problemsOf), []);
});

// ----------------------------------------------------------------------------------------------- tables of the code

/** The rows of each table of a document under headings, as cells without blanks around them. */
function tables(markdown: string): readonly { readonly head: readonly string[]; readonly rows: string[][] }[] {
  const cells = (line: string) => line.split(/(?<!\\)\|/).slice(1, -1).map((cell) => cell.trim());
  const found: { head: readonly string[]; rows: string[][] }[] = [];
  const lines = prose(markdown).split("\n");
  for (const [at, line] of lines.entries()) {
    if (!/^\|[-|]+\|$/.test(line)) continue;
    const rows = lines.slice(at + 1, at + 1 + lines.slice(at + 1).findIndex((line) => !line.startsWith("|")));
    found.push({ head: cells(lines[at - 1] ?? ""), rows: rows.map(cells) });
  }
  return found;
}

const codeIn = (cell = "") => [...cell.matchAll(/`([^`]+)`/g)].map(([, text = ""]) => text);

Deno.test("tables of options have the names, variables and defaults of the program", () => {
  const help = textOf("docs/commands.md").split("\n");
  const wrong: string[] = [];
  let count = 0;
  for (const [path, text] of documents) {
    for (const { head, rows } of tables(text)) {
      if (head[0] !== "option" || head[1] !== "environment") continue;
      for (const [names, variables, fallbacks] of rows) {
        for (const [at, name] of codeIn(names).filter((name) => name.startsWith("--")).entries()) {
          count++;
          const lines = help.filter((line) => line.includes(`${name} `));
          const variable = codeIn(variables)[at];
          const fallback = /^\d+$/.test(fallbacks ?? "") ? fallbacks : codeIn(fallbacks)[at];
          const isRight = lines.some((line) =>
            (variable === undefined || variable.includes("…") || line.includes(variable)) &&
            (fallback === undefined || line.includes(`default: ${fallback}`) || line.includes(`default`))
          );
          if (!isRight) wrong.push(`${path}: ${name} ${variable} ${fallback}`);
        }
      }
    }
  }

  ok(count > 10, `${count}`);
  deepStrictEqual(wrong, []);
});

Deno.test("no row of a table stands in two documents", () => {
  const places = new Map<string, string[]>();
  for (const [path, text] of documents) {
    for (const { rows } of tables(text)) {
      for (const cells of rows) {
        const row = cells.join(" | ").replace(/\[([^\]]*)\]\([^)]*\)/g, "$1");
        // Short rows, such as "yes | no", say the same of different things.
        if (row.length > 60) places.set(row, [...places.get(row) ?? [], path]);
      }
    }
  }

  ok(places.size > 400, `${places.size}`);
  deepStrictEqual([...places].filter(([, paths]) => paths.length > 1), []);
});

/** The keys in the first column of the table with this first heading that has a row for `key`. */
function keysOf(path: string, heading: string, key: string): readonly string[] {
  const table = tables(textOf(path)).find(({ head, rows }) =>
    head[0] === heading && rows.some(([cell]) => codeIn(cell).includes(key))
  );
  return (table?.rows ?? []).flatMap(([cell]) => codeIn(cell)).sort();
}

/** The keys that an error names as known. */
function knownIn(parse: () => unknown): readonly string[] {
  try {
    parse();
  } catch (error) {
    return (/\(known: (.*?)\)/.exec((error as Error).message)?.[1] ?? "").split(", ").sort();
  }
  return [];
}

Deno.test("the tables of StorageClass parameters have those that the driver accepts", () => {
  const lightos = [
    ...Object.keys(parametersSchema.shape).filter((key) => !key.startsWith("encryption-secret-")),
    "mkfs-options",
    "csi.storage.k8s.io/fstype",
  ];
  const poseidon = [
    ...knownIn(() => parsePoseidonParameters(backgroundContext("try", createLogger("error"), 1000), { nothing: "" })),
    "csi.storage.k8s.io/fstype",
  ];

  deepStrictEqual(keysOf("docs/configuration.md", "parameter", "replica-count"), lightos.sort());
  deepStrictEqual(keysOf("docs/poseidonos.md", "StorageClass parameter", "arrayName"), poseidon.sort());
});

Deno.test("the table of secrets has those that the driver reads", () => {
  const read = [
    ...Object.keys(trustSchema),
    "jwt",
    "mgmt-ca.crt",
    "host-encryption-passphrase",
    "host-encryption-passphrase-previous",
    "dhchap-key",
    "dhchap-ctrl-key",
  ];

  deepStrictEqual(keysOf("docs/configuration.md", "key", "jwt"), read.sort());
  deepStrictEqual(read.filter((key) => !literals.some(({ text }) => text === key)), []);
});

Deno.test("cluster files in documents are valid and show every key", () => {
  const known = {
    clusters: knownIn(() => parseConfig("file", "clusters: [{nothing: 1}]")),
    systems: knownIn(() => parseSystems("file", "systems: [{nothing: 1}]")),
  };
  const shown = { clusters: new Set<string>(), systems: new Set<string>() };
  for (const text of documents.values()) {
    for (const block of blocksOf(text).filter(({ info }) => info === "yaml")) {
      for (const kind of ["clusters", "systems"] as const) {
        if (!block.text.startsWith(`${kind}:`)) continue;
        for (const key of block.text.matchAll(/^ {2}(?: {2}|- )(\w+):/gm)) shown[kind].add(key[1] ?? "");
        if (kind === "clusters") parseConfig("file", block.text);
        else parseSystems("file", block.text);
      }
    }
  }

  deepStrictEqual([...shown.systems].sort(), known.systems);
  // These two are in a comment of the example: they are the same as in Secrets.
  deepStrictEqual([...shown.clusters, "tlsPin", "tlsVerify"].sort(), known.clusters);
});

Deno.test("the driver accepts StorageClasses in documents", () => {
  let count = 0;
  for (const text of documents.values()) {
    for (const block of blocksOf(text).filter(({ info }) => info === "yaml")) {
      for (const document of parseAllDocuments(block.text)) {
        const object = (document as { toJS(): unknown }).toJS();
        if (!isStorageClass(object)) continue;
        const parameters = Object.fromEntries(
          Object.entries(object.parameters).filter(([key]) => !key.startsWith("csi.storage.k8s.io/")),
        );
        parseParameters(backgroundContext("try", createLogger("error"), 1000), parameters);
        count++;
      }
    }
  }

  ok(count > 0);
});

function isStorageClass(value: unknown): value is { readonly parameters: Readonly<Record<string, string>> } {
  return typeof value === "object" && value !== null && "kind" in value && value.kind === "StorageClass";
}

Deno.test("the driver reads volume IDs in documents", () => {
  const ids = [...documents.values()].flatMap((text) =>
    blocksOf(text).flatMap(({ text }) => text.match(/\b(?:mgmt|pos):\S+\|[^\s']+/g) ?? [])
  );
  for (const id of ids) {
    if (id.startsWith("mgmt:")) parseVolumeId(id);
    else parsePoseidonId(id);
  }

  ok(ids.length >= 5, ids.join(" "));
});

Deno.test({
  name: "the commands in docs/configuration.md get a certificate and a pin that the driver trusts",
  ignore: !needs("openssl"),
  fn: async () => {
    await using simulator = await startSimulator();
    const { grpcs, jwt } = simulator.addresses;
    const block = blocksOf(textOf("docs/configuration.md")).find(({ text }) => text.includes("openssl s_client"));
    const text = (block?.text ?? "").replace("192.0.2.1:443", grpcs[0] ?? "").replace(
      /^kubectl .*$/m,
      "cat mgmt-ca.crt",
    );

    const printed = await run({ info: "", from: 0, to: 0, text });

    const ca = /-----BEGIN CERTIFICATE-----.*-----END CERTIFICATE-----/s.exec(printed)?.[0] ?? "";
    const pin = /^[A-Za-z0-9+/]{43}=$/m.exec(printed)?.[0] ?? "";
    const log = createLogger("error", "json", () => {});
    await using backend = lightosBackend({
      log,
      globalJwt: () => jwt,
      globalJwtPath: "/etc/lb-csi/jwt",
      globalJwtFor: "any endpoint",
      ca: undefined,
      verifyTls: true,
      userAgent: "lbcsi/test",
    });
    const volume = await backend.createVolume(
      backgroundContext("create a volume", log, 10_000),
      new Secrets({ "mgmt-ca.crt": ca, "mgmt-tls-pin": `sha256//${pin}` }),
      {
        name: "pvc-1",
        requiredBytes: 1n << 30n,
        limitBytes: 0n,
        parameters: { "mgmt-endpoint": grpcs.join(","), "replica-count": "1", "project-name": "default" },
      },
    );
    strictEqual(volume.capacityBytes, 1n << 30n);
  },
});

Deno.test({
  name: "the commands in docs/host.md attach a volume of a simulated machine, and detach it",
  ignore: !needs("root", "loop", "curl", "mkfs.ext4"),
  fn: async () => {
    const block = blocksOf(textOf("docs/host.md")).find(({ text }) => text.includes("--data loop"));

    const printed = await run(block ?? { info: "", from: 0, to: 0, text: "" });

    match(printed, /\/dev\/nvme0n1 \S+\/mnt\n/);
    match(printed, /^ {2}mount {2}\S+\/mnt {2}ext4 {2}rw$/m);
  },
});

Deno.test({
  name: "the example values in docs/helm.md render",
  ignore: !needs("go"),
  fn: async () => {
    const values = blocksOf(textOf("docs/helm.md")).filter(({ info }) => info === "yaml").map(({ text }) =>
      parse(text)
    );
    const rendered = await unlessGoLacks(() =>
      render(values.map((values) => ({
        chart: chartDirectory("lb-csi-plugin"),
        release: "lb-csi",
        namespace: "kube-system",
        kubeVersion: "v1.34.0",
        values,
        lint: true,
      })))
    );
    if (rendered === undefined) return;

    ok(rendered.length > 0);
    deepStrictEqual(
      rendered.flatMap(({ error, messages }) => [...(error === undefined ? [] : [error]), ...messages ?? []]),
      [],
    );
  },
});

Deno.test("values in docs/helm.md are values of the chart", () => {
  const values = parse(Deno.readTextFileSync(`${root}k8s/helm/lb-csi-plugin/values.yaml`)) as Record<string, unknown>;
  const named =
    tables(textOf("docs/helm.md")).find(({ head }) => head[0] === "value")?.rows.flatMap(([cell]) => codeIn(cell)) ??
      [];
  const example = blocksOf(textOf("docs/helm.md")).filter(({ info }) => info === "yaml")
    .flatMap(({ text }) => Object.keys(parse(text) as object));

  ok(named.length > 20);
  deepStrictEqual([...named, ...example].filter((name) => !Object.hasOwn(values, name)), []);
});

Deno.test("the table of Kubernetes versions is that of the manifests", () => {
  const rows = tables(textOf("docs/introduction.md")).find(({ head }) => head[2] === "provisioner")?.rows ?? [];
  const told = rows.flatMap(([range = "", ...cells]) => {
    const [from = 0, to = from] = [...range.matchAll(/1\.(\d+)/g)].map(([, minor]) => Number(minor));
    return Array.from(
      { length: to - from + 1 },
      (_, at) => [from + at, ...cells.map((cell) => cell.replaceAll("`", ""))],
    );
  });
  const real = minorsIn(supportedMinors).map((minor) => {
    const text = readK8sFile(manifestPath(`lb-csi-plugin-k8s-v1.${minor}.yaml`));
    const image = (name: string) => new RegExp(`/${name}:(\\S+)`).exec(text)?.[1];
    return [
      minor,
      /^kind: (StatefulSet|Deployment)$/m.exec(text)?.[1],
      ...["csi-provisioner", "csi-attacher", "csi-resizer", "csi-snapshotter"].map(image),
      /fsGroupPolicy: (\w+)/.exec(text)?.[1] ?? "not known",
    ];
  });

  deepStrictEqual(told, real);
});

Deno.test("tasks that documents name exist", () => {
  const named = [...documents.values()].flatMap((text) =>
    [...text.matchAll(/deno (?:@2\.9\.5 )?task ([a-z:]+)/g)].map(([, name = ""]) => name)
  );

  ok(named.length > 10);
  deepStrictEqual(named.filter((name) => !Object.hasOwn(config.tasks, name)), []);
});

Deno.test("docs/developing.md names functions where they are", () => {
  const lib = sourcesOf("lib");
  const wrong: string[] = [];
  let count = 0;
  for (const line of prose(textOf("docs/developing.md")).split("\n")) {
    const linked = [...line.matchAll(/\]\(\.\.\/([^)#]+\.ts)\)/g)].map(([, path = ""]) => path);
    const places = line.startsWith("|") && linked.length > 0 ? linked : lib;
    for (const name of codeIn(line).filter((code) => /^[a-z]+[A-Z]\w*$/.test(code))) {
      count++;
      const isThere = places.some((path) => new RegExp(`\\b${name}\\b`).test(Deno.readTextFileSync(root + path)));
      if (!isThere) wrong.push(`${name}: ${linked.join(", ")}`);
    }
  }

  ok(count > 6, `${count}`);
  deepStrictEqual(wrong, []);
});

Deno.test("docs/promises.md has the promises that tests keep, and no other", () => {
  const kept = sourcesOf("tests").filter((path) => path.endsWith(".ts")).flatMap((path) =>
    [...Deno.readTextFileSync(root + path).matchAll(/["'`]promise (\d+): /g)].map(([, number]) => Number(number))
  );
  const listed = tables(textOf("docs/promises.md")).filter(({ head }) => head[0] === "#").flatMap(({ rows }) =>
    rows.map(([number]) => Number(number))
  );

  ok(listed.length > 20, `${listed.length}`);
  deepStrictEqual([...new Set(kept)].sort((a, b) => a - b), listed);
});

// ------------------------------------------------------------------------------------------------------- messages

function sourcesOf(directory: string): readonly string[] {
  return [...Deno.readDirSync(root + directory)].flatMap(({ name, isDirectory }) =>
    isDirectory ? sourcesOf(`${directory}/${name}`) : [`${directory}/${name}`]
  );
}

/** What the driver can say; the simulator and the demo are not it. */
const literals = sourcesOf("lib").filter((path) => !/^lib\/(simulator|demo)\//.test(path))
  .flatMap((path) => literalsIn(Deno.readTextFileSync(root + path)).map((literal) => ({ ...literal, path })));

/** The texts in the first column of a document's tables whose first heading is "message". */
function messagesOf(markdown: string): readonly string[] {
  let isMessages = false;
  return markdown.split("\n").flatMap((line) => {
    if (!line.startsWith("|")) isMessages = false;
    if (line.startsWith("| message |")) isMessages = true;
    if (!isMessages || !line.includes("`")) return [];
    const cell = /^\| (.*?)(?<!\\) \|/.exec(line)?.[1] ?? "";
    // A word alone is part of what a message quotes.
    return [...cell.matchAll(/`([^`]+ [^`]*)`/g)].map(([, text = ""]) => text);
  });
}

const patternOf = (message: string) =>
  new RegExp(
    message.replace(/^(?:Cannot )?…:? |^…|…$/g, "").split("…").map((part) =>
      part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")
    )
      .join(".*"),
    "s",
  );

Deno.test("each message in the documents is one that the driver has", () => {
  const messages = [...documents].flatMap(([path, text]) => messagesOf(text).map((message) => ({ path, message })));
  const unknown = messages.filter(({ message }) => !literals.some(({ text }) => patternOf(message).test(text)));

  ok(messages.length > 300, `${messages.length}`);
  deepStrictEqual(unknown, []);
});

Deno.test("each error of the driver is in docs/troubleshooting.md", () => {
  const patterns = messagesOf(textOf("docs/troubleshooting.md")).map(patternOf);
  // `refuse("…")`, `pathError("…")` and `ctx.error("ABORTED", "…")`, but not `new Error("…")`.
  const isError = (before: string) =>
    /(?:refuse|Error)\($|\.error\("[A-Z_]+",$/.test(before) && !/new\w*Error\($/.test(before);
  const errors = literals.filter(({ text, before }) => /^Cannot /.test(text) || isError(before))
    // Without those that are nothing but an action and a problem that stands elsewhere.
    .filter(({ text }) => text.includes(" ") && /[a-z]{2}/.test(text.replace(/^Cannot [^:]*?…:?/, "")));
  const missing = errors.filter(({ text }) => !patterns.some((pattern) => pattern.test(text)));

  ok(errors.length > 150, `${errors.length}`);
  deepStrictEqual(missing.map(({ path, text }) => `${path}: ${text}`), []);
});

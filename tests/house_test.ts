import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";

const root = new URL("../", import.meta.url);

/** All TypeScript of ours, as paths from the root of the repository, sorted. Generated code is not ours. */
const files: readonly string[] = [
  "main.ts",
  ...["lib", "k8s", "tests", "docs", "proto", ".ci"].flatMap((folder) => typeScriptBelow(folder)),
].filter((path) => !path.startsWith("proto/gen/")).sort();

function typeScriptBelow(folder: string): readonly string[] {
  return [...Deno.readDirSync(new URL(`${folder}/`, root))].flatMap(({ name, isDirectory }) => {
    if (isDirectory) return typeScriptBelow(`${folder}/${name}`);
    return name.endsWith(".ts") ? [`${folder}/${name}`] : [];
  });
}

const sourceOf = (path: string) => Deno.readTextFileSync(new URL(path, root));

/** What the rules of `visit` report of some files: `lib/lock.ts:12: …`. */
function findings(paths: readonly string[], visit: (context: Deno.lint.RuleContext) => Deno.lint.LintVisitor) {
  const plugin: Deno.lint.Plugin = { name: "house", rules: { rule: { create: visit } } };
  return paths.flatMap((path) => {
    const source = sourceOf(path);
    return Deno.lint.runPlugin(plugin, fileURLToPath(new URL(path, root)), source)
      .map(({ message, range: [start] }) => `${path}:${source.slice(0, start).split("\n").length}: ${message}`);
  });
}

type FunctionNode = Deno.lint.FunctionDeclaration | Deno.lint.FunctionExpression | Deno.lint.ArrowFunctionExpression;

/** A visitor that calls `look` with each function that has a body. */
function eachFunction(look: (node: FunctionNode) => void): Deno.lint.LintVisitor {
  return { FunctionDeclaration: look, FunctionExpression: look, ArrowFunctionExpression: look };
}

/** A function fits on two screens. */
const mostLinesOfFunction = 90;
const mostLinesOfFile = 600;
const mostParameters = 4;

const ours = (path: string) => path === "main.ts" || path.startsWith("lib/") || path.startsWith("k8s/");

Deno.test(`no function is longer than ${mostLinesOfFunction} lines`, () => {
  const found = findings(files.filter(ours), (context) => {
    const source = context.sourceCode.text;
    return eachFunction((node) => {
      const lines = source.slice(...node.range).split("\n").length;
      if (lines > mostLinesOfFunction) context.report({ node, message: `a function of ${lines} lines` });
    });
  });
  assert.deepEqual(found, []);
});

Deno.test(`no function has more than ${mostParameters} parameters`, () => {
  const found = findings(files.filter(ours), (context) =>
    eachFunction((node) => {
      const count = node.params.length;
      if (count > mostParameters) context.report({ node, message: `a function with ${count} parameters` });
    }));
  assert.deepEqual(found, []);
});

Deno.test(`no file is longer than ${mostLinesOfFile} lines`, () => {
  const found = files.filter(ours).map((path) => ({ path, lines: sourceOf(path).trimEnd().split("\n").length }))
    .filter(({ lines }) => lines > mostLinesOfFile);
  assert.deepEqual(found, []);
});

/** Words that no name contains, because only their authors knew what they meant; and what to say instead. */
const retiredWords: Readonly<Record<string, string>> = {
  "wish": "options or request",
  "wishes": "options or requests",
  "wanted": "requested",
  "trouble": "condition or problem",
  "troubles": "conditions or problems",
  "tidied": "a verb: withCleanup",
  "nobody": "none",
  "anybody": "any",
  "world": "inventory",
  "tale": "scenario",
  "telling": "steps",
  "rig": "testbed",
  "tend": "reconcile",
  "checkup": "check",
  "examine": "check",
  "surely not": "a plain word",
  "made for": "owner",
  "take down": "unmountAll",
};

/** Names that say too little when they stand alone. As a part of a longer name they are plain words. */
const retiredNames: Readonly<Record<string, string>> = {
  "settled": "isSettled, waitUntilSettled",
  "texts": "what the texts are",
  "checked": "what the result of the check is",
  "defined": "what is defined",
  "ending": "interrupt or exit status",
  "screen": "terminal",
  "reach": "tcp_probe",
  "measure": "metrics, or what is measured",
};

/** What is wrong with a name; undefined: nothing. */
function nameProblem(name: string): string | undefined {
  const plain = name.replace(/([a-z0-9])([A-Z])/g, "$1 $2").replace(/[_-]/g, " ").toLowerCase().trim();
  // A function that throws is an assertion; one that returns an error says so.
  if (/^refuse( |$)/.test(plain)) return `"${name}": say assert… (it throws) or …Error (it returns an error)`;
  const word = Object.keys(retiredWords).find((word) => ` ${plain} `.includes(` ${word} `));
  if (word !== undefined) return `"${name}": say ${retiredWords[word]}`;
  return Object.hasOwn(retiredNames, plain) ? `"${name}": say ${retiredNames[plain]}` : undefined;
}

Deno.test("no name in the code or of a file is a retired word", () => {
  const found = findings(files, (context) => {
    const look = (node: Deno.lint.Identifier | Deno.lint.PrivateIdentifier) => {
      const message = nameProblem(node.name);
      if (message !== undefined) context.report({ node, message });
    };
    return { Identifier: look, PrivateIdentifier: look };
  });
  const named = files.map((path) => ({ path, problem: nameProblem(/([^/.]*)\.ts$/.exec(path)?.[1] ?? "") }))
    .filter(({ problem }) => problem !== undefined);
  assert.deepEqual([...new Set(found), ...named], []);
});

Deno.test("every file that a comment names exists", () => {
  const found = findings(files, (context) => ({
    Program() {
      for (const comment of context.sourceCode.getAllComments()) {
        for (const [name] of comment.value.matchAll(/[\w.*/-]*\w\.ts\b/g)) {
          const end = name.replace(/^(\.{1,2}\/)+/, "");
          if (files.some((path) => `/${path}`.endsWith(`/${end}`))) continue;
          context.report({ range: comment.range, message: `there is no ${name}` });
        }
      }
    },
  }));
  assert.deepEqual(found, []);
});

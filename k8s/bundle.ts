/**
 * `deno task bundle [DIRECTORY]`: packs what is needed to install the driver into `lb-csi-bundle-<version>.tar.gz`:
 *
 *     examples/*.yaml   helm/charts/<chart>-<version>.tgz   k8s/*.yaml
 *
 * The same files give the same bytes, whoever packs them and when: entries are sorted, and owners, modes and times fixed.
 * So anybody can check a bundle by making it again. tar(1) can be told to do so in GNU's version only.
 */
import { gzipSync } from "node:zlib";
import { chartDirectory, chartNames, k8sRoot, version } from "./charts.ts";

interface Entry {
  readonly path: string;
  readonly content: Uint8Array;
}

/** 2020-01-01. Not 0: some programs take that for a mistake and warn. */
const modifiedSeconds = 1_577_836_800;

const blockBytes = 512;

/** The header of a regular file, mode 0644 of root, as POSIX ustar has it. */
function header({ path, content }: Entry): Uint8Array {
  if (new TextEncoder().encode(path).length > 100) throw new Error(`Cannot pack "${path}": its name is over 100 bytes`);
  const block = new Uint8Array(blockBytes);
  const put = (offset: number, text: string) => block.set(new TextEncoder().encode(text), offset);
  const octal = (offset: number, length: number, value: number) =>
    put(offset, value.toString(8).padStart(length - 1, "0"));
  put(0, path);
  octal(100, 8, 0o644);
  octal(108, 8, 0);
  octal(116, 8, 0);
  octal(124, 12, content.length);
  octal(136, 12, modifiedSeconds);
  put(148, " ".repeat(8)); // the checksum counts as blanks in itself
  put(156, "0");
  put(257, "ustar\0" + "00");
  put(265, "root");
  put(297, "root");
  const sum = block.reduce((sum, byte) => sum + byte, 0);
  put(148, sum.toString(8).padStart(6, "0") + "\0 ");
  return block;
}

/** A gzipped tar archive of files. */
function archive(entries: readonly Entry[]): Uint8Array {
  const parts: Uint8Array[] = [];
  // By bytes, not by a locale's order.
  for (const entry of entries.toSorted((a, b) => a.path < b.path ? -1 : 1)) {
    const padding = new Uint8Array((blockBytes - entry.content.length % blockBytes) % blockBytes);
    parts.push(header(entry), entry.content, padding);
  }
  parts.push(new Uint8Array(2 * blockBytes));
  const zipped = gzipSync(new Uint8Array(parts.flatMap((part) => [...part])), { level: 9 });
  zipped[9] = 255; // the system that packed it: unknown
  return zipped;
}

/** The files below a directory, hidden ones left out, each under `prefix`. */
function filesBelow(directory: string, prefix: string): readonly Entry[] {
  return [...Deno.readDirSync(directory)].filter(({ name }) => !name.startsWith(".")).flatMap(
    ({ name, isDirectory }) => {
      const path = `${directory}/${name}`;
      return isDirectory
        ? filesBelow(path, `${prefix}/${name}`)
        : [{ path: `${prefix}/${name}`, content: Deno.readFileSync(path) }];
    },
  );
}

const manifestsIn = (directory: string, prefix: string) =>
  [...Deno.readDirSync(directory)].filter(({ isFile, name }) => isFile && name.endsWith(".yaml"))
    .map(({ name }) => ({ path: `${prefix}/${name}`, content: Deno.readFileSync(`${directory}/${name}`) }));

const directory = Deno.args[0] ?? `${k8sRoot}../dist`;
const bundle = archive([
  ...manifestsIn(`${k8sRoot}examples`, "examples"),
  ...chartNames.map((name) => ({
    path: `helm/charts/${name}-${version}.tgz`,
    content: archive(filesBelow(chartDirectory(name), name)),
  })),
  ...manifestsIn(k8sRoot, "k8s"),
]);
await Deno.mkdir(directory, { recursive: true });
const path = `${directory}/lb-csi-bundle-${version}.tar.gz`;
await Deno.writeFile(path, bundle);
console.log(`${path}: ${bundle.length} bytes`);

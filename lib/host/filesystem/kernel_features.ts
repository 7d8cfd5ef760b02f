/**
 * Features of file systems that older kernels do not support: which of them mkfs has to leave out on this node, and which of
 * them keep this node from mounting an existing file system.
 *
 * The tools in the image can be newer than the node's kernel: xfsprogs 6.1 makes bigtime, which Linux before 5.10 cannot
 * mount. The versions are those in which Linux and the tools got a feature; bits and places of fields are those of
 * fs/xfs/libxfs/xfs_format.h, fs/ext4/ext4.h and include/uapi/linux/btrfs.h.
 */
import type { RequestContext } from "../../context.ts";
import { messageOf } from "../../error.ts";
import type { Host } from "../host.ts";
import type { DeviceReader } from "./device_reader.ts";
import type { FsType } from "./fs_type.ts";

/**
 * Options for mkfs that leave out what this node's kernel does not support. None when the kernel is new enough or its version
 * cannot be read, for features that the installed mkfs does not know, and for those that the user's options name: the user's
 * choice counts.
 */
export async function featureOptions(
  host: Host,
  ctx: RequestContext,
  fsType: FsType,
  userOptions: readonly string[],
): Promise<readonly string[]> {
  const kernel = await kernelVersion(host);
  if (kernel === undefined) return [];
  const named = namedKeys(userOptions);
  const tooNew = features[fsType].flatMap(({ kernel: needed, without }) =>
    without !== undefined && isBefore(kernel.version, needed) && !named.has(`${without.option} ${without.key}`)
      ? [without]
      : []
  );
  if (tooNew.length === 0) return [];
  const knows = await knownByMkfs(host, ctx, fsType);
  const options = tooNew.filter((feature) => knows(feature))
    .flatMap(({ option, key }) => [option, fsType === "xfs" ? `${key}=0` : `^${key}`]);
  if (options.length > 0) ctx.log.info("leaves features out of a new file system", { version: kernel.text });
  return options;
}

/** `-m bigtime` for each key of the comma lists in mkfs options. */
function namedKeys(args: readonly string[]): ReadonlySet<string> {
  const named = new Set<string>();
  args.forEach((arg, at) => {
    for (const key of (args[at + 1] ?? "").split(",")) {
      named.add(`${arg === "-R" ? "-O" : arg} ${key.replace(/^[-+^]/, "").replace(/=.*$/, "")}`);
    }
  });
  return named;
}

/** Which features the installed mkfs can leave out. */
async function knownByMkfs(
  host: Host,
  ctx: RequestContext,
  fsType: FsType,
): Promise<(feature: { readonly key: string; readonly since: Version }) => boolean> {
  const probe = { signal: ctx.signal, onAbort: "kill", log: ctx.log } as const;
  if (fsType === "btrfs") {
    // Its features depend on how it was built, and it prints a list.
    const { stdout, stderr } = await host.run("mkfs.btrfs", ["-O", "list-all"], probe);
    const names = new Set([...`${stdout}\n${stderr}`.matchAll(/^([a-z0-9-]+) /gm)].map(([, name]) => name));
    return ({ key }) => names.has(key);
  }
  const { stdout, stderr } = await host.run(`mkfs.${fsType}`, ["-V"], probe);
  const version = parseVersion(/(?:mkfs\.xfs version|mke2fs) ([\d.]+)/.exec(`${stdout}\n${stderr}`)?.[1] ?? "");
  return ({ since }) => version !== undefined && !isBefore(version, since);
}

/**
 * Why this kernel may not be able to mount a file system, as the end of an error message; undefined: its features are no
 * reason, or cannot be read.
 */
export async function featureProblem(
  host: Host,
  ctx: RequestContext,
  fsType: FsType,
  read: DeviceReader,
): Promise<string | undefined> {
  const kernel = await kernelVersion(host);
  if (kernel === undefined) return undefined;
  try {
    const problems: string[] = [];
    for (const field of [incompatible, readOnlyCompatible] as const) {
      const bits = await bitsOf(read, fsType, field);
      const known = features[fsType].filter((feature) => feature.field === field);
      for (const { name, bit, kernel: needed } of known) {
        if ((bits & bit) === 0 || !isBefore(kernel.version, needed)) continue;
        problems.push(`${name} (since Linux ${needed.join(".")})`);
      }
      const unknown = (bits & ~known.reduce((all, { bit }) => all | bit, oldBits[fsType][field])) >>> 0;
      if (unknown !== 0) problems.push(`${field} features that this driver cannot name (0x${unknown.toString(16)})`);
    }
    if (problems.length === 0) return undefined;
    return `its ${fsType} has ${problems.join(", ")}, which this node's kernel ${kernel.text} may not know`;
  } catch (error) {
    ctx.signal.throwIfAborted();
    ctx.log.debug("cannot read the features of a file system", { error: messageOf(error) });
    return undefined;
  }
}

async function bitsOf(read: DeviceReader, fsType: FsType, field: Field): Promise<number> {
  const at = fields[fsType][field];
  const start = at / 4096n * 4096n;
  const bytes = await read(start, 4096);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  // xfs before its fifth version (the low bits at 100) has other fields there.
  if (fsType === "xfs" && (view.getUint16(100) & 0xf) !== 5) return 0;
  return view.getUint32(Number(at - start), fields[fsType].isLittleEndian);
}

async function kernelVersion(host: Host): Promise<{ readonly version: Version; readonly text: string } | undefined> {
  const text = (await host.readText(`${host.roots.proc}/sys/kernel/osrelease`))?.trim() ?? "";
  const version = parseVersion(text);
  return version === undefined ? undefined : { version, text };
}

function parseVersion(text: string): Version | undefined {
  const [, major, minor] = /^(\d+)\.(\d+)/.exec(text) ?? [];
  return major === undefined ? undefined : [Number(major), Number(minor)];
}

function isBefore([major, minor]: Version, [otherMajor, otherMinor]: Version): boolean {
  return major < otherMajor || (major === otherMajor && minor < otherMinor);
}

/** Major and minor number of a kernel or a tool. */
type Version = readonly [major: number, minor: number];
/** Which field of the super block has the bit: kernels that do not know the bit cannot mount, or cannot write. */
type Field = "incompatible" | "read-only compatible";

interface Feature {
  readonly name: string;
  readonly field: Field;
  readonly bit: number;
  /** The first Linux that has it. */
  readonly kernel: Version;
  /** How mkfs leaves it out, and the first mkfs that supports this; absent: no mkfs makes it by default. */
  readonly without?: { readonly option: string; readonly key: string; readonly since: Version };
}

const incompatible = "incompatible";
const readOnlyCompatible = "read-only compatible";

/** A feature that mkfs leaves out with `-m bigtime=0` (xfs) or `-O ^orphan_file`, from version `since` of mkfs on. */
function optional(option: string, feature: Omit<Feature, "without">, since: Version = feature.kernel): Feature {
  return { ...feature, without: { option, key: feature.name, since } };
}

const features: Readonly<Record<FsType, readonly Feature[]>> = {
  xfs: [
    optional("-m", { name: "finobt", field: readOnlyCompatible, bit: 0x1, kernel: [3, 16] }),
    optional("-i", { name: "sparse", field: incompatible, bit: 0x2, kernel: [4, 2] }),
    optional("-m", { name: "rmapbt", field: readOnlyCompatible, bit: 0x2, kernel: [4, 8] }),
    optional("-m", { name: "reflink", field: readOnlyCompatible, bit: 0x4, kernel: [4, 9] }),
    optional("-m", { name: "inobtcount", field: readOnlyCompatible, bit: 0x8, kernel: [5, 10] }),
    optional("-m", { name: "bigtime", field: incompatible, bit: 0x8, kernel: [5, 10] }),
    optional("-i", { name: "nrext64", field: incompatible, bit: 0x20, kernel: [5, 19] }),
    optional("-i", { name: "exchange", field: incompatible, bit: 0x40, kernel: [6, 10] }),
    optional("-n", { name: "parent", field: incompatible, bit: 0x80, kernel: [6, 10] }),
    optional("-m", { name: "metadir", field: incompatible, bit: 0x100, kernel: [6, 13] }),
    { name: "meta_uuid", field: incompatible, bit: 0x4, kernel: [4, 3] },
    { name: "zoned", field: incompatible, bit: 0x200, kernel: [6, 15] },
  ],
  ext4: [
    optional("-O", { name: "metadata_csum_seed", field: incompatible, bit: 0x2000, kernel: [4, 4] }, [1, 43]),
    // The file itself is harmless; entries for files that were deleted while open are not.
    optional("-O", { name: "orphan_file", field: readOnlyCompatible, bit: 0x10000, kernel: [5, 15] }, [1, 47]),
    { name: "metadata_csum", field: readOnlyCompatible, bit: 0x400, kernel: [3, 6] },
    { name: "project", field: readOnlyCompatible, bit: 0x2000, kernel: [4, 5] },
    { name: "verity", field: readOnlyCompatible, bit: 0x8000, kernel: [5, 4] },
    { name: "ea_inode", field: incompatible, bit: 0x400, kernel: [4, 13] },
    { name: "large_dir", field: incompatible, bit: 0x4000, kernel: [4, 13] },
    { name: "inline_data", field: incompatible, bit: 0x8000, kernel: [3, 8] },
    { name: "encrypt", field: incompatible, bit: 0x10000, kernel: [4, 1] },
    { name: "casefold", field: incompatible, bit: 0x20000, kernel: [5, 2] },
  ],
  btrfs: [
    optional("-O", { name: "block-group-tree", field: readOnlyCompatible, bit: 0x8, kernel: [6, 1] }, [6, 0]),
    optional("-O", { name: "no-holes", field: incompatible, bit: 0x200, kernel: [3, 14] }, [3, 14]),
    { name: "free-space-tree", field: readOnlyCompatible, bit: 0x1, kernel: [4, 5] },
    { name: "verity", field: readOnlyCompatible, bit: 0x4, kernel: [5, 15] },
    { name: "zstd", field: incompatible, bit: 0x10, kernel: [4, 14] },
    { name: "metadata-uuid", field: incompatible, bit: 0x400, kernel: [5, 0] },
    { name: "raid1c34", field: incompatible, bit: 0x800, kernel: [5, 5] },
    { name: "zoned", field: incompatible, bit: 0x1000, kernel: [5, 12] },
    { name: "raid-stripe-tree", field: incompatible, bit: 0x4000, kernel: [6, 7] },
    { name: "squota", field: incompatible, bit: 0x10000, kernel: [6, 7] },
  ],
};

/** Bits that every kernel with NVMe/TCP (5.0; 4.18 of some distributions) knows, so that they need no name. */
const oldBits: Readonly<Record<FsType, Readonly<Record<Field, number>>>> = {
  // ftype, needsrepair.
  xfs: { [incompatible]: 0x11, [readOnlyCompatible]: 0 },
  // filetype to flex_bg; sparse_super to bigalloc, and read-only.
  ext4: { [incompatible]: 0x3d6, [readOnlyCompatible]: 0x137f },
  btrfs: { [incompatible]: 0x1ef, [readOnlyCompatible]: 0x2 },
};

/** The offsets of the two fields on the device, and their byte order. */
const fields: Readonly<Record<FsType, Readonly<Record<Field, bigint>> & { readonly isLittleEndian: boolean }>> = {
  xfs: { [incompatible]: 216n, [readOnlyCompatible]: 212n, isLittleEndian: false },
  ext4: { [incompatible]: 1024n + 0x60n, [readOnlyCompatible]: 1024n + 0x64n, isLittleEndian: true },
  btrfs: { [incompatible]: 65536n + 0xbcn, [readOnlyCompatible]: 65536n + 0xb4n, isLittleEndian: true },
};

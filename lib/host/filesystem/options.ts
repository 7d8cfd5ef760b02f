/**
 * What a StorageClass may ask of mkfs and of mount: lists of what is allowed, because both tools have options that write to
 * other devices, read files of the node, stop the node, or overwrite data without asking.
 */
import { StatusError } from "../../error.ts";
import type { FsType } from "./fs_type.ts";

interface Allowed {
  /** Options that take a value, with the keys that its comma list may have; "any": the value is no such list. */
  readonly withValue: Readonly<Record<string, readonly string[] | "any">>;
  readonly flags: readonly string[];
}

// Left out on purpose: force, dry run, device size and offset, external journals, realtime and data devices, prototype
// directories, bad block lists, a node that stops at an error in a file system (panic), and the UUID, which the driver
// chooses (see format).
const allowed: Readonly<Record<FsType, Allowed>> = {
  ext4: {
    withValue: {
      "-b": "any",
      "-C": "any",
      "-e": ["continue", "remount-ro"],
      "-E": [
        ...["stride", "stripe_width", "stripe-width", "resize", "lazy_itable_init", "lazy_journal_init"],
        ...["assume_storage_prezeroed", "discard", "nodiscard", "num_backup_sb", "packed_meta_blocks", "quotatype"],
        ...["root_owner", "root_perms", "hash_seed", "mmp_update_interval", "encoding", "encoding_flags"],
        ...["orphan_file_size", "desc_size", "desc-size"],
      ],
      "-g": "any",
      "-G": "any",
      "-i": "any",
      "-I": "any",
      "-J": ["size", "location", "fast_commit_size"],
      "-L": "any",
      "-m": "any",
      "-N": "any",
      "-O": [
        ...["none", "has_journal", "extent", "extents", "huge_file", "flex_bg", "uninit_bg", "uninit_groups"],
        ...["metadata_csum", "metadata_csum_seed", "64bit", "dir_nlink", "extra_isize", "sparse_super"],
        ...["sparse_super2", "large_file", "filetype", "resize_inode", "dir_index", "ext_attr", "inline_data"],
        ...["bigalloc", "quota", "project", "encrypt", "verity", "casefold", "large_dir", "ea_inode", "mmp"],
        ...["meta_bg", "fast_commit", "orphan_file", "stable_inodes"],
      ],
      "-T": "any",
    },
    flags: [],
  },
  xfs: {
    withValue: {
      "-b": ["log", "size"],
      "-d": [
        ...["agcount", "agsize", "sunit", "swidth", "su", "sw", "noalign", "cowextsize", "extszinherit"],
        ...["projinherit", "daxinherit", "concurrency", "sectsize", "sectlog"],
      ],
      "-i": ["align", "attr", "exchange", "log", "maxpct", "nrext64", "perblock", "projid32bit", "size", "sparse"],
      "-l": [
        ...["agnum", "concurrency", "internal", "lazy-count", "sectlog", "sectsize", "size", "su", "sunit", "version"],
      ],
      "-L": "any",
      "-m": ["autofsck", "bigtime", "crc", "finobt", "inobtcount", "metadir", "reflink", "rmapbt"],
      "-n": ["ftype", "log", "parent", "size", "version"],
      "-s": ["log", "sectlog", "sectsize", "size"],
    },
    flags: [],
  },
  btrfs: {
    withValue: {
      "-d": "any",
      "-m": "any",
      "-n": "any",
      "-s": "any",
      "-L": "any",
      "-O": btrfsFeatures(),
      "-R": btrfsFeatures(),
      "--csum": "any",
      "--checksum": "any",
    },
    flags: ["-M"],
  },
};

/** Without those that want another kind of device, and `list-all`, with which mkfs.btrfs makes nothing and says it is done. */
function btrfsFeatures(): readonly string[] {
  return [
    ...["mixed-bg", "quota", "squota", "extref", "raid56", "skinny-metadata", "no-holes", "fst", "free-space-tree"],
    ...["raid1c34", "block-group-tree", "bgt", "raid-stripe-tree"],
  ];
}

/**
 * The words of `mkfs-options` as arguments for this file system's mkfs, `-m0` and `-m 0` alike.
 *
 * @throws StatusError INVALID_ARGUMENT for an option that is not on the list or has no value, a value with a path or an
 *   unknown key in it, and a word that belongs to no option
 */
export function parseMkfsOptions(fsType: FsType, text: string): readonly string[] {
  const refuse = (problem: string) =>
    new StatusError("INVALID_ARGUMENT", `Cannot use mkfs-options "${text}" for ${fsType}: ${problem}`);
  const { withValue, flags } = allowed[fsType];
  const args: string[] = [];
  const words = text.split(/\s+/).filter((word) => word !== "");
  for (let at = 0; at < words.length; at++) {
    const word = words[at] ?? "";
    if (!word.startsWith("-")) throw refuse(`"${word}" belongs to no option`);
    if (flags.includes(word)) {
      args.push(word);
      continue;
    }
    const [option, attached] = word.startsWith("--")
      ? [word.replace(/=.*$/s, ""), /=(.*)$/s.exec(word)?.[1]]
      : [word.slice(0, 2), word.length > 2 ? word.slice(2) : undefined];
    const keys = Object.hasOwn(withValue, option) ? withValue[option] : undefined;
    if (keys === undefined) {
      throw refuse(`${option} is not one of ${[...Object.keys(withValue), ...flags].join(", ")}`);
    }
    const value = attached ?? words[++at];
    if (value === undefined) throw refuse(`${option} has no value`);
    if (!/^[A-Za-z0-9^_.+%][A-Za-z0-9^_.+%:=,-]*$/.test(value)) {
      throw refuse(`the value "${value}" of ${option} has something else than letters, digits and ^_.+%:=,-`);
    }
    const unknown = keys === "any" ? undefined : unknownKey(option, value, keys);
    if (unknown !== undefined) throw refuse(`${option} ${unknown} is not allowed, it takes ${[...keys].join(", ")}`);
    args.push(option, value);
  }
  return args;
}

/** The first key of a comma list that is none of `keys`. */
function unknownKey(option: string, value: string, keys: readonly string[]): string | undefined {
  // mke2fs takes "+", "-" and "^" before a feature, mkfs.btrfs "^".
  const isFeatures = option === "-O" || option === "-R";
  return value.split(",").map((part) => (isFeatures ? part.replace(/^[-+^]/, "") : part).replace(/=.*$/s, ""))
    .find((key) => !keys.includes(key));
}

/** Mount flags of a capability, taken apart. */
export interface MountFlags {
  readonly readOnly: boolean;
  /**
   * What is passed on to mount, in the order given, without `ro`, `rw` and `defaults`. Of options that undo each other the
   * last one only.
   */
  readonly rest: readonly string[];
}

const number = /^\d+$/;
const bytes = /^\d+[kKmMgG]?$/;
const zeroOrOne = /^[01]$/;
// A label of SELinux, with its commas in quotes.
const label = /^(?:"[A-Za-z0-9_.:,-]+"|[A-Za-z0-9_.:-]+)$/;

/** Options without a value, which is "", and the values that others take. */
type Options = Readonly<Record<string, RegExp | "">>;

function bare(names: string): Options {
  return Object.fromEntries(names.split(" ").map((name) => [name, ""]));
}

/**
 * What mount may be told: what the kernel, ext4, xfs and btrfs document as options, without those that mount something
 * else than the whole of this device here (bind, loop, subvol), use other devices or paths (external journals), leave
 * the log out or fall back to older trees, or stop the node at an error (errors=panic, fatal_errors=panic).
 */
export const mountFlags: Readonly<Record<"all" | FsType, Options>> = {
  all: {
    ...bare("ro rw defaults exec noexec suid nosuid dev nodev sync async dirsync"),
    ...bare("atime noatime diratime nodiratime relatime norelatime strictatime nostrictatime lazytime nolazytime"),
    ...bare("iversion noiversion mand nomand silent loud symfollow nosymfollow"),
    // Of fstab, without effect here.
    ...bare("auto noauto nofail nouser _netdev"),
    context: label,
    fscontext: label,
    defcontext: label,
    rootcontext: label,
  },
  ext4: {
    ...bare("journal_checksum nojournal_checksum journal_async_commit nobarrier delalloc nodelalloc"),
    ...bare("noauto_da_alloc noinit_itable discard nodiscard block_validity noblock_validity"),
    ...bare("dioread_lock dioread_nolock nodioread_nolock i_version user_xattr nouser_xattr acl noacl bsddf minixdf"),
    ...bare("grpid nogrpid bsdgroups sysvgroups quota noquota usrquota grpquota prjquota"),
    ...bare("prefetch_block_bitmaps no_prefetch_block_bitmaps nombcache no_mbcache warn_on_error nowarn_on_error"),
    ...bare("inlinecrypt debug nouid32"),
    // Of old kernels, without effect in new ones.
    ...bare("bh nobh oldalloc orlov mblk_io_submit nomblk_io_submit"),
    auto_da_alloc: /^[01]?$/,
    barrier: /^[01]?$/,
    commit: number,
    data: /^(?:journal|ordered|writeback)$/,
    data_err: /^(?:abort|ignore)$/,
    dax: /^(?:always|never|inode|)$/,
    errors: /^(?:continue|remount-ro)$/,
    init_itable: /^\d*$/,
    inode_readahead_blks: number,
    journal_ioprio: /^[0-7]$/,
    max_batch_time: number,
    max_dir_size_kb: number,
    mb_optimize_scan: zeroOrOne,
    min_batch_time: number,
    resgid: number,
    resuid: number,
    stripe: number,
  },
  xfs: {
    ...bare("attr2 noattr2 discard nodiscard grpid nogrpid bsdgroups sysvgroups filestreams ikeep noikeep"),
    ...bare("inode32 inode64 largeio nolargeio lifetime nolifetime noalign nobarrier nouuid swalloc wsync"),
    ...bare("noquota quota uquota usrquota uqnoenforce qnoenforce gquota grpquota gqnoenforce"),
    ...bare("pquota prjquota pqnoenforce"),
    allocsize: bytes,
    barrier: /^$/,
    dax: /^(?:always|never|inode|)$/,
    logbsize: bytes,
    logbufs: number,
    max_atomic_write: bytes,
    sunit: number,
    swidth: number,
  },
  btrfs: {
    ...bare("acl noacl autodefrag noautodefrag barrier nobarrier clear_cache datacow nodatacow datasum nodatasum"),
    ...bare("nodiscard flushoncommit noflushoncommit nospace_cache ssd nossd ssd_spread nossd_spread treelog"),
    ...bare("notreelog user_subvol_rm_allowed skip_balance inode_cache noinode_cache rescan_uuid_tree"),
    ...bare("enospc_debug noenospc_debug"),
    commit: number,
    compress: /^(?:[a-z0-9:+-]+|)$/,
    "compress-force": /^(?:[a-z0-9:+-]+|)$/,
    discard: /^(?:sync|async|)$/,
    max_inline: bytes,
    metadata_ratio: number,
    space_cache: /^(?:v1|v2|)$/,
    thread_pool: number,
  },
};

/** Whether one of the lists has this option with this value. */
function isAllowedFlag(option: string): boolean {
  const equals = option.indexOf("=");
  const [name, value] = equals < 0 ? [option, undefined] : [option.slice(0, equals), option.slice(equals + 1)];
  return Object.values(mountFlags).some((options) => {
    const pattern = Object.hasOwn(options, name) ? options[name] : undefined;
    if (pattern === undefined) return false;
    // "bind=" binds (util-linux 2.38): an empty value makes no other option of one that has none.
    if (pattern === "") return value === undefined;
    return value === undefined ? pattern.test("") : value !== "" && pattern.test(value);
  });
}

/** Options of which the last one counts, as for the kernel. */
const undoing: readonly (readonly string[])[] = [
  ["exec", "noexec"],
  ["suid", "nosuid"],
  ["dev", "nodev"],
  ["async", "sync"],
  ["diratime", "nodiratime"],
  ["lazytime", "nolazytime"],
  ["iversion", "noiversion"],
  ["mand", "nomand"],
  ["silent", "loud"],
  ["symfollow", "nosymfollow"],
  // The kernel knows one way to keep access times; which of two wins there depends on the version of mount.
  ["noatime", "relatime", "strictatime"],
];
/** Options that only take another one back. */
const takingBack: Readonly<Record<string, string>> = {
  atime: "noatime",
  norelatime: "relatime",
  nostrictatime: "strictatime",
};

/** `options` without those that a later one undoes. */
function withoutUndone(options: readonly string[]): readonly string[] {
  return options.reduce<readonly string[]>((kept, option) => {
    const back = Object.hasOwn(takingBack, option) ? takingBack[option] : undefined;
    if (back !== undefined) return kept.filter((other) => other !== back);
    const group = undoing.find((group) => group.includes(option)) ?? [];
    return [...kept.filter((other) => !group.includes(other)), option];
  }, []);
}

/**
 * Takes mount flags apart; a flag may hold several options, and quoted commas (SELinux labels) do not part them.
 *
 * @throws StatusError INVALID_ARGUMENT for a flag that is not one of `mountFlags`, naming it
 */
export function parseMountFlags(flags: readonly string[]): MountFlags {
  const options = flags.flatMap((flag) => flag.match(/(?:"[^"]*"|[^,"])+/g) ?? []);
  const bad = options.find((option) => !isAllowedFlag(option));
  if (bad !== undefined) {
    throw new StatusError(
      "INVALID_ARGUMENT",
      `Cannot use mount flag "${bad}": this driver does not allow it, docs/configuration.md lists the flags that it takes`,
    );
  }
  const rest = options.filter((option) => option !== "ro" && option !== "rw" && option !== "defaults");
  return {
    readOnly: options.findLast((option) => option === "ro" || option === "rw") === "ro",
    rest: withoutUndone(rest),
  };
}

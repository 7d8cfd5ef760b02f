/**
 * The options that a StorageClass may give to mkfs: a list of what is allowed, because mkfs has options that write to other
 * devices, read files of the node, or overwrite data without asking.
 */
import { StatusError } from "../../error.ts";
import type { FsType } from "./fs_type.ts";

/**
 * Turns the text of `mkfs-options` into arguments for the mkfs of this file system; `-m0` and `-m 0` give the same.
 *
 * @throws StatusError INVALID_ARGUMENT for an option that is not on the list or has no value, for a value that contains a
 *   path or an unknown key, and for a word that belongs to no option
 */
export function parseMkfsOptions(fsType: FsType, text: string): readonly string[] {
  const optionError = (problem: string) =>
    new StatusError("INVALID_ARGUMENT", `Cannot use mkfs-options "${text}" for ${fsType}: ${problem}`);
  const { withValue, flags } = allowed[fsType];
  const args: string[] = [];
  const words = text.split(/\s+/).filter((word) => word !== "");
  for (let at = 0; at < words.length; at++) {
    const word = words[at] ?? "";
    if (!word.startsWith("-")) throw optionError(`"${word}" belongs to no option`);
    if (flags.includes(word)) {
      args.push(word);
      continue;
    }
    const [option, attached] = word.startsWith("--")
      ? [word.replace(/=.*$/s, ""), /=(.*)$/s.exec(word)?.[1]]
      : [word.slice(0, 2), word.length > 2 ? word.slice(2) : undefined];
    const keys = Object.hasOwn(withValue, option) ? withValue[option] : undefined;
    if (keys === undefined) {
      throw optionError(`${option} is not one of ${[...Object.keys(withValue), ...flags].join(", ")}`);
    }
    const value = attached ?? words[++at];
    if (value === undefined) throw optionError(`${option} has no value`);
    if (!/^[A-Za-z0-9^_.+%][A-Za-z0-9^_.+%:=,-]*$/.test(value)) {
      throw optionError(`the value "${value}" of ${option} has something else than letters, digits and ^_.+%:=,-`);
    }
    const unknown = keys === "any" ? undefined : unknownKey(option, value, keys);
    if (unknown !== undefined) {
      throw optionError(`${option} ${unknown} is not allowed, it takes ${[...keys].join(", ")}`);
    }
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

interface Allowed {
  /** Options that take a value, with the keys that its comma list may have; "any": the value is not such a list. */
  readonly withValue: Readonly<Record<string, readonly string[] | "any">>;
  readonly flags: readonly string[];
}

// Left out on purpose: force, dry run, device size and offset, external journals, realtime and data devices, prototype
// directories, bad block lists, panic (the node stops at an error in a file system), and the UUID, which the driver
// chooses (format.ts).
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

/** Without features for other kinds of devices, and without `list-all`: mkfs.btrfs then makes nothing and reports success. */
function btrfsFeatures(): readonly string[] {
  return [
    ...["mixed-bg", "quota", "squota", "extref", "raid56", "skinny-metadata", "no-holes", "fst", "free-space-tree"],
    ...["raid1c34", "block-group-tree", "bgt", "raid-stripe-tree"],
  ];
}

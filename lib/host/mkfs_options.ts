/**
 * What a StorageClass may ask of mkfs and of mount: lists of what is allowed, since both tools have options that write to
 * other devices, read files of the node, or overwrite data without asking.
 */
import { StatusError } from "../error.ts";
import type { FsType } from "./filesystem.ts";

interface Allowed {
  /** Options that take a value, and the keys that its comma list may not have. */
  readonly withValue: Readonly<Record<string, readonly string[]>>;
  readonly flags: readonly string[];
}

// Left out on purpose: force, dry run, device size and offset, external journals, realtime and data devices, prototype
// directories, bad block lists, and the UUID, which the driver chooses (see format).
const allowed: Readonly<Record<FsType, Allowed>> = {
  ext4: {
    withValue: {
      "-b": [],
      "-C": [],
      "-e": [],
      "-E": ["offset", "test_fs", "no_test_fs"],
      "-g": [],
      "-G": [],
      "-i": [],
      "-I": [],
      "-J": ["device"],
      "-L": [],
      "-m": [],
      "-N": [],
      "-O": ["journal_dev"],
      "-T": [],
    },
    flags: [],
  },
  xfs: {
    withValue: {
      "-b": [],
      "-d": ["file", "name", "size", "rtinherit"],
      "-i": [],
      "-l": ["logdev", "file", "name"],
      "-L": [],
      "-m": ["uuid"],
      "-n": [],
      "-s": [],
    },
    flags: [],
  },
  btrfs: {
    withValue: { "-d": [], "-m": [], "-n": [], "-s": [], "-L": [], "-O": [], "-R": [], "--csum": [], "--checksum": [] },
    flags: ["-M"],
  },
};

/**
 * The words of `mkfs-options` as arguments for this file system's mkfs, `-m0` and `-m 0` alike.
 *
 * @throws StatusError INVALID_ARGUMENT for an option that is not on the list or has no value, a value with a path or a
 *   forbidden key in it, and a word that belongs to no option
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
    const forbidden = Object.hasOwn(withValue, option) ? withValue[option] : undefined;
    if (forbidden === undefined) {
      throw refuse(`${option} is not one of ${[...Object.keys(withValue), ...flags].join(", ")}`);
    }
    const value = attached ?? words[++at];
    if (value === undefined) throw refuse(`${option} has no value`);
    if (!/^[A-Za-z0-9^_.+%][A-Za-z0-9^_.+%:=,-]*$/.test(value)) {
      throw refuse(`the value "${value}" of ${option} has something else than letters, digits and ^_.+%:=,-`);
    }
    for (const key of value.split(",").map((part) => part.replace(/=.*$/s, ""))) {
      if (forbidden.includes(key.replace(/^\^/, ""))) throw refuse(`${option} ${key} is not allowed`);
    }
    args.push(option, value);
  }
  return args;
}

/** Mount flags of a capability, taken apart. */
export interface MountFlags {
  readonly readOnly: boolean;
  /** What is passed on to mount, in the order given, without `ro`, `rw` and `defaults`. */
  readonly rest: readonly string[];
}

// These make mount do something else than to mount this device here. An empty value makes no other option of one that has
// none (util-linux 2.38: `bind=` binds), and `ro=fs` is a second way to say `ro`.
const forbiddenFlag = new RegExp(
  "^(?:r?bind|move|remount|loop|offset|sizelimit|encryption|helper|uhelper|[xX]-.*|" +
    "(?:make-)?r?(?:private|shared|slave|unbindable)|users?|owner|group|logdev|rtdev|device|" +
    "journal_path|journal_dev|usrjquota|grpjquota|norecovery|noload|nologreplay|rescue|r[ow](?==))(?:=.*)?$",
  "s",
);

/**
 * Takes mount flags apart; a flag may hold several options, and quoted commas (SELinux labels) do not part them.
 *
 * @throws StatusError INVALID_ARGUMENT for a flag that would mount something else, or skip the journal
 */
export function parseMountFlags(flags: readonly string[]): MountFlags {
  const options = flags.flatMap((flag) => flag.match(/(?:"[^"]*"|[^,"])+/g) ?? []);
  const bad = options.find((option) => forbiddenFlag.test(option));
  if (bad !== undefined) {
    throw new StatusError("INVALID_ARGUMENT", `Cannot use mount flag "${bad}": this driver does not allow it`);
  }
  return {
    readOnly: options.includes("ro"),
    rest: options.filter((option) => option !== "ro" && option !== "rw" && option !== "defaults"),
  };
}

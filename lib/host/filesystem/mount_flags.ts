/**
 * The mount flags that a StorageClass or a capability may give: a list of what is allowed, because mount has options that
 * use other devices or paths, hide what is on the device, or stop the node.
 */
import { StatusError } from "../../error.ts";
import type { FsType } from "./fs_type.ts";

/** The mount flags of a capability, parsed. */
export interface MountFlags {
  readonly readOnly: boolean;
  /**
   * What is passed on to mount, in the given order, without `ro`, `rw` and `defaults`. Of options that undo each other, only
   * the last one.
   */
  readonly rest: readonly string[];
}

/**
 * Parses mount flags. A flag may hold several options; quoted commas (SELinux labels) do not separate them.
 *
 * @throws StatusError INVALID_ARGUMENT for a flag that is not one of `mountFlags`, naming it
 */
export function parseMountFlags(flags: readonly string[]): MountFlags {
  const options = flags.flatMap((flag) => flag.match(/(?:"[^"]*"|[^,"])+/g) ?? []);
  const bad = options.find((option) => !isAllowedOption(option));
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

const number = /^\d+$/;
const bytes = /^\d+[kKmMgG]?$/;
const zeroOrOne = /^[01]$/;
// An SELinux label, with its commas in quotes.
const label = /^(?:"[A-Za-z0-9_.:,-]+"|[A-Za-z0-9_.:-]+)$/;

/** Allowed values by option; "" for an option without a value. */
type AllowedOptions = Readonly<Record<string, RegExp | "">>;

function withoutValue(names: string): AllowedOptions {
  return Object.fromEntries(names.split(" ").map((name) => [name, ""]));
}

/**
 * The allowed options: those that the kernel, ext4, xfs and btrfs document, without those that mount something else than the
 * whole of this device (bind, loop, subvol), use other devices or paths (external journals), skip the log or fall back to
 * older trees, or stop the node at an error (errors=panic, fatal_errors=panic).
 */
export const mountFlags: Readonly<Record<"all" | FsType, AllowedOptions>> = {
  all: {
    ...withoutValue("ro rw defaults exec noexec suid nosuid dev nodev sync async dirsync"),
    ...withoutValue(
      "atime noatime diratime nodiratime relatime norelatime strictatime nostrictatime lazytime nolazytime",
    ),
    ...withoutValue("iversion noiversion mand nomand silent loud symfollow nosymfollow"),
    // For fstab only, without effect here.
    ...withoutValue("auto noauto nofail nouser _netdev"),
    context: label,
    fscontext: label,
    defcontext: label,
    rootcontext: label,
  },
  ext4: {
    ...withoutValue("journal_checksum nojournal_checksum journal_async_commit nobarrier delalloc nodelalloc"),
    ...withoutValue("noauto_da_alloc noinit_itable discard nodiscard block_validity noblock_validity"),
    ...withoutValue(
      "dioread_lock dioread_nolock nodioread_nolock i_version user_xattr nouser_xattr acl noacl bsddf minixdf",
    ),
    ...withoutValue("grpid nogrpid bsdgroups sysvgroups quota noquota usrquota grpquota prjquota"),
    ...withoutValue(
      "prefetch_block_bitmaps no_prefetch_block_bitmaps nombcache no_mbcache warn_on_error nowarn_on_error",
    ),
    ...withoutValue("inlinecrypt debug nouid32"),
    // For old kernels, without effect in new ones.
    ...withoutValue("bh nobh oldalloc orlov mblk_io_submit nomblk_io_submit"),
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
    ...withoutValue("attr2 noattr2 discard nodiscard grpid nogrpid bsdgroups sysvgroups filestreams ikeep noikeep"),
    ...withoutValue("inode32 inode64 largeio nolargeio lifetime nolifetime noalign nobarrier nouuid swalloc wsync"),
    ...withoutValue("noquota quota uquota usrquota uqnoenforce qnoenforce gquota grpquota gqnoenforce"),
    ...withoutValue("pquota prjquota pqnoenforce"),
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
    ...withoutValue(
      "acl noacl autodefrag noautodefrag barrier nobarrier clear_cache datacow nodatacow datasum nodatasum",
    ),
    ...withoutValue("nodiscard flushoncommit noflushoncommit nospace_cache ssd nossd ssd_spread nossd_spread treelog"),
    ...withoutValue("notreelog user_subvol_rm_allowed skip_balance inode_cache noinode_cache rescan_uuid_tree"),
    ...withoutValue("enospc_debug noenospc_debug"),
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

/** Whether one of the lists has this option with this value. A flag of another file system is left to the kernel. */
function isAllowedOption(option: string): boolean {
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

/** Groups of options of which the last one counts, as it does for the kernel. */
const exclusiveGroups: readonly (readonly string[])[] = [
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
  // The kernel keeps access times in one way; which of two options wins depends on the version of mount.
  ["noatime", "relatime", "strictatime"],
];
/** Options that only cancel another one. */
const cancelledBy: Readonly<Record<string, string>> = {
  atime: "noatime",
  norelatime: "relatime",
  nostrictatime: "strictatime",
};

/** `options` without those that a later one undoes. */
function withoutUndone(options: readonly string[]): readonly string[] {
  return options.reduce<readonly string[]>((kept, option) => {
    const cancelled = Object.hasOwn(cancelledBy, option) ? cancelledBy[option] : undefined;
    if (cancelled !== undefined) return kept.filter((other) => other !== cancelled);
    const group = exclusiveGroups.find((group) => group.includes(option)) ?? [];
    return [...kept.filter((other) => !group.includes(other)), option];
  }, []);
}

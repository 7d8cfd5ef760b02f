/** The file systems that volumes can have. */
export const fsTypes = ["ext4", "xfs", "btrfs"] as const;

/** One of `fsTypes`. */
export type FsType = typeof fsTypes[number];

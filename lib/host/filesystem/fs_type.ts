/** The file systems that volumes can have. */
/** The file systems that a volume can be given. */
export const fsTypes = ["ext4", "xfs", "btrfs"] as const;

export type FsType = typeof fsTypes[number];

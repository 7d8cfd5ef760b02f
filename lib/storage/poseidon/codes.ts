/**
 * What PoseidonOS' status codes mean to a client that repeats its requests (facts: docs/reference/poseidonos-api.md
 * sections 7 and 12). Numbers changed between versions, names did not: `eventName` decides where there is one.
 */
import type { StatusCode } from "../../error.ts";

/** What an answer other than success says about PoseidonOS. */
export type Meaning =
  /** Another operation is running; nothing was done. */
  | "busy"
  | "no such volume"
  | "volume name taken"
  | "bad volume name"
  | "bad size"
  | "no space"
  | "too many volumes"
  | "array not mounted"
  | "no such array"
  | "storage fault"
  | "volume is exported"
  | "exported already"
  | "exported nowhere"
  | "export failed"
  | "no such subsystem"
  | "subsystem of another array"
  | "subsystem exists"
  | "refused by the target"
  | "QoS out of range"
  | "QoS switched off"
  /** Something was done, something failed. */
  | "done in part"
  /** DAgent has lost PoseidonOS, or waited too long for it; the operation may still be running. */
  | "no answer from PoseidonOS"
  | "internal failure"
  | "unknown";

interface Reading {
  /** Our code for it. */
  readonly code: StatusCode;
  /** Whether the same request may succeed in a moment. */
  readonly passing: boolean;
  /** Numbers of every generation, and names of events. */
  readonly numbers: readonly number[];
  readonly events: RegExp;
}

const never = /^$/;

const readings: Readonly<Record<Meaning, Reading>> = {
  "busy": {
    code: "UNAVAILABLE",
    passing: true,
    numbers: [1224, 1223, 1030, 1805, 1806, 11030],
    events: /^(CLI_SERVER_BUSY|VOL_MGR_BUSY|VOL_MGR_NOT_INITIALIZED)$/,
  },
  "no such volume": { code: "NOT_FOUND", passing: false, numbers: [1807, 2010], events: /^VOL_NOT_FOUND$/ },
  "volume name taken": {
    code: "ALREADY_EXISTS",
    passing: false,
    numbers: [1810, 2022],
    events: /^CREATE_VOL_SAME_VOL_NAME_EXISTS$/,
  },
  "bad volume name": {
    code: "INVALID_ARGUMENT",
    passing: false,
    numbers: [1808, 1809, 1811, 1812],
    events: /^CREATE_VOL_NAME_/,
  },
  "bad size": {
    code: "INTERNAL",
    passing: false,
    numbers: [1813, 2025, 2032],
    events: /^CREATE_VOL_SIZE_NOT_ALIGNED$/,
  },
  "no space": {
    code: "RESOURCE_EXHAUSTED",
    passing: false,
    numbers: [1814, 2012, 2026],
    events: /^CREATE_VOL_SIZE_EXCEEDED$/,
  },
  "too many volumes": {
    code: "RESOURCE_EXHAUSTED",
    passing: false,
    numbers: [1815],
    events: /^CREATE_VOL_EXCEED_MAX_NUM_OF_VOLS$/,
  },
  "array not mounted": {
    code: "UNAVAILABLE",
    passing: false,
    numbers: [1816, 1823, 1840, 1849, 1855, 1877, 2028, 2090],
    events: /CAN_ONLY_BE_WHILE_ONLINE$/,
  },
  "no such array": {
    code: "FAILED_PRECONDITION",
    passing: false,
    numbers: [1225, 1234, 1819, 1824, 1841, 1850, 1856, 1876, 1878, 1879, 4611],
    events: /ARRAY_NAME_DOES_NOT_EXIST$|^CLI_ARRAY_INFO_ARRAY_NOT_EXIST$|NO_ARRAY_EXISTS$|^QOS_ARRAY_DOES_NOT_EXIST$/,
  },
  "storage fault": {
    code: "UNAVAILABLE",
    passing: false,
    // 1859 counts by its event only: DAgent uses the number for bad parameters too.
    numbers: [1236, 1826, 1827, 1828, 1829, 1830, 1831, 1832, 1833, 1866, 1880, 1881],
    events: /ARRAY_BROKEN$|IN_BROKEN_ARRAY$/,
  },
  "volume is exported": {
    code: "FAILED_PRECONDITION",
    passing: false,
    numbers: [1821, 2050],
    events: /^DELETE_VOL_MOUNTED_VOL_CANNOT_BE_DELETED$/,
  },
  "exported already": {
    code: "UNAVAILABLE",
    passing: true,
    // In POS 0.11, 2040 is what "volume is exported" is elsewhere; both are answered by looking again.
    numbers: [1843, 2040, 2070],
    events: /^MOUNT_VOL_ALREADY_MOUNTED$/,
  },
  "exported nowhere": {
    code: "UNAVAILABLE",
    passing: true,
    numbers: [1852, 2041, 2080],
    events: /^UNMOUNT_VOL_ALREADY_UNMOUNTED$/,
  },
  "export failed": {
    code: "UNAVAILABLE",
    passing: true,
    numbers: [1844],
    events: /^MOUNT_VOL_UNABLE_TO_ATTACH_TO_NVMF$/,
  },
  "no such subsystem": {
    code: "UNAVAILABLE",
    passing: true,
    numbers: [1845, 2203, 2207, 2210, 2212],
    events: /^MOUNT_VOL_SUBSYSTEM_NOT_FOUND$|_NO_SUBNQN$/,
  },
  "subsystem of another array": {
    code: "FAILED_PRECONDITION",
    passing: false,
    numbers: [1846, 1847],
    events: /^MOUNT_VOL_SUBSYSTEM_(MISMATCH|ALREADY_OCCUPIED)$/,
  },
  "subsystem exists": {
    code: "UNAVAILABLE",
    passing: true,
    numbers: [2200],
    events: /^CREATE_SUBSYSTEM_SUBNQN_ALREADY_EXIST$/,
  },
  "refused by the target": {
    code: "FAILED_PRECONDITION",
    passing: false,
    numbers: [2201, 2206, 2208, 2209, 2211],
    events: /^(CREATE_SUBSYSTEM_FAILURE|DELETE_SUBSYSTEM_FAILURE_SPDK_FAILURE|(ADD|REMOVE)_\w+_SPDK_FAILURE)$/,
  },
  "QoS out of range": {
    code: "INVALID_ARGUMENT",
    passing: false,
    numbers: [1858, 9010, 9011],
    events: /^VOL_REQ_QOS_OUT_OF_RANGE$/,
  },
  "QoS switched off": {
    code: "FAILED_PRECONDITION",
    passing: false,
    numbers: [4601],
    events: /^QOS_CLI_FE_QOS_DISABLED$/,
  },
  "done in part": {
    code: "UNAVAILABLE",
    passing: true,
    numbers: [1853, 1860, 2204, 2205],
    events:
      /^(VOL_REQ_PROCESSED_BUT_ERROR_OCCURED|UNMOUNT_VOL_UNABLE_TO_DETACH_FROM_NVMF)$|VOLUME_(NOT_FOUND|UNMOUNT_FAILURE)$/,
  },
  "no answer from PoseidonOS": { code: "UNAVAILABLE", passing: true, numbers: [11000, 11020, 12010], events: never },
  "internal failure": {
    code: "UNAVAILABLE",
    passing: true,
    numbers: [1817, 1820, 1825, 1842, 1851, 1857],
    events: never,
  },
  "unknown": { code: "INTERNAL", passing: false, numbers: [], events: never },
};

/** What a status code other than 0 means. */
export function meaningOf(number: number, eventName: string): Meaning {
  const all = Object.entries(readings) as readonly (readonly [Meaning, Reading])[];
  const byName = eventName === "" ? undefined : all.find(([, { events }]) => events.test(eventName));
  return (byName ?? all.find(([, { numbers }]) => numbers.includes(number)))?.[0] ?? "unknown";
}

/** Our code for a meaning, and whether the same request may succeed in a moment. */
export function readingOf(meaning: Meaning): { readonly code: StatusCode; readonly passing: boolean } {
  return readings[meaning];
}

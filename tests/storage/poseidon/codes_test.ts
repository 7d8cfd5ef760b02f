/** The meaning of PoseidonOS' status codes. */
import { strictEqual } from "node:assert/strict";
import { meaningOf } from "../../../lib/storage/poseidon/codes.ts";

for (
  const [number, event, meaning] of [
    [1807, "VOL_NOT_FOUND", "no such volume"],
    [2010, "", "no such volume"],
    [9999, "VOL_NOT_FOUND", "no such volume"],
    [1224, "", "busy"],
    [1030, "", "busy"],
    [1859, "", "unknown"],
    [1859, "VOL_REQ_REJECTED_IN_BROKEN_ARRAY", "storage fault"],
    [1855, "UNMOUNT_VOL_CAN_ONLY_BE_WHILE_ONLINE", "array not mounted"],
    [2028, "", "array not mounted"],
    [11020, "", "no answer from PoseidonOS"],
    [-32603, "", "unknown"],
  ] as const
) {
  Deno.test(`meaningOf ${number} ${event} is "${meaning}"`, () => {
    strictEqual(meaningOf(number, event), meaning);
  });
}

/** StorageClass parameters of PoseidonOS volumes, and their sizes. */
import { rejects, strictEqual, throws } from "node:assert/strict";
import { volumeSize } from "../../../lib/storage/poseidon/parameters.ts";
import { poseidonParameters } from "../../support/poseidon.ts";
import { failsWith, mib, none, startPoseidonBackend, within } from "../../support/backends.ts";

for (
  const [what, requiredBytes, limitBytes, expected] of [
    ["no size", 0n, 0n, mib],
    ["one byte", 1n, 0n, mib],
    ["exactly 1 MiB", mib, mib, mib],
    ["a byte more than 1 MiB", mib + 1n, 0n, 2n * mib],
    ["a limit alone", 0n, 5n * mib, mib],
  ] as const
) {
  Deno.test(`volumeSize of ${what} is ${expected} bytes on PoseidonOS`, () => {
    strictEqual(volumeSize(within(1000), { requiredBytes, limitBytes }), expected);
  });
}

for (
  const [what, requiredBytes, limitBytes, code, message] of [
    ["a negative size", -1n, 0n, "INVALID_ARGUMENT", /negative/],
    ["a limit below the size", 2n * mib, mib, "INVALID_ARGUMENT", /limit_bytes 1048576 is below required_bytes/],
    ["a limit that rounding passes", mib + 1n, mib + 2n, "OUT_OF_RANGE", /2097152 bytes are above limit_bytes/],
    ["more than a JSON number can say", 1n << 54n, 0n, "OUT_OF_RANGE", /too many for PoseidonOS/],
  ] as const
) {
  Deno.test(`volumeSize of ${what} is refused on PoseidonOS`, () => {
    throws(() => volumeSize(within(1000), { requiredBytes, limitBytes }), failsWith(code, message));
  });
}

for (
  const [change, message] of [
    [{ targetAddress: undefined }, /"targetAddress" is missing/],
    [{ targetAddress: "fd00::1" }, /"targetAddress" "fd00::1" is an IPv6 address: PoseidonOS listens on IPv4/],
    [{ targetAddress: "pos1" }, /"targetAddress" "pos1" is not an IPv4 address/],
    [{ targetAddress: "" }, /"targetAddress" "" is not an IPv4 address/],
    [{ transportType: "rdma" }, /"transportType" "rdma" is not tcp/],
    [{ transportServiceId: "0" }, /"transportServiceId" "0" is not a port/],
    [{ provisionerIP: undefined }, /"provisionerIP" is missing/],
    [{ provisionerIP: "http:\/\/x" }, /"provisionerIP" "http:\/\/x" is not an address/],
    [{ provisionerPort: "70000" }, /"provisionerPort" "70000" is not a port/],
    [{ arrayName: undefined }, /"arrayName" is missing/],
    [{ arrayName: "a" }, /"arrayName" "a" is not the name of an array/],
    [{ fsType: "ext3" }, /"fsType" "ext3" is not ext4, xfs or btrfs/],
    [{ maxiops: "5" }, /"maxiops" "5" is not 0 or a number of thousands of I\/O per second from 10/],
    [{ maxbw: "fast" }, /"maxbw" "fast" is not 0 or a number of MiB per second from 10/],
    [{ nqnName: "x" }, /"nqnName" unknown \(known: provisionerIP, /],
  ] as const
) {
  Deno.test(`CreateVolume on PoseidonOS refuses the StorageClass parameters ${JSON.stringify(change)}`, async () => {
    await using t = await startPoseidonBackend();
    const parameters = Object.fromEntries(
      Object.entries({ ...poseidonParameters(t.sim), ...change }).filter(([, value]) => value !== undefined),
    ) as Record<string, string>;

    const created = t.backend.createVolume(within(5000), none, { ...t.request(), parameters });

    await rejects(
      created,
      failsWith("INVALID_ARGUMENT", /^Cannot create volume "pvc-1": StorageClass parameter /, message),
    );
    strictEqual(t.sim.control.callsInAll(), 0);
  });
}

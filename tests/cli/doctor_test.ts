/** `lbcsi doctor` as a process. */
import { deepStrictEqual, match, ok, strictEqual } from "node:assert/strict";
import { nodeId } from "../support/doctor_machine.ts";
import { finished, lbcsiCommand } from "../support/lbcsi.ts";
import { startSimulator } from "../support/simulator.ts";

async function runDoctor(args: readonly string[], input?: string) {
  const child = lbcsiCommand(["doctor", ...args], {}, "piped").spawn();
  const writer = child.stdin.getWriter();
  if (input !== undefined) await writer.write(new TextEncoder().encode(input));
  await writer.close();
  return await finished(child);
}

Deno.test("lbcsi doctor checks a cluster with a token from a pipe, and ends with 0 when it finds no problem", async () => {
  await using simulator = await startSimulator();
  const { grpcs, ca = "", jwt } = simulator.addresses;
  const caPath = await Deno.makeTempFile({ prefix: "lbcsi-doctor-" });
  try {
    await Deno.writeTextFile(caPath, ca);
    const args = ["--checks", "cluster", "--mgmt-endpoint", grpcs.join(","), "--mgmt-ca", caPath];

    const { code, out, err } = await runDoctor([...args, "--jwt-path", "/dev/stdin", "--json"], `${jwt}\n`);

    strictEqual(code, 0, out + err);
    const { problems, checks } = JSON.parse(out);
    deepStrictEqual([problems, checks.length > 8], [0, true]);
    strictEqual(err, "");
    ok(!out.includes(jwt));
  } finally {
    await Deno.remove(caPath);
  }
});

Deno.test("promise 21: lbcsi doctor ends with 1 on a machine without nvme_tcp", async () => {
  const empty = await Deno.makeTempDir({ prefix: "lbcsi-doctor-" });
  try {
    const { code, out } = await runDoctor(["--node-id", nodeId, "--sysfs", empty, "--dev", empty]);

    strictEqual(code, 1);
    match(out, /^machine$/m);
    match(out, /PROBLEM +NVMe\/TCP +the kernel module nvme_tcp is not loaded/);
    match(out, /^cluster\n {2}not checked +cluster +neither --config nor --mgmt-endpoint is given$/m);
    match(out, /^\d+ problems?, \d+ warnings?, \d+ ok, \d+ not checked$/m);
  } finally {
    await Deno.remove(empty, { recursive: true });
  }
});

for (
  const [args, message] of [
    [["--checks", "cluster"], /--checks cluster needs --config or --mgmt-endpoint/],
    [["--node-id", "a b"], /--node-id "a b": only letters, digits/],
    [["--mgmt-endpoint", "nowhere"], /--mgmt-endpoint "nowhere": "nowhere" is not host:port/],
    [["--backend=poseidon", "--mgmt-endpoint", "a:1,b:1"], /--mgmt-endpoint: a PoseidonOS has one DAgent/],
    [["--backend=poseidon", "--mgmt-endpoint", "a:1", "--mgmt-ca", "/x"], /--mgmt-ca cannot be used with PoseidonOS/],
    [["--config", "/none.yaml"], /Cannot use cluster file \/none\.yaml/],
  ] as const
) {
  Deno.test(`lbcsi doctor ${args.join(" ")} ends with 2 and says why`, async () => {
    const { code, err } = await runDoctor(args);

    strictEqual(code, 2, err);
    match(err, message);
  });
}

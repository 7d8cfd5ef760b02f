import assert from "node:assert/strict";
import { join } from "node:path";
import { lbcsiCommand } from "../support/lbcsi.ts";
import { eventually } from "../support/simulator.ts";

Deno.test("promise 21: lbcsi node and discovery-client log each problem of the machine once, while they serve", async () => {
  for (const command of ["node", "discovery-client"]) {
    const directory = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-shell-" }));
    for (const name of ["bin", "dev", "sys", "discovery.d"]) await Deno.mkdir(join(directory, name));
    const endpoint = ["--node-id", "n1.node", "--endpoint", `unix://${directory}/csi.sock`];
    const process = lbcsiCommand([
      command,
      ...["--sysfs", join(directory, "sys"), "--dev", join(directory, "dev")],
      ...["--discovery-dir", join(directory, "discovery.d")],
      ...command === "node" ? endpoint : [],
    ], { PATH: join(directory, "bin") }).spawn();
    const lines: { event: string; level: string; name?: string; error?: string }[] = [];
    const reading = (async () => {
      let rest = "";
      for await (const part of process.stderr.pipeThrough(new TextDecoderStream())) {
        const whole = (rest + part).split("\n");
        rest = whole.pop() ?? "";
        for (const line of whole) lines.push(JSON.parse(line));
      }
    })();
    const problems = () => lines.filter(({ event }) => event === "found a problem with this machine");
    const expected = command === "node" ? "mount tools" : "nvme-cli";

    await eventually("it names the tools", () => problems().some(({ name }) => name === expected), 60_000);
    process.kill("SIGTERM");
    await reading;

    assert.equal((await process.status).code, 0);
    const names = problems().map(({ name }) => name);
    assert.equal(new Set(names).size, names.length);
    assert.equal(names.includes("NVMe/TCP"), false);
    const order = lines.map(({ event }) => event);
    assert.ok(
      order.findIndex((event) => /^(serves|watches)$/.test(event)) < order.indexOf("found a problem with this machine"),
    );
    await Deno.remove(directory, { recursive: true });
  }
});

import assert from "node:assert/strict";
import { readDiscoveryLog } from "../../../lib/host/nvme/discovery_log.ts";
import { discoveryNqn } from "../../../lib/host/nvme/controllers.ts";
import { nqn } from "../../support/discovery.ts";
import { FakeHost } from "../../support/fake_host.ts";
import { callContext, rejects } from "../../support/node_calls.ts";

Deno.test("readDiscoveryLog returns I/O controllers and referrals over TCP", async () => {
  const host = new FakeHost();
  // Output of nvme-cli 2.3, shortened. The first record is the controller that answers.
  const record = (subtype: string, traddr: string, trtype = "tcp") => ({
    trtype,
    adrfam: "ipv4",
    subtype,
    treq: "not specified, sq flow control disable supported",
    portid: 1,
    trsvcid: "4420",
    subnqn: subtype === "nvme subsystem" ? nqn : discoveryNqn,
    traddr,
    eflags: "none",
    sectype: "none",
  });
  const records = [
    record("current discovery subsystem", "192.0.2.1"),
    record("nvme subsystem", "192.0.2.2"),
    record("nvme subsystem", "nn-0x1:pn-0x2", "fc"),
    record("nvme subsystem", "  "),
    record("discovery subsystem referral", "2001:db8::1"),
  ];
  host.answers.set("nvme discover", { stdout: JSON.stringify({ genctr: 7, records }) });
  host.connect(nqn);
  const [controller] = host.controllers;
  assert.ok(controller);

  const log = await readDiscoveryLog(host, callContext(), {
    ...controller,
    isDiscovery: true,
    transport: "tcp",
    address: "",
  });

  assert.deepEqual(log, {
    generation: 7n,
    controllers: [{ subsystemNqn: nqn, address: { traddr: "192.0.2.2", trsvcid: "4420" } }],
    referrals: [{ traddr: "2001:db8::1", trsvcid: "4420" }],
  });
  for (
    const [answer, code, message] of [
      [{ code: 1, stderr: "Failed to open ctrl nvme0, errno 11\nfailed\n" }, "UNAVAILABLE", /errno 11; failed$/],
      [{ code: 1 }, "UNAVAILABLE", /nvme exits 1$/],
      [{ stdout: "Discovery Log Number of Records 0" }, "INTERNAL", /nvme-cli's answer is not JSON$/],
      [{ stdout: '{"records":[]}' }, "INTERNAL", /not understood \(genctr: /],
    ] as const
  ) {
    host.answers.set("nvme discover", answer);
    await rejects(
      readDiscoveryLog(host, callContext(), { ...controller, isDiscovery: true, transport: "tcp", address: "a" }),
      code,
      message,
    );
  }
});

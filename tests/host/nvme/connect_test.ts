import assert from "node:assert/strict";
import { connectController } from "../../../lib/host/nvme/connect.ts";
import { connectedHost } from "../../support/fake_disk.ts";
import { callContext } from "../../support/node_calls.ts";
import { nqn } from "../../support/sysfs_tree.ts";

const options = {
  address: { traddr: "192.0.2.1", trsvcid: "4420" },
  subsystemNqn: nqn,
  hostNqn: "nqn.host",
  hostId: "f4c1fb1c-0d56-4d0a-9d5d-9c36ed1ffa0c",
};

const notAllowed = "not allowed: the subsystem is unknown there or has no access for host NQN nqn.host";

const mayNot =
  "; this process may not use nvme-fabrics: root is needed, in a container a privileged one, and a security " +
  "module such as SELinux can forbid it too";

const isNotLoaded = "; the kernel module nvme_tcp is not loaded";

// What nvme-cli 2.3 and 2.13 say, exit 1 each time: 2.3 writes the kernel's word and its own, 2.13 most often its own alone.
const failures: readonly [string, string | undefined][] = [
  ["already connected\n", undefined],
  ["Failed to write to /dev/nvme-fabrics: Operation already in progress\n", undefined],
  ["Failed to write to /dev/nvme-fabrics: Connection refused\n", "refused, nothing listens there"],
  ["could not add new controller: connection refused\n", "refused, nothing listens there"],
  ["Failed to write to /dev/nvme-fabrics: Input/output error\n", notAllowed],
  [
    "Failed to write to /dev/nvme-fabrics: Input/output error\n" +
    "could not add new controller: failed to write to nvme-fabrics device\n",
    notAllowed,
  ],
  [
    "Failed to write to /dev/nvme-fabrics: Connection timed out\n",
    "no way there (Failed to write to /dev/nvme-fabrics: Connection timed out)",
  ],
  [
    "Failed to write to /dev/nvme-fabrics: No route to host\n" +
    "could not add new controller: failed to write to nvme-fabrics device\n",
    "no way there (Failed to write to /dev/nvme-fabrics: No route to host; " +
    "could not add new controller: failed to write to nvme-fabrics device)",
  ],
  [
    "Failed to write to /dev/nvme-fabrics: Connection reset by peer\n" +
    "could not add new controller: failed to write to nvme-fabrics device\n",
    "Failed to write to /dev/nvme-fabrics: Connection reset by peer; " +
    "could not add new controller: failed to write to nvme-fabrics device",
  ],
  [
    "Failed to open /dev/nvme-fabrics: No such file or directory\n",
    `Failed to open /dev/nvme-fabrics: No such file or directory${isNotLoaded}`,
  ],
  [
    "Failed to scan topology: No such file or directory\n",
    `Failed to scan topology: No such file or directory${isNotLoaded}`,
  ],
  [
    "Failed to open /dev/nvme-fabrics: No such device\ncould not add new controller: failed to open nvme-fabrics device\n",
    "Failed to open /dev/nvme-fabrics: No such device; could not add new controller: failed to open nvme-fabrics device" +
    isNotLoaded,
  ],
  [
    "Failed to open /dev/nvme-fabrics: Permission denied\n",
    `Failed to open /dev/nvme-fabrics: Permission denied${mayNot}`,
  ],
  [
    "Failed to open /dev/nvme-fabrics: Operation not permitted\n" +
    "could not add new controller: failed to open nvme-fabrics device\n",
    "Failed to open /dev/nvme-fabrics: Operation not permitted; " +
    `could not add new controller: failed to open nvme-fabrics device${mayNot}`,
  ],
  [
    "Failed to open /dev/nvme-fabrics: Too many open files\n",
    "Failed to open /dev/nvme-fabrics: Too many open files",
  ],
  [
    "Failed to write to /dev/nvme-fabrics: Invalid argument\n",
    "Failed to write to /dev/nvme-fabrics: Invalid argument",
  ],
  [
    "could not add new controller: invalid arguments/configuration\n",
    "could not add new controller: invalid arguments/configuration",
  ],
  [
    "could not add new controller: pre-shared TLS key is missing\n",
    "in-band authentication (DH-HMAC-CHAP) is demanded there, and no key is given (in-band-auth)",
  ],
  ["", "nvme connect exits 1"],
];

for (const [stderr, reason] of failures) {
  Deno.test(`connectController explains "${stderr.trim()}"`, async () => {
    const host = connectedHost();
    host.answers.set("nvme connect", { code: 1, stderr });

    assert.equal(await connectController(host, callContext(), options), reason);
    assert.deepEqual(host.commands, [
      `nvme connect --transport=tcp --traddr=192.0.2.1 --trsvcid=4420 --nqn=${nqn} --hostnqn=nqn.host ` +
      `--hostid=f4c1fb1c-0d56-4d0a-9d5d-9c36ed1ffa0c`,
    ]);
  });
}

Deno.test("connectController keeps what nvme-cli says on its standard output", async () => {
  const host = connectedHost();
  host.answers.set("nvme connect", { code: 1, stdout: "Failed to create topology root: Cannot allocate memory\n" });

  assert.equal(
    await connectController(host, callContext(), options),
    "Failed to create topology root: Cannot allocate memory",
  );
});

// nvme-cli 2.11 to 2.16 keep the kernel's reason to themselves.
for (
  const [answer, reason] of [
    ["Connection timed out (os error 110)", "no way there (Connection timed out (os error 110))"],
    ["No route to host (os error 113)", "no way there (No route to host (os error 113))"],
    ["Input/output error (os error 5)", notAllowed],
    [
      "Permission denied (os error 13): open '/dev/nvme-fabrics'",
      `Permission denied (os error 13): open '/dev/nvme-fabrics'${mayNot}`,
    ],
    ["Broken pipe (os error 32)", "Broken pipe (os error 32)"],
    [
      "No such file or directory (os error 2): open '/dev/nvme-fabrics'",
      "could not add new controller: failed to write to nvme-fabrics device; the kernel log (dmesg) tells why",
    ],
    [undefined, undefined],
  ] as const
) {
  Deno.test(`connectController asks the kernel where nvme-cli gives no reason: ${answer ?? "connected"}`, async () => {
    const host = connectedHost();
    host.controllers.splice(0);
    host.answers.set("nvme connect", {
      code: 1,
      stderr: "could not add new controller: failed to write to nvme-fabrics device\n",
    });
    if (answer !== undefined) host.answers.set("connect 192.0.2.1", { stderr: answer });

    assert.equal(await connectController(host, callContext(), { ...options, keepAliveSeconds: 10 }), reason);

    assert.deepEqual(host.commands.slice(1), [
      `/dev/nvme-fabrics: nqn=${nqn},transport=tcp,traddr=192.0.2.1,trsvcid=4420,hostnqn=nqn.host,` +
      `hostid=${options.hostId},keep_alive_tmo=10`,
    ]);
    assert.equal(host.controllers.length, answer === undefined ? 1 : 0);
  });
}

import assert from "node:assert/strict";
import {
  formatAddress,
  fromPublishContext,
  hostNqn,
  nodeIdOf,
  nodeIdProblem,
  parseAddress,
  type RemoteNamespace,
  toPublishContext,
} from "../lib/namespace.ts";

const namespace: RemoteNamespace = {
  uuid: "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10",
  subsystemNqn: "nqn.2014-08.org.nvmexpress:uuid:x",
  addresses: [{ traddr: "192.0.2.1", trsvcid: "4420" }, { traddr: "2001:db8::1", trsvcid: "4420" }],
  discovery: [{ traddr: "192.0.2.1", trsvcid: "8009" }],
};

for (
  const [text, traddr, trsvcid] of [
    ["192.0.2.1:4420", "192.0.2.1", "4420"],
    ["0.0.0.0:1", "0.0.0.0", "1"],
    ["255.255.255.255:65535", "255.255.255.255", "65535"],
    ["[2001:db8::1]:4420", "2001:db8::1", "4420"],
    ["[::1]:4420", "::1", "4420"],
    ["[::ffff:192.0.2.1]:4420", "::ffff:192.0.2.1", "4420"],
    ["[fe80::1%eth0]:4420", "fe80::1%eth0", "4420"],
  ] as const
) {
  Deno.test(`parseAddress takes ${text} and formatAddress gives it back`, () => {
    const address = parseAddress(text);

    assert.deepEqual(address, { traddr, trsvcid });
    assert.equal(address && formatAddress(address), text);
  });
}

Deno.test("parseAddress prints ports without leading zeros", () => {
  assert.deepEqual(parseAddress("192.0.2.1:04420"), { traddr: "192.0.2.1", trsvcid: "4420" });
});

for (
  const text of [
    "",
    ":",
    "192.0.2.1",
    "192.0.2.1:",
    ":4420",
    "192.0.2.1:0",
    "192.0.2.1:65536",
    "192.0.2.1:-1",
    "192.0.2.1:4420 ",
    " 192.0.2.1:4420",
    "192.0.2.1:4420\n",
    "192.0.2:4420",
    "192.0.2.256:4420",
    "192.0.2.1.:4420",
    "1.2.3.4.5:4420",
    "01.2.3.4:4420",
    "host:4420",
    "host.example:4420",
    "2001:db8::1:4420",
    "[2001:db8::1]",
    "[2001:db8::1]4420",
    "[192.0.2.1]:4420",
    "[]:4420",
    "[::g]:4420",
    "[:::]:4420",
    "[1:2:3:4:5:6:7:8:9]:4420",
    "[::1]:0",
    "[::1]:99999",
    "[fe80::1%]:4420",
    "[fe80::1%a b]:4420",
    "192.0.2.1:4420,192.0.2.2:4420",
    "192.0.2.1:x",
    "tcp://192.0.2.1:4420",
  ]
) {
  Deno.test(`parseAddress answers undefined to ${JSON.stringify(text)}`, () => {
    assert.equal(parseAddress(text), undefined);
  });
}

Deno.test("fromPublishContext reads what toPublishContext wrote", () => {
  assert.deepEqual(fromPublishContext(toPublishContext(namespace)), namespace);
  const bare = { ...namespace, addresses: [], discovery: [] };
  assert.deepEqual(fromPublishContext(toPublishContext(bare)), bare);
});

Deno.test("toPublishContext keeps its keys: VolumeAttachment objects of earlier versions hold them", () => {
  assert.deepEqual(toPublishContext(namespace), {
    format: "lbcsi/1",
    uuid: "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10",
    "subsystem-nqn": "nqn.2014-08.org.nvmexpress:uuid:x",
    addresses: "192.0.2.1:4420,[2001:db8::1]:4420",
    discovery: "192.0.2.1:8009",
  });
});

Deno.test("fromPublishContext answers undefined for the context of another driver", () => {
  assert.equal(fromPublishContext({}), undefined);
  assert.equal(fromPublishContext({ other: "key" }), undefined);
});

Deno.test("fromPublishContext lowers the case of the UUID and ignores keys of a later version", () => {
  const context = { ...toPublishContext(namespace), uuid: namespace.uuid.toUpperCase(), later: "x" };

  assert.deepEqual(fromPublishContext(context), namespace);
});

for (
  const [what, change, message] of [
    ["another format", { format: "lbcsi/2" }, /^Cannot read the publish context: format: /],
    ["no UUID", { uuid: "" }, /^Cannot read the publish context: uuid: /],
    ["a UUID without dashes", { uuid: namespace.uuid.replaceAll("-", "") }, /^Cannot read the publish context: uuid: /],
    ["no NQN", { "subsystem-nqn": "" }, /^Cannot read the publish context: subsystem-nqn: /],
    ["something else than an NQN", { "subsystem-nqn": "iqn.x" }, /: subsystem-nqn: /],
    ["an NQN of two lines", { "subsystem-nqn": "nqn.x\n-t tcp" }, /: subsystem-nqn: is not an NQN/],
    [
      "an NQN with an option of the kernel",
      { "subsystem-nqn": "nqn.x,hostnqn=nqn.y" },
      /: subsystem-nqn: is not an NQN/,
    ],
    ["an NQN with a blank", { "subsystem-nqn": "nqn.x y" }, /: subsystem-nqn: is not an NQN/],
    ["an NQN with a comment", { "subsystem-nqn": "nqn.x#y" }, /: subsystem-nqn: is not an NQN/],
    ["an NQN of 224 characters", { "subsystem-nqn": `nqn.${"x".repeat(220)}` }, /: subsystem-nqn: /],
    [
      "a host name as address",
      { addresses: "192.0.2.1:4420,node:4420" },
      /^Cannot read the publish context: addresses has "node:4420", an IP address with a port is needed$/,
    ],
    [
      "an empty discovery address",
      { discovery: "192.0.2.1:8009," },
      /^Cannot read the publish context: discovery has "", an IP address with a port is needed$/,
    ],
  ] as const
) {
  Deno.test(`fromPublishContext answers INVALID_ARGUMENT to ${what}`, () => {
    assert.throws(() => fromPublishContext({ ...toPublishContext(namespace), ...change }), {
      name: "StatusError",
      code: "INVALID_ARGUMENT",
      message,
    });
  });
}

for (const key of ["uuid", "subsystem-nqn", "addresses", "discovery"]) {
  Deno.test(`fromPublishContext answers INVALID_ARGUMENT to a context of ours without ${key}`, () => {
    const { [key]: _, ...rest } = toPublishContext(namespace);

    assert.throws(() => fromPublishContext(rest), { code: "INVALID_ARGUMENT", message: new RegExp(`: ${key}: `) });
  });
}

Deno.test("hostNqn has the incumbent driver's prefix, and nodeIdOf takes it away again", () => {
  assert.equal(hostNqn("node-1.example"), "nqn.2019-09.com.lightbitslabs:host:node-1.example");
  assert.equal(nodeIdOf("nqn.2019-09.com.lightbitslabs:host:node-1.example"), "node-1.example");
  assert.equal(nodeIdOf("nqn.2014-08.org.nvmexpress:uuid:x"), "nqn.2014-08.org.nvmexpress:uuid:x");
});

Deno.test("nodeIdProblem takes names of Kubernetes nodes, up to an NQN of 223 bytes", () => {
  const longest = "n".repeat(188);

  for (const nodeId of ["a", "node-1.example", "NODE", "10.0.0.1", longest]) {
    assert.equal(nodeIdProblem(nodeId), undefined);
  }
  assert.equal(hostNqn(longest).length, 223);
  assert.equal(nodeIdProblem(`${longest}n`), "it has 189 characters, 188 are allowed");
});

Deno.test("nodeIdProblem says what is wrong", () => {
  assert.equal(nodeIdProblem(""), "it is empty");
  for (const nodeId of ["a b", "a_b", "a:b", "a/b", "ä", "a\n", "a,b"]) {
    assert.equal(nodeIdProblem(nodeId), `only letters, digits, "." and "-" are allowed`, nodeId);
  }
});

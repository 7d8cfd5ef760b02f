import assert from "node:assert/strict";
import { type Entry, parseInput } from "../../lib/discovery/entries.ts";
import {
  hostIdFor,
  type LogPage,
  placeOf,
  planConnections,
  type PlanInput,
  subsystemsOf,
} from "../../lib/discovery/plan.ts";
import { hostIdOf } from "../../lib/host/attach/attacher.ts";
import { discoveryNqn, type NvmeController } from "../../lib/host/nvme/controllers.ts";
import { formatAddress, parseAddress, type TransportAddress } from "../../lib/namespace.ts";
import { entry, hostId, nqn, otherNqn, us } from "../support/discovery.ts";

const stranger = "nqn.2014-08.org.nvmexpress:uuid:4d0a9d5d-0000-4000-8000-000000000000";

function at(address: string): TransportAddress {
  return parseAddress(address) ?? assert.fail(`${address} is not an address`);
}

/** A connection of the kernel; the name decides whether it is a discovery connection. */
function controller(name: string, address: string, more: Partial<NvmeController> = {}): NvmeController {
  const { traddr, trsvcid } = at(address);
  const isDiscovery = trsvcid === "8009";
  return {
    name,
    state: "live",
    subsystemNqn: isDiscovery ? discoveryNqn : nqn,
    hostNqn: us,
    hostId,
    isDiscovery,
    transport: "tcp",
    address: `traddr=${traddr},trsvcid=${trsvcid}`,
    ...more,
  };
}

/** A log page of 192.0.2.1:8009, read over nvme0 at 0 ms. */
function page(
  controllers: readonly string[],
  more: Partial<LogPage> & { readonly referrals?: readonly string[] } = {},
) {
  const { referrals = [], ...rest } = more;
  return {
    log: {
      generation: 1n,
      controllers: controllers.map((address) => ({ subsystemNqn: nqn, address: at(address) })),
      referrals: referrals.map(at),
    },
    controller: "nvme0",
    readAt: 0,
    isFresh: true,
    ...rest,
  };
}

const source = (address: string) => `${us} discovery ${address}`;

/** The input of a machine whose only file names the discovery controller 192.0.2.1:8009 for `nqn`. */
function input(more: Partial<PlanInput> & { readonly text?: string } = {}): PlanInput {
  const { text = entry(), ...rest } = more;
  const { entries } = parseInput(text);
  const subsystems = subsystemsOf(entries);
  return {
    subsystems,
    addresses: new Map(entries.map((one): [Entry, TransportAddress] => [one, one])),
    pages: new Map(),
    controllers: [],
    outdated: new Set(),
    managed: new Set(subsystems.keys()),
    stuckSince: new Map(),
    nowMs: 0,
    pollMs: 10_000,
    ...rest,
  };
}

/** The plan in short: actions with addresses, names of what may be dropped. */
function plan(more: Parameters<typeof input>[0] = {}) {
  const { sources, paths, unlisted, released, unnamed, ...rest } = planConnections(input(more));
  return {
    sources: sources.map(({ source, action, controller, surplus }) =>
      [action, formatAddress(source.address), controller?.name, ...surplus.map(({ name }) => `-${name}`)].join(" ")
        .trim()
    ),
    paths: paths.map(({ action, address, outdated }) =>
      [action, formatAddress(address), outdated?.name].join(" ").trim()
    ),
    unlisted: unlisted.map(({ name }) => name),
    unnamed: unnamed.map(({ name }) => name),
    released,
    ...rest,
  };
}

Deno.test("planConnections connects a discovery controller that a file names, and nothing else", () => {
  const { sources, paths, unlisted, unnamed, released } = plan();

  assert.deepEqual(sources, ["connect 192.0.2.1:8009"]);
  assert.deepEqual([paths, unlisted, unnamed, released], [[], [], [], []]);
});

Deno.test("planConnections reads a log page that is new, old, or of another connection", () => {
  const controllers = [controller("nvme0", "192.0.2.1:8009")];
  const cases: [Partial<LogPage> | undefined, number, string][] = [
    [undefined, 0, "read"],
    [{}, 9_999, "wait"],
    [{}, 10_000, "read"],
    [{ controller: "nvme7" }, 0, "read"],
    [{ isFresh: false }, 0, "read"],
  ];
  for (const [more, nowMs, action] of cases) {
    const pages = new Map(more === undefined ? [] : [[source("192.0.2.1:8009"), page([], more)] as const]);
    assert.deepEqual(plan({ controllers, pages, nowMs }).sources, [`${action} 192.0.2.1:8009 nvme0`]);
  }
});

Deno.test("planConnections keeps the live connection with the lowest number of several to one discovery controller", () => {
  const { sources } = plan({
    controllers: [
      controller("nvme1", "192.0.2.1:8009", { state: "connecting" }),
      controller("nvme10", "192.0.2.1:8009"),
      controller("nvme9", "192.0.2.1:8009"),
    ],
  });

  assert.deepEqual(sources, ["read 192.0.2.1:8009 nvme9 -nvme10 -nvme1"]);
});

Deno.test("planConnections replaces a discovery connection that was not live for two minutes", () => {
  const controllers = [controller("nvme0", "192.0.2.1:8009", { state: "connecting" })];
  const first = plan({ controllers, nowMs: 5 });
  assert.deepEqual([first.sources, [...first.stuckSince.values()]], [["wait 192.0.2.1:8009 nvme0"], [5]]);
  assert.deepEqual([...first.stale], [source("192.0.2.1:8009")]);

  const { stuckSince } = first;
  assert.deepEqual(plan({ controllers, nowMs: 120_004, stuckSince }).sources, ["wait 192.0.2.1:8009 nvme0"]);
  assert.deepEqual(plan({ controllers, nowMs: 120_005, stuckSince }).sources, ["replace 192.0.2.1:8009 nvme0"]);
  const healed = plan({ controllers: [controller("nvme0", "192.0.2.1:8009")], nowMs: 120_005, stuckSince });
  assert.equal(healed.stuckSince.size, 0);
});

Deno.test("planConnections connects each listed I/O controller of a requested subsystem that has no usable connection", () => {
  const { log, ...facts } = page(["192.0.2.1:4420", "192.0.2.2:4420", "192.0.2.3:4420", "192.0.2.4:4420"]);
  const others = [{ subsystemNqn: otherNqn, address: at("192.0.2.5:4420") }];
  const { paths, listed } = plan({
    pages: new Map([[source("192.0.2.1:8009"), {
      ...facts,
      log: { ...log, controllers: [...log.controllers, ...others] },
    }]]),
    controllers: [
      controller("nvme0", "192.0.2.1:8009"),
      controller("nvme1", "192.0.2.1:4420"),
      controller("nvme2", "192.0.2.2:4420", { state: "deleting" }),
      controller("nvme3", "192.0.2.3:4420", { hostNqn: stranger }),
      controller("nvme4", "192.0.2.4:4420", { state: "connecting" }),
    ],
  });

  assert.deepEqual(paths, [
    "keep 192.0.2.1:4420",
    "connect 192.0.2.2:4420",
    "connect 192.0.2.3:4420",
    "keep 192.0.2.4:4420",
  ]);
  assert.deepEqual([...listed][0], `${us} ${nqn} 192.0.2.1:4420`);
});

Deno.test("planConnections lists an address once that two discovery controllers list", () => {
  const { paths } = plan({
    text: entry() + entry("192.0.2.2"),
    pages: new Map([
      [source("192.0.2.1:8009"), page(["192.0.2.1:4420"])],
      [source("192.0.2.2:8009"), page(["192.0.2.1:4420", "192.0.2.2:4420"])],
    ]),
  });

  assert.deepEqual(paths, ["connect 192.0.2.1:4420", "connect 192.0.2.2:4420"]);
});

Deno.test("planConnections replaces a connection with other keys, unless one with the right keys is beside it", () => {
  const pages = new Map([[source("192.0.2.1:8009"), page(["192.0.2.1:4420"])]]);
  const controllers = [controller("nvme1", "192.0.2.1:4420"), controller("nvme2", "192.0.2.1:4420")];

  assert.deepEqual(plan({ pages, controllers, outdated: new Set(["nvme1", "nvme2"]) }).paths, [
    "replace 192.0.2.1:4420 nvme1",
  ]);
  assert.deepEqual(plan({ pages, controllers, outdated: new Set(["nvme1"]) }).paths, ["keep 192.0.2.1:4420"]);
});

Deno.test("planConnections names an unlisted connection only while it does not work, another one does, and the page is known", () => {
  const discovery = controller("nvme0", "192.0.2.1:8009");
  const lost = controller("nvme1", "192.0.2.9:4420", { state: "connecting" });
  const live = controller("nvme2", "192.0.2.2:4420");
  const pages = new Map([[source("192.0.2.1:8009"), page(["192.0.2.2:4420"])]]);

  assert.deepEqual(plan({ pages, controllers: [discovery, lost, live] }).unlisted, ["nvme1"]);
  assert.deepEqual(plan({ pages, controllers: [discovery, { ...lost, state: "live" }, live] }).unlisted, []);
  assert.deepEqual(plan({ pages, controllers: [discovery, lost] }).unlisted, []);
  assert.deepEqual(plan({ pages, controllers: [lost, live] }).unlisted, [], "the discovery connection is lost");
  assert.deepEqual(plan({ controllers: [discovery, lost, live] }).unlisted, [], "no page was read");
  const empty = new Map([[source("192.0.2.1:8009"), page([])]]);
  assert.deepEqual(plan({ pages: empty, controllers: [discovery, lost, live] }).unlisted, [], "the page lists nothing");
  const theirs = { ...lost, hostNqn: stranger };
  assert.deepEqual(plan({ pages, controllers: [discovery, theirs, live] }).unlisted, []);
});

Deno.test("planConnections follows referrals, also in a circle, and names discovery connections that nothing names", () => {
  const pages = new Map([
    [source("192.0.2.1:8009"), page([], { referrals: ["192.0.2.2:8009"] })],
    [source("192.0.2.2:8009"), page([], { referrals: ["192.0.2.1:8009"], controller: "nvme1" })],
  ]);
  const controllers = [
    controller("nvme0", "192.0.2.1:8009"),
    controller("nvme1", "192.0.2.2:8009"),
    controller("nvme2", "192.0.2.3:8009"),
    controller("nvme3", "192.0.2.3:8009", { hostNqn: stranger }),
  ];

  const { sources, unnamed } = plan({ pages, controllers });
  assert.deepEqual(sources, ["wait 192.0.2.1:8009 nvme0", "wait 192.0.2.2:8009 nvme1"]);
  assert.deepEqual(unnamed, ["nvme2"]);

  pages.delete(source("192.0.2.2:8009"));
  assert.deepEqual(plan({ pages, controllers }).unnamed, [], "the second one may refer to it");
});

Deno.test("planConnections follows at most 64 referrals for a subsystem", () => {
  const referrals = Array.from({ length: 100 }, (_, number) => `198.51.100.${number}:8009`);

  const { sources } = plan({ pages: new Map([[source("192.0.2.1:8009"), page([], { referrals })]]) });

  assert.equal(sources.length, 65);
});

Deno.test("planConnections drops no discovery connection while a host name has no address", () => {
  const text = entry() + entry("c1.example");
  const { entries } = parseInput(text);
  const addresses = new Map(entries.slice(0, 1).map((one): [Entry, TransportAddress] => [one, one]));
  const controllers = [controller("nvme0", "192.0.2.1:8009"), controller("nvme1", "192.0.2.9:8009")];
  const pages = new Map([[source("192.0.2.1:8009"), page([])]]);

  assert.deepEqual(
    planConnections({ ...input({ controllers, pages }), subsystems: subsystemsOf(entries), addresses }).unnamed,
    [],
  );
  assert.deepEqual(plan({ controllers, pages }).unnamed, ["nvme1"]);
});

Deno.test("planConnections releases managed subsystems that no file names, and keeps the others", () => {
  const managed = new Set([`${us} ${nqn}`, `${us} ${otherNqn}`]);

  const { released, unnamed } = plan({ managed, controllers: [controller("nvme1", "192.0.2.1:4420")] });

  assert.deepEqual([released, unnamed], [[`${us} ${otherNqn}`], []]);
  const { released: all, unnamed: rest } = plan({
    text: "",
    managed,
    controllers: [controller("nvme0", "192.0.2.1:8009"), controller("nvme1", "192.0.2.1:4420")],
  });
  assert.deepEqual([all, rest], [[...managed], ["nvme0"]]);
});

Deno.test("planConnections gives the same plan for the same input", () => {
  const more = { controllers: [controller("nvme0", "192.0.2.1:8009", { state: "connecting" })], nowMs: 7 };

  assert.deepEqual(plan(more), plan(more));
});

Deno.test("hostIdFor prefers a host ID in use, then one in a file, then one made from the host NQN", () => {
  const subsystems = [...subsystemsOf(parseInput(entry("192.0.2.1", nqn, ` -I ${hostId}`)).entries).values()];
  const used = controller("nvme0", "192.0.2.1:4420", { hostId: "aaaaaaaa-0000-4000-8000-000000000000" });

  assert.equal(hostIdFor(us, [used], subsystems), used.hostId);
  assert.equal(hostIdFor(us, [{ ...used, hostId: "" }], subsystems), hostId);
  assert.equal(hostIdFor(us, [], []), hostIdOf("n1.node"));
});

Deno.test("placeOf is the address and port, or the text of sysfs where that has none", () => {
  assert.equal(placeOf(controller("nvme0", "192.0.2.1:4420")), "192.0.2.1:4420");
  assert.equal(placeOf(controller("nvme0", "192.0.2.1:4420", { address: "?" })), "?");
});

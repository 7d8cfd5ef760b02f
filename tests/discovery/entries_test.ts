import assert from "node:assert/strict";
import { parseInput } from "../../lib/discovery/entries.ts";
import { discoveryFile } from "../../lib/host/attach/discovery_client.ts";
import { entry, hostId, nqn, us, uuid } from "../support/discovery.ts";

Deno.test("parseInput reads what discoveryFile writes", () => {
  const namespace = {
    uuid,
    subsystemNqn: nqn,
    addresses: [],
    discovery: [{ traddr: "192.0.2.1", trsvcid: "8009" }, { traddr: "2001:db8::1", trsvcid: "8009" }],
  };

  const { entries, skipped } = parseInput(discoveryFile(namespace, us));

  const rest = { trsvcid: "8009", hostNqn: us, subsystemNqn: nqn, hostId: undefined, controllerLossSeconds: undefined };
  assert.deepEqual(entries, [{ traddr: "192.0.2.1", ...rest }, { traddr: "2001:db8::1", ...rest }]);
  assert.deepEqual(skipped, []);
});

Deno.test("parseInput accepts long and short options, '=', comments, and drops duplicates", () => {
  const text = `# all of it
--transport=tcp --traddr=c1.example --trsvcid=08009 --hostnqn=${us} --subsysnqn=${nqn} --hostid=${hostId.toUpperCase()} -p # x
\t-l -1   -t tcp -a 192.0.2.7 -s 8009 -q ${us} -n ${nqn}\r

-t tcp -a 192.0.2.7 -s 8009 -q ${us} -n ${nqn} -l 30`;

  assert.deepEqual(parseInput(text).entries, [
    { traddr: "c1.example", trsvcid: "8009", hostNqn: us, subsystemNqn: nqn, hostId, controllerLossSeconds: undefined },
    {
      traddr: "192.0.2.7",
      trsvcid: "8009",
      hostNqn: us,
      subsystemNqn: nqn,
      hostId: undefined,
      controllerLossSeconds: -1,
    },
  ]);
});

Deno.test("parseInput skips a line that lacks a mandatory option, and keeps the others", () => {
  const { entries, skipped } = parseInput(`-t tcp -a 192.0.2.1 -q ${us}\n${entry()}`);

  assert.equal(entries.length, 1);
  assert.deepEqual(skipped, ["line 1 has no trsvcid, subsysnqn"]);
});

for (
  const [line, problem] of [
    [entry() + "-x 1", /: Cannot read line 2: "-x" is not an option$/],
    [entry() + `--nqn ${nqn}`, /"--nqn" is not an option/],
    [entry() + "nonsense", /"nonsense" is not an option/],
    [entry() + "constructor 1", /"constructor" is not an option/],
    ["-t tcp -a", /-a has no value/],
    [entry().replace("tcp", "rdma"), /transport "rdma" is not tcp/],
    [entry("192.0.2.256"), /traddr "192\.0\.2\.256" is no address/],
    [entry("a_b"), /traddr "a_b" is no address/],
    [entry("-a"), /traddr "-a" is no address/],
    [entry("2001:db8::zz"), /traddr "2001:db8::zz" is no address/],
    [entry().replace("8009", "0"), /trsvcid "0" is no port/],
    [entry().replace("8009", "65536"), /trsvcid "65536" is no port/],
    [entry().replace(nqn, "cluster"), /subsysnqn "cluster" is not an NQN/],
    [entry().replace(us, "nqn." + "x".repeat(220)), /is longer than 223 bytes/],
    [entry("192.0.2.1", nqn, " -I 7"), /hostid "7" is not a UUID/],
    [entry("192.0.2.1", nqn, " -l -2"), /ctrl-loss-tmo "-2" is not a number of seconds, or -1/],
    ["\u0000\u0001\ufffd", /is not an option/],
  ] as const
) {
  Deno.test(`parseInput rejects a whole file that ends in ${JSON.stringify(line.slice(-60))}`, () => {
    assert.throws(() => parseInput(line), problem);
  });
}

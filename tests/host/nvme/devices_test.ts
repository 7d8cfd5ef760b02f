import assert from "node:assert/strict";
import { devicesOf, findDevice } from "../../../lib/host/nvme/devices.ts";
import { rejects } from "../../support/node_calls.ts";
import { blockAttributes, nqn, other, uuid, withSysfs } from "../../support/sysfs_tree.ts";

Deno.test("findDevice describes the namespace with this UUID", async () => {
  await withSysfs({
    ...blockAttributes("nvme3n7"),
    ...blockAttributes("nvme3n8", { wwid: `uuid.${other}`, dev: "259:2" }),
  }, async (host) => {
    assert.deepEqual(await findDevice(host, uuid.toUpperCase(), nqn), {
      name: "nvme3n7",
      path: `${host.roots.dev}/nvme3n7`,
      number: "259:1",
      uuid,
      subsystemNqn: nqn,
      sizeBytes: 1048576n,
      readOnly: false,
    });
    assert.deepEqual((await devicesOf(host, nqn)).map(({ name }) => name), ["nvme3n7", "nvme3n8"]);
  });
});

const notIt: readonly [string, Record<string, string>][] = [
  ["a path of it", blockAttributes("nvme0c0n1", { hidden: "1" })],
  ["a partition of it", blockAttributes("nvme0n1p1")],
  ["a hidden device", blockAttributes("nvme0n1", { hidden: "1" })],
  ["a device whose UUID file shows its NGUID", blockAttributes("nvme0n1", { wwid: `eui.${uuid.replaceAll("-", "")}` })],
  ["a device with another UUID", blockAttributes("nvme0n1", { wwid: `uuid.${other}` })],
  ["a device of another subsystem", blockAttributes("nvme0n1", { "device/subsysnqn": "nqn.other" })],
  ["a device that is half removed", blockAttributes("nvme0n1", { size: undefined })],
  ["a disk that is not NVMe", blockAttributes("sda")],
];

for (const [what, files] of notIt) {
  Deno.test(`promise 3: findDevice does not take ${what} for the namespace`, async () => {
    await withSysfs(files, async (host) => assert.equal(await findDevice(host, uuid, nqn), undefined));
  });
}

Deno.test("promise 3: findDevice refuses to choose between two devices with one UUID", async () => {
  const twin = blockAttributes("nvme1n1", { dev: "259:9", "device/subsysnqn": "nqn.2019-09.com.example:cluster:2" });
  await withSysfs({ ...blockAttributes("nvme0n1"), ...twin }, async (host) => {
    await rejects(
      findDevice(host, uuid),
      "FAILED_PRECONDITION",
      /nvme0n1 \(.*cluster:1\) and nvme1n1 \(.*cluster:2\) both claim/,
    );
    assert.equal((await findDevice(host, uuid, nqn))?.name, "nvme0n1");
  });
});

for (
  const [parameter, reason] of [
    [
      "N",
      /native NVMe multipath is off \(nvme_core.multipath=N\), nvme_core.multipath=Y on the kernel's command line is needed$/,
    ],
    [undefined, /built without native NVMe multipath \(CONFIG_NVME_MULTIPATH\), a kernel with it is needed$/],
    ["Y", /both claim it, one subsystem has to be disconnected$/],
  ] as const
) {
  Deno.test(`findDevice says why two devices of one subsystem claim a UUID: multipath is ${parameter ?? "not built"}`, async () => {
    const module = "module/nvme_core";
    const files = parameter === undefined
      ? { [`${module}/version`]: "1.0" }
      : { [`${module}/parameters/multipath`]: parameter };
    await withSysfs(
      { ...blockAttributes("nvme0n1"), ...blockAttributes("nvme1n1", { dev: "259:9" }), ...files },
      async (host) => {
        await rejects(findDevice(host, uuid), "FAILED_PRECONDITION", reason);
      },
    );
  });
}

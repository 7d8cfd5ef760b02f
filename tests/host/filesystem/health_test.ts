import assert from "node:assert/strict";
import { checkReadable } from "../../../lib/host/filesystem/health.ts";
import { parseMountTable } from "../../../lib/host/mount_table.ts";
import { mountOptions, withDisk } from "../../support/disk.ts";
import { needs } from "../../support/needs.ts";
import { callContext } from "../../support/node_calls.ts";

const ignore = !needs("root", "loop", "mkfs.ext4");

Deno.test({
  name: "promise 29: checkReadable takes one look-up, however many names the root of the volume has",
  ignore,
  fn: () =>
    withDisk(64, async ({ machine, mount, device, path }) => {
      await mount(mountOptions);
      const mounted = parseMountTable(await Deno.readTextFile("/proc/self/mountinfo")).find((one) => one.path === path);
      assert(mounted);
      const looked: string[] = [];
      const host = {
        ...machine.host,
        list: (directory: string) => Promise.reject(new Error(`lists ${directory}`)),
        lookUp: (directory: string) => {
          looked.push(directory);
          return machine.host.lookUp(directory);
        },
      };

      assert.equal(await checkReadable(host, callContext(), await device(), mounted), undefined);
      assert.deepEqual(looked, [path]);
      const broken = { ...host, lookUp: () => Promise.reject(new Error("Input/output error (os error 5)")) };
      assert.match(
        await checkReadable(broken, callContext(), await device(), mounted) ?? "",
        /cannot be read \(Input\/output error/,
      );
    }),
});

/**
 * The kernel's NVMe/TCP target of the guest, by hand: for checks that are about connections and log pages, where a whole
 * simulated cluster would only be in the way. One subsystem, one namespace of 64 MiB in a file, ports on 127.0.0.1.
 *
 * Order and texts as configfs of Linux 6.1 requires them: everything goes in the reverse order in which it came, and an
 * address may change only while its port offers nothing.
 */
import { join } from "node:path";
import type { DhchapKeys } from "../../lib/auth_key.ts";
import { names, tool } from "./testbed.ts";

const root = "/sys/kernel/config/nvmet";

/** A subsystem with a namespace that some hosts may use. Dispose it: nothing of it stays. */
export class Target implements AsyncDisposable {
  readonly nqn: string;
  readonly uuid: string;
  /** What the namespace holds. */
  readonly file: string;
  readonly #ports: number[] = [];
  readonly #hosts: readonly string[];

  constructor(home: string, hostNqns: readonly string[], sizeMib = 64) {
    this.uuid = crypto.randomUUID();
    this.nqn = `nqn.2019-09.org.example:target:${this.uuid.slice(0, 8)}`;
    this.file = join(home, `${this.uuid}.img`);
    this.#hosts = hostNqns;
    Deno.writeFileSync(this.file, new Uint8Array());
    Deno.truncateSync(this.file, sizeMib << 20);
    const subsystem = `${root}/subsystems/${this.nqn}`;
    Deno.mkdirSync(subsystem);
    const namespace = `${subsystem}/namespaces/1`;
    Deno.mkdirSync(namespace);
    for (
      const [attribute, text] of [
        ["device_path", this.file],
        ["device_uuid", this.uuid],
        // A file in memory takes no O_DIRECT.
        ["buffered_io", "1"],
        ["enable", "1"],
      ] as const
    ) write(`${namespace}/${attribute}`, text);
    for (const host of hostNqns) {
      if (!names(`${root}/hosts`).includes(host)) Deno.mkdirSync(`${root}/hosts/${host}`);
      Deno.symlinkSync(`${root}/hosts/${host}`, `${subsystem}/allowed_hosts/${host}`);
    }
  }

  /** Demands this key of a host, and proves that it has the other one when it is asked to. */
  demand(hostNqn: string, keys: DhchapKeys): void {
    write(`${root}/hosts/${hostNqn}/dhchap_key`, keys.host.reveal());
    if (keys.controller !== undefined) write(`${root}/hosts/${hostNqn}/dhchap_ctrl_key`, keys.controller.reveal());
  }

  /** Offers it on a port of this number, at 127.0.0.1:4420+id. */
  offer(id: number): void {
    const port = `${root}/ports/${id}`;
    if (!names(`${root}/ports`).includes(String(id))) {
      Deno.mkdirSync(port);
      const address = { trtype: "tcp", adrfam: "ipv4", traddr: "127.0.0.1", trsvcid: String(4420 + id) };
      for (const [attribute, text] of Object.entries(address)) write(`${port}/addr_${attribute}`, text);
      this.#ports.push(id);
    }
    Deno.symlinkSync(`${root}/subsystems/${this.nqn}`, `${port}/subsystems/${this.nqn}`);
  }

  /** Offers it there no more: connections of this port are cut, and its last subsystem closes the port. */
  withdraw(id: number): void {
    Deno.removeSync(`${root}/ports/${id}/subsystems/${this.nqn}`);
  }

  /** Lets port `from` refer to port `to`. */
  refer(from: number, to: number): void {
    const referral = `${root}/ports/${from}/referrals/to${to}`;
    Deno.mkdirSync(referral);
    const address = { trtype: "tcp", adrfam: "ipv4", traddr: "127.0.0.1", trsvcid: String(4420 + to) };
    for (const [attribute, text] of Object.entries(address)) write(`${referral}/addr_${attribute}`, text);
    write(`${referral}/enable`, "1");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const subsystem = `${root}/subsystems/${this.nqn}`;
    for (const id of this.#ports) {
      const port = `${root}/ports/${id}`;
      for (const referral of names(`${port}/referrals`)) await tool("rmdir", `${port}/referrals/${referral}`);
      for (const nqn of names(`${port}/subsystems`)) if (nqn === this.nqn) this.withdraw(id);
    }
    for (const name of names("/sys/class/nvme")) {
      const nqn = Deno.readTextFileSync(`/sys/class/nvme/${name}/subsysnqn`).trim();
      const isOurs = nqn === this.nqn || nqn.endsWith(".discovery");
      if (isOurs) await tool("nvme", "disconnect", `--device=${name}`);
    }
    for (const id of this.#ports) await tool("rmdir", `${root}/ports/${id}`);
    write(`${subsystem}/namespaces/1/enable`, "0");
    await tool("rmdir", `${subsystem}/namespaces/1`);
    for (const host of this.#hosts) Deno.removeSync(`${subsystem}/allowed_hosts/${host}`);
    await tool("rmdir", subsystem);
    for (const host of this.#hosts) await tool("rmdir", `${root}/hosts/${host}`);
    await Deno.remove(this.file);
  }
}

/** Without a newline: it would become part of a path. */
function write(path: string, text: string): void {
  Deno.writeTextFileSync(path, text, { create: false });
}

/**
 * A small Linux in memory that stands in for the machine under the node service: a mount table, sysfs, files, block
 * devices with file systems, the tools that the driver runs, and a Discovery-Client that connects as soon as it finds a file.
 * It can be cut off at any single call, before or after that call has taken effect, to see whether a repeat converges.
 *
 * Exit codes and texts of the tools are those of util-linux 2.38.1, e2fsprogs 1.47.0, xfsprogs 6.1.0 and nvme-cli 2.3.
 */
import type { CommandResult, Host, PathKind, Roots } from "../../lib/host/host.ts";
import { parseMountTable } from "../../lib/host/mount_table.ts";
import { PendingAnswers } from "../../lib/host/pending.ts";
import { StatusError } from "../../lib/error.ts";

const discoveryNqn = "nqn.2014-08.org.nvmexpress.discovery";

export interface FakeNamespace {
  readonly uuid: string;
  readonly subsystemNqn: string;
  sizeBytes: bigint;
  /** What is on it, size of the file system included; undefined: blank. */
  content: { fsType: string; fsBytes: bigint } | undefined;
  /** What was written to the device itself, by offset. */
  readonly written?: Map<bigint, Uint8Array>;
  /** A LUKS2 header, and what is within. */
  luks?: { label: string; readonly passphrases: Set<string>; readonly inner: FakeNamespace };
}

/** What the header takes of the device. */
const luksHeaderBytes = 16n << 20n;

interface Device {
  readonly name: string;
  readonly number: string;
  readonly namespace: FakeNamespace;
}

interface FakeMount {
  readonly path: string;
  readonly device: Device;
  /** The device node itself, bound to a file. */
  readonly isNode: boolean;
  readonly fsType: string;
  readonly readOnly: boolean;
  readonly superReadOnly: boolean;
}

export interface Controller {
  readonly name: string;
  readonly subsystemNqn: string;
  readonly hostNqn: string;
  readonly hostId: string;
  readonly traddr: string;
  readonly trsvcid: string;
  state: string;
  /** The keys that it was connected with. */
  readonly keys?: FakeKeys;
}

/** As the kernel has them: without one of the controller, that is not asked to prove itself. */
export interface FakeKeys {
  readonly host: string;
  readonly controller: string | undefined;
}

/** What a discovery controller reports. */
export interface FakeLogPage {
  generation: number;
  /** As `traddr:trsvcid`, with the subsystem NQN of an I/O controller; without one it is a referral. */
  records: readonly { readonly address: string; readonly subsystemNqn?: string }[];
}

/** Thrown at the call where the machine is cut off, as a kill of the driver would end it. */
export class CutOff extends Error {
  override readonly name = "CutOff";
}

export class FakeHost implements Host {
  readonly roots: Roots = { sysfs: "/sys", dev: "/dev", proc: "/proc" };
  readonly pending = new PendingAnswers();
  /** Commands run, each as one text. */
  readonly commands: string[] = [];
  /** Calls of any kind so far. */
  calls = 0;
  /**
   * The call, counted from 1, at which to throw CutOff, as does each one after it; `after` lets it take effect first. Take
   * it away to start again.
   */
  cut: { at: number; when: "before" | "after" } | undefined;
  /** Answers instead of a tool, by the beginning of the command. */
  readonly answers = new Map<string, Partial<CommandResult>>();
  /** What the cluster would show to this host once it is connected. */
  readonly remote: FakeNamespace[] = [];
  readonly devices: Device[] = [];
  /** Open mappers; the namespace of each is what is within the encryption. */
  readonly mappers: (Device & { readonly mapperName: string; readonly beneath: Device; readonly readOnly: boolean })[] =
    [];
  readonly mounts: FakeMount[] = [];
  readonly controllers: Controller[] = [];
  readonly discoveryDirectory = "/etc/discovery-client/discovery.d";
  /** Which keys hosts have to connect with, by subsystem NQN; others are open to every host. */
  readonly demands = new Map<string, FakeKeys>();
  /** Whether the kernel has DH-HMAC-CHAP; false: as before 6.0; "takes keys": as a later one that was built without. */
  authenticates: boolean | "takes keys" = true;
  /** Whether the kernel shows the names of its functions. */
  showsSymbols = true;
  /** Whether the kernel shows one device for all paths. */
  multipath = true;
  /** ANA states of the paths over connections, by the name of the connection; others are `optimized`. */
  readonly anaStates = new Map<string, string>();
  /** Paths that the kernel does not show, as `nvme0 UUID`: `lost` until it looks again, `withdrawn` by the cluster. */
  readonly hidden = new Map<string, "lost" | "withdrawn">();
  /** What a reset does to a connection, besides keeping its name. */
  onReset: (controller: Controller) => void = () => {};
  /** Whether nvme-cli compares hosts before it asks the kernel, as since 2.8. */
  nvmeCliComparesHosts = false;
  /** Whether a Discovery-Client connects what its directory asks for. */
  playsDiscoveryClient = true;
  /** What it connects with. */
  daemonKeys: FakeKeys | undefined;
  /** Discovery controllers, by `traddr:trsvcid`. */
  readonly logPages = new Map<string, FakeLogPage>();
  readonly #directories = new Set(["/", "/staging", "/pods", "/etc/discovery-client/discovery.d", "/sys/class/nvme"]);
  readonly #files = new Map<string, string>();
  /** Names of devices that are write-protected. */
  readonly #readOnly = new Set<string>();
  #numbers = 0;

  addNamespace(uuid: string, subsystemNqn: string, sizeBytes = 1n << 30n): FakeNamespace {
    const namespace = { uuid, subsystemNqn, sizeBytes, content: undefined, written: new Map() };
    this.remote.push(namespace);
    return namespace;
  }

  /** Makes the devices of a subsystem appear, as the kernel does after a connect. */
  connect(subsystemNqn: string, hostNqn = "nqn.host", traddr = "192.0.2.1", trsvcid = "4420", hostId = ""): void {
    const same = this.controllers.find((controller) =>
      controller.subsystemNqn === subsystemNqn && controller.traddr === traddr && controller.trsvcid === trsvcid
    );
    if (same === undefined) {
      const keys = this.daemonKeys === undefined ? {} : { keys: this.daemonKeys };
      this.addController({ subsystemNqn, hostNqn, hostId, traddr, trsvcid, state: "live", ...keys });
    }
    this.#scan(subsystemNqn);
  }

  /** Makes the devices of a subsystem appear that are not there. */
  #scan(subsystemNqn: string): void {
    for (const namespace of this.remote) {
      if (namespace.subsystemNqn !== subsystemNqn) continue;
      const ways = this.controllers.filter((controller) => controller.subsystemNqn === subsystemNqn);
      if (ways.length > 0 && ways.every(({ name }) => this.hidden.has(`${name} ${namespace.uuid}`))) continue;
      if (this.devices.some((device) => device.namespace === namespace)) continue;
      const n = ++this.#numbers;
      this.devices.push({ name: `nvme0n${n}`, number: `259:${n}`, namespace });
    }
  }

  /** The kernel gives up all connections and their devices; what is mounted or open on them stays. */
  loseDevices(): void {
    this.controllers.splice(0);
    this.devices.splice(0);
  }

  /** Adds a connection under the first free name. */
  addController(controller: Omit<Controller, "name">): void {
    for (let n = 0;; n++) {
      if (this.controllers.some(({ name }) => name === `nvme${n}`)) continue;
      this.controllers.push({ name: `nvme${n}`, ...controller });
      return;
    }
  }

  /** Everything that a volume's life should not leave behind. */
  leftovers(): readonly string[] {
    return [
      ...this.mounts.map((mount) => `mount ${mount.path}`),
      ...[...this.#files.keys()].map((path) => `file ${path}`),
      ...[...this.#directories].filter((path) => path.startsWith("/pods/")).map((path) => `directory ${path}`),
      ...[...this.devices, ...this.mappers].filter(({ name }) => this.#readOnly.has(name))
        .map(({ name }) => `read-only device ${name}`),
      ...this.mappers.map(({ mapperName }) => `mapper ${mapperName}`),
    ];
  }

  run(
    program: string,
    args: readonly string[],
    { signal, stdin = "" }: { readonly signal: AbortSignal; readonly stdin?: string },
  ): Promise<CommandResult> {
    return this.#call(() => {
      signal.throwIfAborted();
      const command = [program, ...args].join(" ");
      this.commands.push(command);
      for (const [start, answer] of this.answers) {
        if (command.startsWith(start)) return { code: 0, stdout: "", stderr: "", ...answer };
      }
      const answer = this.#tool(program, args, stdin);
      return { code: 0, stdout: "", stderr: "", ...answer };
    });
  }

  kindOf(path: string): Promise<PathKind> {
    return this.#call(() => {
      if (this.mounts.some((mount) => mount.path === path && mount.isNode)) return "block";
      if (this.#directories.has(path)) return "directory";
      if (this.#files.has(path)) return "file";
      if (this.#deviceAt(path) !== undefined) return "block";
      if (path === "/dev/nvme-fabrics") return "other";
      const numbers = [...this.devices, ...this.mappers].map(({ number }) => `/sys/dev/block/${number}`);
      return numbers.includes(path) ? "symlink" : "absent";
    });
  }

  blockNumber(path: string): Promise<string | undefined> {
    return this.#call(() => {
      const bound = this.mounts.findLast((mount) => mount.path === path && mount.isNode);
      return (bound?.device ?? this.#deviceAt(path))?.number;
    });
  }

  realPath(path: string): Promise<string | undefined> {
    return this.#call(() => this.#directories.has(path) ? path : undefined);
  }

  readLink(): Promise<string | undefined> {
    return this.#call(() => undefined);
  }

  makeDirectory(path: string): Promise<void> {
    return this.#call(() => void this.#directories.add(path));
  }

  makeFile(path: string): Promise<void> {
    return this.#call(() => void this.#files.set(path, this.#files.get(path) ?? ""));
  }

  removeEmpty(path: string): Promise<void> {
    return this.#call(() => {
      if (this.mounts.some((mount) => mount.path === path)) throw new Error("Device or resource busy (os error 16)");
      if ((this.#files.get(path) ?? "") !== "") throw new StatusError("FAILED_PRECONDITION", `"${path}" has content`);
      this.#files.delete(path);
      this.#directories.delete(path);
    });
  }

  usage(path: string) {
    return this.#call(() => {
      const totalBytes = this.#mountAt(path)?.device.namespace.content?.fsBytes ?? 0n;
      return { totalBytes, freeBytes: totalBytes, availableBytes: totalBytes, totalInodes: 100n, freeInodes: 90n };
    });
  }

  list(directory: string): Promise<readonly string[] | undefined> {
    return this.#call(() => {
      if (directory === "/sys/class/block") {
        return [...[...this.devices, ...this.mappers].map((device) => device.name), ...this.#paths().keys()];
      }
      const mapper = this.mappers.find(({ name }) => directory === `/sys/class/block/${name}/slaves`);
      if (mapper !== undefined) return this.devices.includes(mapper.beneath) ? [mapper.beneath.name] : [];
      const held = this.devices.find(({ name }) => directory === `/sys/class/block/${name}/holders`);
      if (held !== undefined) return this.mappers.filter(({ beneath }) => beneath === held).map(({ name }) => name);
      if (directory === "/sys/class/nvme") return this.controllers.map((controller) => controller.name);
      if (this.#mountAt(directory) !== undefined) return ["lost+found"];
      if (!this.#directories.has(directory)) return undefined;
      const below = directory === "/" ? "/" : `${directory}/`;
      return [...this.#files.keys(), ...this.#directories].filter((path) =>
        path !== directory && path.startsWith(below) && !path.slice(below.length).includes("/")
      ).map((path) => path.slice(below.length));
    });
  }

  readText(path: string): Promise<string | undefined> {
    return this.#call(() => {
      if (path === "/proc/self/mountinfo") return this.#mountInfo();
      if (path === "/proc/self/status") return "CapEff:\t000001ffffffffff\n";
      if (path === "/sys/module/nvme_core/parameters/multipath") return this.multipath ? "Y\n" : "N\n";
      if (path === "/proc/kallsyms" && this.showsSymbols) {
        const symbols = ["nvmf_connect_admin_queue", ...(this.authenticates === true ? ["nvme_auth_negotiate"] : [])];
        return symbols.map((name) => `0000000000000000 T ${name}\t[nvme_core]\n`).join("");
      }
      if (path === "/dev/nvme-fabrics") {
        return `transport=%s,traddr=%s,nqn=%s${this.authenticates ? ",dhchap_secret=%s,dhchap_ctrl_secret=%s" : ""}\n`;
      }
      return this.#sysfs(path).get(path) ?? this.#files.get(path);
    });
  }

  readBytes(path: string, offsetBytes: bigint, lengthBytes: number): Promise<Uint8Array> {
    return this.#call(() => {
      const device = this.#deviceAt(path);
      if (device === undefined) throw new Error("No such device or address (os error 6)");
      const bytes = new Uint8Array(lengthBytes);
      const { content, luks } = device.namespace;
      if (luks !== undefined && offsetBytes === 0n) {
        bytes.set(new TextEncoder().encode("LUKS"));
        bytes.set([0xba, 0xbe, 0, 2], 4);
        bytes.set(new TextEncoder().encode(luks.label), 24);
      }
      if (content?.fsType === "ext4" && offsetBytes === 0n) {
        const view = new DataView(bytes.buffer, 1024);
        view.setUint16(0x38, 0xef53, true);
        view.setUint32(0x18, 2, true);
        view.setUint32(4, Number(content.fsBytes / 4096n), true);
        view.setUint32(0x20, 32768, true);
      }
      if (content?.fsType === "ext4") {
        // The inode table is in the third block, the root directory is its second inode of 128 bytes, and the fourth block
        // is the only one of that directory: "." and "..", both of inode 2.
        if (offsetBytes === 4096n) bytes.set([2], 8);
        if (offsetBytes === 8192n + 128n) {
          const inode = new DataView(bytes.buffer);
          inode.setUint16(0, 0x41ed, true);
          inode.setUint16(0x1a, 3, true);
          inode.setUint32(0x28, 3, true);
        }
        if (offsetBytes === 3n * 4096n) {
          bytes.set(
            [2, 0, 0, 0, 12, 0, 1, 2, 0x2e, 0, 0, 0, 2, 0, 0, 0, 244, 15, 2, 2, 0x2e, 0x2e].slice(0, lengthBytes),
          );
        }
      }
      for (const [at, written] of device.namespace.written ?? []) {
        if (at >= offsetBytes && at < offsetBytes + BigInt(lengthBytes)) bytes.set(written, Number(at - offsetBytes));
      }
      return bytes;
    });
  }

  lookUp(directory: string): Promise<void> {
    return this.#call(() => {
      if (!this.#directories.has(directory)) throw new Error("No such file or directory (os error 2)");
    });
  }

  writeDevice(path: string, offsetBytes: bigint, bytes: Uint8Array): Promise<void> {
    return this.#call(() => {
      const device = this.#deviceAt(path);
      if (device === undefined) throw new Error("No such device or address (os error 6)");
      device.namespace.written?.set(offsetBytes, bytes);
    });
  }

  tryWrite(directory: string): Promise<void> {
    return this.#call(() => {
      if (this.#mountAt(directory)?.readOnly) throw Object.assign(new Error("read-only"), { code: "EROFS" });
    });
  }

  replaceText(path: string, text: string): Promise<void> {
    return this.#call(() => {
      this.#files.set(path, text);
      // The daemon connects at once.
      if (this.playsDiscoveryClient && path.startsWith(this.discoveryDirectory)) {
        for (const [, nqn = ""] of text.matchAll(/ -n (\S+)/g)) this.connect(nqn);
      }
    });
  }

  writeAttribute(path: string, text: string): Promise<void> {
    return this.#call(() => {
      if (!/^\/sys\/class\/nvme\/nvme\d+\/fast_io_fail_tmo$/.test(path)) throw new Error(`no attribute ${path}`);
      this.commands.push(`echo ${text} > ${path}`);
    });
  }

  /** Connects, as /dev/nvme-fabrics does; numbers and words of errors are those of Linux 6.12 where they were seen. */
  exchange(path: string, text: string): Promise<string> {
    return this.#call(() => {
      const options = new Map(
        text.split(",").map((word) => [word.split("=")[0] ?? "", word.split("=").slice(1).join("=")]),
      );
      const value = (name: string) => options.get(name) ?? "";
      this.commands.push(`${path}: ${text.replace(/DHHC-1:[^,]*/g, "KEY")}`);
      const fail = (words: string, number: number) => {
        throw new Error(`${words} (os error ${number})`);
      };
      if (!this.authenticates && options.has("dhchap_secret")) fail("Invalid argument", 22);
      const [nqn, traddr, trsvcid] = [value("nqn"), value("traddr"), value("trsvcid")];
      const there = this.controllers.some((controller) =>
        controller.subsystemNqn === nqn && controller.traddr === traddr && controller.trsvcid === trsvcid &&
        controller.hostNqn === value("hostnqn") && !/^(deleting|dead)/.test(controller.state)
      );
      if (there && !options.has("duplicate_connect")) fail("Operation already in progress", 114);
      const answer = this.answers.get(`connect ${traddr}`)?.stderr;
      if (answer !== undefined) throw new Error(answer);
      if (nqn !== discoveryNqn && !this.remote.some((namespace) => namespace.subsystemNqn === nqn)) {
        fail("Input/output error", 5);
      }
      if (nqn === discoveryNqn && !this.logPages.has(`${traddr}:${trsvcid}`)) fail("Connection refused", 111);
      const keys = { host: value("dhchap_secret"), controller: options.get("dhchap_ctrl_secret") };
      const demanded = this.demands.get(nqn);
      if (demanded !== undefined && keys.host === "") fail("Required key not available", 126);
      if (demanded !== undefined && demanded.host !== keys.host) fail("Key was rejected by service", 129);
      // The controller proves itself only where it demands a key.
      if (demanded !== undefined && keys.controller !== undefined && demanded.controller !== keys.controller) {
        fail("Key was rejected by service", 129);
      }
      const [hostNqn, hostId] = [value("hostnqn"), value("hostid")];
      const used = keys.host === "" ? {} : { keys };
      this.addController({ subsystemNqn: nqn, hostNqn, hostId, traddr, trsvcid, state: "live", ...used });
      this.#scan(nqn);
      return `instance=${this.controllers.at(-1)?.name.slice("nvme".length)},cntlid=1\n`;
    });
  }

  remove(path: string): Promise<void> {
    return this.#call(() => void this.#files.delete(path));
  }

  watch(): Disposable {
    return { [Symbol.dispose]: () => {} };
  }

  /** Counts the call, and cuts it off before or after its effect when its turn has come. */
  async #call<T>(act: () => T): Promise<T> {
    const at = ++this.calls;
    await Promise.resolve();
    // Code that was killed does not go on, however many errors it would catch.
    const { at: last = Infinity, when } = this.cut ?? {};
    if (at > last || (at === last && when === "before")) throw new CutOff(`before call ${at}`);
    const result = act();
    if (at === last) throw new CutOff(`after call ${at}`);
    return result;
  }

  #deviceAt(path: string): Device | undefined {
    return [...this.devices, ...this.mappers].find((device) => path === `/dev/${device.name}`);
  }

  #mountAt(path: string): FakeMount | undefined {
    return this.mounts.findLast((mount) => mount.path === path);
  }

  /** The ways to devices over connections, by their names in sysfs; with `multipath` only. */
  #paths(): Map<string, string> {
    const paths = new Map<string, string>();
    if (!this.multipath) return paths;
    for (const { name, namespace } of this.devices) {
      const [, subsystem, number] = /^nvme(\d+)n(\d+)$/.exec(name) ?? [];
      for (const controller of this.controllers) {
        if (controller.subsystemNqn !== namespace.subsystemNqn) continue;
        if (this.hidden.has(`${controller.name} ${namespace.uuid}`)) continue;
        const state = this.anaStates.get(controller.name) ?? "optimized";
        paths.set(`nvme${subsystem}c${controller.name.slice("nvme".length)}n${number}`, state);
      }
    }
    return paths;
  }

  /** The attributes in sysfs of what `path` is about. */
  #sysfs(path: string): Map<string, string> {
    const files = new Map<string, string>();
    for (const [name, state] of this.#paths()) files.set(`/sys/class/block/${name}/ana_state`, `${state}\n`);
    for (const { name, number, namespace } of this.devices) {
      if (!path.includes(`/${name}/`)) continue;
      const attributes = {
        wwid: `uuid.${namespace.uuid}`,
        uuid: namespace.uuid,
        dev: number,
        size: String(namespace.sizeBytes / 512n),
        hidden: "0",
        ro: this.#readOnly.has(name) ? "1" : "0",
        "device/subsysnqn": namespace.subsystemNqn,
      };
      for (const [key, text] of Object.entries(attributes)) files.set(`/sys/class/block/${name}/${key}`, `${text}\n`);
    }
    for (const { name, number, namespace, mapperName, readOnly } of this.mappers) {
      const attributes = {
        "dm/name": mapperName,
        dev: number,
        size: String(namespace.sizeBytes / 512n),
        ro: readOnly || this.#readOnly.has(name) ? "1" : "0",
      };
      for (const [key, text] of Object.entries(attributes)) files.set(`/sys/class/block/${name}/${key}`, `${text}\n`);
    }
    for (const { name, subsystemNqn, hostNqn, hostId, traddr, trsvcid, state, keys } of this.controllers) {
      if (!path.includes(`/${name}/`)) continue;
      const attributes = {
        hostid: hostId,
        cntrltype: subsystemNqn === discoveryNqn ? "discovery" : "io",
        subsysnqn: subsystemNqn,
        hostnqn: hostNqn,
        state,
        transport: "tcp",
        address: `traddr=${traddr},trsvcid=${trsvcid},src_addr=192.0.2.200`,
        ...(this.authenticates === true
          ? { dhchap_secret: keys?.host ?? "none", dhchap_ctrl_secret: keys?.controller ?? "none" }
          : {}),
      };
      for (const [key, text] of Object.entries(attributes)) files.set(`/sys/class/nvme/${name}/${key}`, `${text}\n`);
    }
    return files;
  }

  #mountInfo(): string {
    const lines = this.mounts.map(({ path, device, isNode, fsType, readOnly, superReadOnly }, at) => {
      const what = isNode
        ? ["0:6", `/${device.name}`, "devtmpfs", "devtmpfs"]
        : [device.number, "/", fsType, `/dev/${device.name}`];
      const [number, root, type, source] = what;
      return `${at + 30} 1 ${number} ${root} ${path} ${readOnly ? "ro" : "rw"},relatime shared:${
        at + 1
      } - ${type} ${source} ${superReadOnly ? "ro" : "rw"}`;
    });
    const text = ["22 1 254:0 / / rw,relatime - ext4 /dev/vda1 rw", ...lines].join("\n") + "\n";
    // The table that the driver will read must be one that it can read.
    if (parseMountTable(text).length !== lines.length + 1) throw new Error(`bad mount table:\n${text}`);
    return text;
  }

  #tool(program: string, args: readonly string[], stdin: string): Partial<CommandResult> {
    const last = args.at(-1) ?? "";
    const device = this.#deviceAt(last);
    switch (program) {
      case "blkid": {
        const fsType = device?.namespace.luks === undefined ? device?.namespace.content?.fsType : "crypto_LUKS";
        return fsType === undefined ? { code: 2 } : { stdout: `DEVNAME=${last}\nTYPE=${fsType}\n` };
      }
      case "mkfs.ext4": {
        if (device === undefined) {
          return { code: 1, stderr: `mkfs.ext4: No such file or directory while trying to open ${last}` };
        }
        device.namespace.content = { fsType: "ext4", fsBytes: device.namespace.sizeBytes };
        return {};
      }
      case "e2fsck":
        return { stdout: `${last}: clean, 11/65536 files, 12955/262144 blocks\n` };
      case "resize2fs": {
        const content = device?.namespace.content;
        if (content === undefined || device === undefined) {
          return { code: 1, stderr: "resize2fs: Bad magic number in super-block" };
        }
        content.fsBytes = device.namespace.sizeBytes;
        return {};
      }
      case "mount":
        return this.#mount(args);
      case "umount": {
        const at = this.mounts.findLastIndex((mount) => mount.path === last);
        if (at < 0) return { code: 32, stderr: `umount: ${last}: not mounted.\n` };
        this.mounts.splice(at, 1);
        return {};
      }
      case "blockdev":
        if (device === undefined) {
          return { code: 1, stderr: `blockdev: cannot open ${last}: No such file or directory` };
        }
        if (args[0] === "--setro") this.#readOnly.add(device.name);
        else this.#readOnly.delete(device.name);
        return {};
      case "wipefs":
        if (device !== undefined) device.namespace.content = undefined;
        return {};
      case "cryptsetup":
        return this.#cryptsetup(args, stdin);
      case "nvme":
        return this.#nvme(args);
    }
    throw new Error(`this machine has no ${program}`);
  }

  #mount(args: readonly string[]): Partial<CommandResult> {
    const [source = "", path = ""] = args.slice(-2);
    const options = (args[args.indexOf("-o") + 1] ?? "").split(",");
    const readOnly = options.includes("ro");
    const device = this.#deviceAt(source);
    if (options.includes("bind")) {
      if (device !== undefined) {
        this.mounts.push({ path, device, isNode: true, fsType: "", readOnly, superReadOnly: false });
        return {};
      }
      const from = this.#mountAt(source);
      if (from === undefined) throw new Error(`a plain directory was bound: ${source}`);
      this.mounts.push({ ...from, path, readOnly: readOnly || from.readOnly });
      return {};
    }
    const fsType = device?.namespace.content?.fsType;
    if (device === undefined || fsType === undefined) {
      return { code: 32, stderr: `mount: ${path}: wrong fs type, bad option, bad superblock on ${source}\n` };
    }
    this.mounts.push({ path, device, isNode: false, fsType, readOnly, superReadOnly: readOnly });
    return {};
  }

  /** Exit codes as in cryptsetup(8): 2 bad passphrase, 4 wrong device, 5 exists or busy. */
  #cryptsetup(args: readonly string[], stdin: string): Partial<CommandResult> {
    const [action = ""] = args;
    const last = args.at(-1) ?? "";
    const mapper = this.mappers.find(({ mapperName }) => mapperName === last);
    switch (action) {
      case "luksFormat": {
        const device = this.#deviceAt(last);
        if (device === undefined) return { code: 4, stderr: `Device ${last} does not exist or access denied.` };
        if (stdin === "") return { code: 2, stderr: "Nothing to read on input." };
        const label = args.find((arg) => arg.startsWith("--label="))?.slice("--label=".length) ?? "";
        const { uuid, sizeBytes } = device.namespace;
        const inner = { uuid, subsystemNqn: "", sizeBytes: sizeBytes - luksHeaderBytes, content: undefined };
        device.namespace.luks = { label, passphrases: new Set([stdin]), inner };
        return {};
      }
      case "open": {
        const device = this.#deviceAt(args.at(-2) ?? "");
        const luks = device?.namespace.luks;
        if (device === undefined || luks === undefined) {
          return { code: 1, stderr: "Device is not a valid LUKS device." };
        }
        if (mapper !== undefined) return { code: 5, stderr: `Device ${last} already exists.` };
        if (luks.passphrases.size === 0) return { code: 1, stderr: "No usable keyslot is available." };
        if (!luks.passphrases.has(stdin)) return { code: 2, stderr: "No key available with this passphrase." };
        const n = ++this.#numbers;
        luks.inner.sizeBytes = device.namespace.sizeBytes - luksHeaderBytes;
        const readOnly = args.includes("--readonly");
        this.mappers.push({
          name: `dm-${n}`,
          number: `253:${n}`,
          namespace: luks.inner,
          mapperName: last,
          beneath: device,
          readOnly,
        });
        return {};
      }
      case "close": {
        if (mapper === undefined) return { code: 4, stderr: `Device ${last} is not active.` };
        if (this.mounts.some(({ device }) => device === mapper)) {
          return { code: 5, stderr: `Device ${last} is still in use.` };
        }
        this.mappers.splice(this.mappers.indexOf(mapper), 1);
        return {};
      }
      case "resize":
        if (mapper === undefined) return { code: 4, stderr: `Device ${last} is not active.` };
        mapper.namespace.sizeBytes = mapper.beneath.namespace.sizeBytes - luksHeaderBytes;
        return {};
      case "config": {
        const luks = this.#deviceAt(last)?.namespace.luks;
        if (luks === undefined) return { code: 1, stderr: "Device is not a valid LUKS device." };
        luks.label = args[args.indexOf("--label") + 1] ?? "";
        return {};
      }
      case "luksDump": {
        const luks = this.#deviceAt(last)?.namespace.luks;
        if (luks === undefined) return { code: 1, stderr: `Device ${last} is not a valid LUKS2 device.` };
        const keyslots = Object.fromEntries([...luks.passphrases].map((_, n) => [n, { type: "luks2" }]));
        return { stdout: JSON.stringify({ keyslots, tokens: {}, segments: {}, digests: {}, config: {} }) };
      }
      case "luksChangeKey": {
        const luks = this.#deviceAt(last)?.namespace.luks;
        const [before = "", after = ""] = stdin.split("\n");
        if (luks?.passphrases.delete(before) !== true) {
          return { code: 2, stderr: "No key available with this passphrase." };
        }
        luks.passphrases.add(after);
        return {};
      }
    }
    throw new Error(`unknown: cryptsetup ${args.join(" ")}`);
  }

  #nvme(args: readonly string[]): Partial<CommandResult> {
    const value = (option: string) =>
      args.find((arg) => arg.startsWith(`--${option}=`))?.split("=").slice(1).join("=") ?? "";
    switch (args[0]) {
      case "connect": {
        const nqn = value("nqn");
        const traddr = value("traddr");
        const trsvcid = value("trsvcid");
        const there = this.controllers.some((controller) =>
          controller.subsystemNqn === nqn && controller.traddr === traddr && controller.trsvcid === trsvcid &&
          (!this.nvmeCliComparesHosts || controller.hostNqn === value("hostnqn"))
        );
        if (there) return { code: 1, stderr: "already connected\n" };
        if (nqn === discoveryNqn) {
          if (!this.logPages.has(`${traddr}:${trsvcid}`)) {
            return { code: 1, stderr: "Failed to write to /dev/nvme-fabrics: Connection refused\n" };
          }
          const [hostNqn, hostId] = [value("hostnqn"), value("hostid")];
          this.addController({ subsystemNqn: nqn, hostNqn, hostId, traddr, trsvcid, state: "live" });
          return {};
        }
        if (this.demands.has(nqn)) {
          return { code: 1, stderr: "could not add new controller: pre-shared TLS key is missing\n" };
        }
        if (!this.remote.some((namespace) => namespace.subsystemNqn === nqn)) {
          return { code: 1, stderr: "Failed to write to /dev/nvme-fabrics: Input/output error\n" };
        }
        const [hostNqn, hostId] = [value("hostnqn"), value("hostid")];
        if (this.nvmeCliComparesHosts) {
          this.addController({ subsystemNqn: nqn, hostNqn, hostId, traddr, trsvcid, state: "live" });
        }
        this.connect(nqn, hostNqn, traddr, trsvcid, hostId);
        return {};
      }
      case "discover": {
        const controller = this.controllers.find(({ name }) => name === value("device"));
        const page = this.logPages.get(`${controller?.traddr}:${controller?.trsvcid}`);
        if (controller?.state !== "live" || page === undefined) {
          return {
            code: 1,
            stderr: `Failed to open ctrl ${
              value("device")
            }, errno 11\nfailed to get discovery log: Bad file descriptor\n`,
          };
        }
        const records = page.records.map(({ address, subsystemNqn }) => ({
          trtype: "tcp",
          adrfam: "ipv4",
          subtype: subsystemNqn === undefined ? "discovery subsystem referral" : "nvme subsystem",
          treq: "not specified",
          portid: 1,
          trsvcid: address.split(":")[1],
          subnqn: subsystemNqn ?? discoveryNqn,
          traddr: address.split(":")[0],
          eflags: "none",
          sectype: "none",
        }));
        return { stdout: JSON.stringify({ genctr: page.generation, records }, null, 2) };
      }
      case "disconnect": {
        const at = this.controllers.findIndex((controller) => controller.name === value("device"));
        const [gone] = at < 0 ? [] : this.controllers.splice(at, 1);
        const nqn = gone?.subsystemNqn;
        if (nqn !== undefined && !this.controllers.some((controller) => controller.subsystemNqn === nqn)) {
          for (const device of this.devices.filter((device) => device.namespace.subsystemNqn === nqn)) {
            this.devices.splice(this.devices.indexOf(device), 1);
          }
        }
        return {};
      }
      case "ns-rescan": {
        const found = this.controllers.find((controller) => `/dev/${controller.name}` === args.at(-1));
        if (found === undefined) return { code: 1, stderr: "No such file or directory" };
        for (const [path, why] of this.hidden) {
          if (why === "lost" && path.startsWith(`${found.name} `)) this.hidden.delete(path);
        }
        this.#scan(found.subsystemNqn);
        return {};
      }
      case "reset": {
        const found = this.controllers.find((controller) => `/dev/${controller.name}` === args.at(-1));
        if (found === undefined) return { code: 1, stderr: "No such file or directory" };
        this.onReset(found);
        return {};
      }
    }
    throw new Error(`unknown: nvme ${args.join(" ")}`);
  }
}

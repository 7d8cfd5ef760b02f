/**
 * A virtual machine: the guest that build_guest.sh made, booted by QEMU without KVM (its software emulation runs
 * everywhere), with folders of the host shared over 9p.
 *
 * What it took to find out: unix sockets and FIFOs do not work on a 9p share (ENXIO), so they belong on the guest's
 * /tmp. QEMU dies with this process, even when that is killed. CPU models without AVX are faster under emulation.
 */
import { join } from "node:path";

/** A folder of the host in the guest. */
export interface Share {
  readonly path: string;
  readonly at: string;
  readonly writable?: boolean;
}

export interface BootOptions {
  /** What build_guest.sh made: the guest, and QEMU. */
  readonly imageDir: string;
  readonly emulatorDir: string;
  /** Where this boot keeps its files: `console.log` has the kernel's messages. Must exist. */
  readonly runDir: string;
  /** Bash, run as root when the guest is up; the guest goes when it ends. */
  readonly command: string;
  readonly shares: readonly Share[];
  /** A disk that outlives the boot, `/dev/vdb` in the guest. */
  readonly diskFile?: string | undefined;
  readonly memoryMib: number;
  readonly processors: number;
  /** Receives each line that the command writes. */
  readonly onLine: (line: string) => void;
  /** Switches the machine off, as pulling the plug would. */
  readonly signal: AbortSignal;
}

/** How a boot ended: the command's exit status, or why there is none. */
export type Ended = { readonly status: number } | { readonly problem: string };

/** QEMU with libraries and firmware of its own release. */
function emulator(directory: string): readonly string[] {
  const usr = join(directory, "root/usr");
  return [
    ...[join(usr, "lib64/ld-linux-x86-64.so.2"), "--library-path", join(usr, "lib/x86_64-linux-gnu")],
    ...[join(usr, "bin/qemu-system-x86_64"), "-L", join(usr, "share/qemu"), "-L", join(usr, "share/seabios")],
  ];
}

/** Boots a guest and waits until it is off. */
export async function boot(options: BootOptions): Promise<Ended> {
  const { imageDir, runDir } = options;
  const exchange = join(runDir, "run");
  const console = join(runDir, "console.log");
  await Deno.mkdir(exchange, { recursive: true });
  await Deno.writeTextFile(join(exchange, "command"), options.command);
  await Deno.remove(join(exchange, "status")).catch(() => {});
  const mounts = options.shares.map(({ at, writable }, number) =>
    `share${number} ${at} ${writable ? "rw,cache=mmap" : "ro,cache=loose"}\n`
  );
  await Deno.writeTextFile(join(exchange, "mounts"), mounts.join(""));
  const folder = (tag: string, path: string, writable: boolean) => {
    if (path.includes(",")) throw new Error(`Cannot share ${path} with a guest: QEMU takes no comma in a path`);
    return [
      ...[
        "-fsdev",
        `local,id=${tag},path=${path},security_model=none,multidevs=remap${writable ? "" : ",readonly=on"}`,
      ],
      ...["-device", `virtio-9p-pci,fsdev=${tag},mount_tag=${tag}`],
    ];
  };
  const drive = (id: string, file: string, more: string) => [
    ...["-drive", `file=${file},format=raw,if=none,id=${id},cache=unsafe,discard=unmap${more}`],
    ...["-device", `virtio-blk-pci,drive=${id},serial=${id}`],
  ];
  const args = [
    ...["--pdeathsig", "KILL", ...emulator(options.emulatorDir)],
    ...["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"],
    ...["-accel", "tcg,thread=multi,tb-size=512", "-machine", "q35,usb=off,vmport=off,smm=off", "-cpu", "Westmere"],
    ...["-smp", String(options.processors), "-m", String(options.memoryMib)],
    ...["-kernel", join(imageDir, "vmlinux"), "-initrd", join(imageDir, "initrd.cpio")],
    "-append",
    "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off random.trust_cpu=on net.ifnames=0",
    ...["-chardev", `file,id=console,path=${console}`, "-serial", "chardev:console"],
    // stdin is a pipe that stays open: at its end QEMU would report to the guest that its console is closed.
    ...["-chardev", "stdio,id=output,signal=off", "-device", "virtio-serial-pci"],
    ...["-device", "virtserialport,chardev=output,name=output", "-device", "virtio-rng-pci"],
    // What a run writes to its root disk is in a file that QEMU makes in TMPDIR and forgets.
    ...drive("root", join(imageDir, "rootfs.img"), ",snapshot=on"),
    ...(options.diskFile === undefined ? [] : drive("disk", options.diskFile, "")),
    ...folder("run", exchange, true),
    ...options.shares.flatMap(({ path, writable }, number) => folder(`share${number}`, path, writable === true)),
  ];
  const qemu = new Deno.Command("setpriv", {
    args,
    env: { TMPDIR: runDir },
    stdin: "piped",
    stdout: "piped",
    stderr: "piped",
    // Ctrl-C must reach this process only, which switches the guest off.
    detached: true,
  }).spawn();
  const off = () => {
    try {
      qemu.kill("SIGKILL");
    } catch {
      // It is off already.
    }
  };
  options.signal.addEventListener("abort", off, { once: true });
  if (options.signal.aborted) off();
  const complaints = new Response(qemu.stderr).text();
  const lines = qemu.stdout.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await lines.read();
    if (done) break;
    const parts = (rest + value).split("\n");
    rest = parts.pop() ?? "";
    for (const part of parts) options.onLine(part);
  }
  if (rest !== "") options.onLine(rest);
  const { code } = await qemu.status;
  options.signal.removeEventListener("abort", off);
  await qemu.stdin.close().catch(() => {});
  const status = await Deno.readTextFile(join(exchange, "status")).catch(() => undefined);
  if (status !== undefined) return { status: Number(status) };
  if (options.signal.aborted) return { problem: String(options.signal.reason?.message ?? options.signal.reason) };
  return { problem: `the guest ended by itself (QEMU: exit ${code}) ${(await complaints).trim()}`.trim() };
}

/** The end of the kernel's messages of a boot. */
export async function kernelMessages(runDir: string, lines: number): Promise<string> {
  const text = await Deno.readTextFile(join(runDir, "console.log")).catch(() => "");
  return text.replaceAll("\r", "").trimEnd().split("\n").slice(-lines).join("\n");
}

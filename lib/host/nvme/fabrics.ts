/**
 * Connections through the kernel's own interface: one write to /dev/nvme-fabrics, whose answer names the new controller
 * (Linux, drivers/nvme/host/fabrics.c). nvme-cli does the same, and is the default. The driver uses this interface for what
 * nvme-cli cannot do: pass on a key without showing it, make a second connection to an address, and report the reason of a
 * failure, which 2.11 to 2.16 do not print.
 *
 * The two differ in what counts as connected already. The kernel compares subsystem, address, host NQN and host ID, and
 * ignores controllers that are being deleted or are dead (`nvmf_ctlr_matches_baseopts`, the same from 4.19 to 6.12).
 * nvme-cli 2.3 compares subsystem and address alone, before it asks the kernel; since 2.8 it compares the host too.
 */
import { messageOf } from "../../error.ts";
import type { Host } from "../host.ts";
import type { ConnectOptions } from "./connect_options.ts";

/** Options beyond those that nvme-cli gets. */
export interface KernelOptions {
  /** A DH-HMAC-CHAP key in clear text: never in a log or an error. */
  readonly dhchapSecret?: string | undefined;
  readonly dhchapControllerSecret?: string | undefined;
  /** Whether the kernel makes another connection to an address that has one of this host. */
  readonly duplicate?: boolean;
}

/**
 * Connects to one controller. Not idempotent: a second call fails with `Operation already in progress (os error 114)` unless
 * `duplicate` is set. It returns when the kernel does, and cannot be cancelled.
 *
 * @returns name of the new controller (`nvme3`); undefined when the kernel does not name it
 * @throws what the kernel answers, with `(os error N)` in the message; see describeConnectFailure
 */
export async function connectByKernel(
  host: Host,
  { address, subsystemNqn, hostNqn, hostId, ...tuning }: ConnectOptions,
  { dhchapSecret, dhchapControllerSecret, duplicate = false }: KernelOptions = {},
): Promise<string | undefined> {
  const options = {
    nqn: subsystemNqn,
    transport: "tcp",
    traddr: address.traddr,
    trsvcid: address.trsvcid,
    hostnqn: hostNqn,
    hostid: hostId,
    ctrl_loss_tmo: tuning.controllerLossSeconds,
    reconnect_delay: tuning.reconnectDelaySeconds,
    keep_alive_tmo: tuning.keepAliveSeconds,
    fast_io_fail_tmo: tuning.fastIoFailSeconds,
    nr_io_queues: tuning.ioQueues,
    queue_size: tuning.queueSize,
    dhchap_secret: dhchapSecret,
    dhchap_ctrl_secret: dhchapControllerSecret,
  };
  const words = Object.entries(options).flatMap(([name, value]) => value === undefined ? [] : [`${name}=${value}`]);
  if (words.some((word) => /[,\s]/.test(word))) {
    throw new Error(`"${subsystemNqn}" holds a comma or a blank, which the kernel does not take`);
  }
  if (duplicate) words.push("duplicate_connect");
  const answer = await host.exchange(`${host.roots.dev}/nvme-fabrics`, words.join(","));
  const instance = /\binstance=(\d+)/.exec(answer)?.[1];
  return instance === undefined ? undefined : `nvme${instance}`;
}

/** The error number of the kernel in an error (x86, ARM, RISC-V, POWER and s390); undefined when it is not the kernel's. */
export function kernelErrorNumber(error: unknown): number | undefined {
  const number = /\(os error (\d+)\)/.exec(messageOf(error))?.[1];
  return number === undefined ? undefined : Number(number);
}

/**
 * What a failed connect means, in words for an error message. An ambiguous text is kept beside its meaning.
 *
 * @param text one line of nvme-cli 2.3 to 2.16 or of the kernel, which spell the kernel's errors alike
 */
export function describeConnectFailure(text: string, hostNqn: string): string {
  if (/connection refused/i.test(text)) return "refused, nothing listens there";
  // The second wording is that of nvme-cli 2.13, which takes it for a key of TLS.
  if (/required key not available|pre-shared TLS key/i.test(text)) {
    return "in-band authentication (DH-HMAC-CHAP) is demanded there, and no key is given (in-band-auth)";
  }
  if (/timed out|no route to host|network is unreachable|network is down|host is down/i.test(text)) {
    return `no way there (${text})`;
  }
  // nvme-cli looks at /sys/class/nvme first, which exists once the module is loaded.
  const isMissing = /(?:fabrics|scan topology).*no such file|no such file.*fabrics/i.test(text) ||
    // A device node that the module left behind, or that an image contains.
    /failed to open.*no such device|no such device.*: open /i.test(text);
  if (isMissing) {
    return `${text}; the kernel module nvme_tcp is not loaded`;
  }
  if (/permission denied|operation not permitted/i.test(text)) {
    return `${text}; this process may not use nvme-fabrics: root is needed, in a container a privileged one, and a security ` +
      `module such as SELinux can forbid it too`;
  }
  if (/input\/output error/i.test(text)) {
    return `not allowed: the subsystem is unknown there or has no access for host NQN ${hostNqn}`;
  }
  return text;
}

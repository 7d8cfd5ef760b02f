/** What a connection to a controller is made with. */
import type { TransportAddress } from "../../namespace.ts";

/** How the kernel treats a connection; undefined: the kernel's default. */
export interface ConnectionTuning {
  /** After how many seconds without a connection the kernel gives it up, -1: never. The kernel's default is 600. */
  readonly controllerLossSeconds?: number | undefined;
  /** Between attempts to connect again. The kernel's default is 10. */
  readonly reconnectDelaySeconds?: number | undefined;
  /** After how much silence the connection counts as lost. The kernel's default is 5. */
  readonly keepAliveSeconds?: number | undefined;
  /** After how long without a connection I/O fails instead of waiting. The kernel's default is never. */
  readonly fastIoFailSeconds?: number | undefined;
  /** The kernel's default is one for each processor. */
  readonly ioQueues?: number | undefined;
  /** Commands per queue. The kernel's default is 128. */
  readonly queueSize?: number | undefined;
}

/** One connection: the controller's address, the subsystem, and the names of this host. */
export interface ConnectOptions extends ConnectionTuning {
  readonly address: TransportAddress;
  readonly subsystemNqn: string;
  readonly hostNqn: string;
  readonly hostId: string;
}

import type { TransportAddress } from "../../namespace.ts";

/** How the kernel treats a connection; what is undefined is the kernel's own choice. */
export interface ConnectionTuning {
  /** After how many seconds without a connection the kernel gives it up, -1: never. The kernel's own choice is 600. */
  readonly controllerLossSeconds?: number | undefined;
  /** Between attempts to connect again. The kernel's own choice is 10. */
  readonly reconnectDelaySeconds?: number | undefined;
  /** After how much silence the connection counts as lost. The kernel's own choice is 5. */
  readonly keepAliveSeconds?: number | undefined;
  /** After how long without a connection I/O fails instead of waiting. The kernel's own choice is never. */
  readonly fastIoFailSeconds?: number | undefined;
  /** The kernel's own choice is one for each processor. */
  readonly ioQueues?: number | undefined;
  /** Commands per queue. The kernel's own choice is 128. */
  readonly queueSize?: number | undefined;
}

export interface ConnectOptions extends ConnectionTuning {
  readonly address: TransportAddress;
  readonly subsystemNqn: string;
  readonly hostNqn: string;
  readonly hostId: string;
}

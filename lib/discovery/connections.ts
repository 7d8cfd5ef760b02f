/** Connections of the daemon: how they are made, replaced and ended. Each function resolves with why it failed, or undefined. */
import type { DhchapKeys } from "../auth_key.ts";
import type { RequestContext } from "../context.ts";
import { messageOf } from "../error.ts";
import type { Host } from "../host/host.ts";
import { authenticationObstacle, connectAuthenticated, dropOutdated, hasKeys } from "../host/nvme/authentication.ts";
import { hasMultipath } from "../host/nvme/multipath.ts";
import { connectController } from "../host/nvme/connect.ts";
import type { ConnectOptions } from "../host/nvme/connect_options.ts";
import { addressOf, discoveryNqn, type NvmeController } from "../host/nvme/controllers.ts";
import { connectByKernel, describeConnectFailure } from "../host/nvme/fabrics.ts";
import type { TransportAddress } from "../namespace.ts";
import type { DiscoverySource, RequestedSubsystem } from "./plan.ts";

const discoveryKeepAliveSeconds = 30;

/** Settings of connections to I/O controllers. */
export interface ConnectionSettings {
  /** For entries that say nothing else; see ConnectionTuning. */
  readonly controllerLossSeconds: number | undefined;
  readonly keepAliveSeconds: number | undefined;
  readonly ioQueues: number | undefined;
  /**
   * Keys of all connections to I/O controllers; connections without these keys are replaced. Connections to discovery
   * controllers have no keys.
   */
  readonly keys?: DhchapKeys | undefined;
}

/** A subsystem under a host NQN, as far as connecting needs it. */
type ConnectedSubsystem = Pick<RequestedSubsystem, "hostNqn" | "subsystemNqn" | "controllerLossSeconds">;

/** Makes and replaces connections with the settings of one daemon. */
export class Connector {
  readonly #host: Host;
  readonly #settings: ConnectionSettings;

  constructor(host: Host, settings: ConnectionSettings) {
    this.#host = host;
    this.#settings = settings;
  }

  /** Names of the controllers of our subsystems that were connected with other keys. */
  async outdated(controllers: readonly NvmeController[], isOurs: (key: string) => boolean): Promise<Set<string>> {
    const found = new Set<string>();
    const { keys } = this.#settings;
    if (keys === undefined) return found;
    for (const controller of controllers) {
      if (controller.isDiscovery || !isOurs(`${controller.hostNqn} ${controller.subsystemNqn}`)) continue;
      if (!await hasKeys(this.#host, controller, keys)) found.add(controller.name);
    }
    return found;
  }

  async connectSource(ctx: RequestContext, source: DiscoverySource, hostId: string): Promise<string | undefined> {
    return await connectController(this.#host, ctx, this.#options(discoveryOf(source), source.address, hostId));
  }

  /** Makes another connection to a discovery controller, beside one that does not work. */
  async replaceSource(
    ctx: RequestContext,
    source: DiscoverySource,
    controller: NvmeController,
    hostId: string,
  ): Promise<string | undefined> {
    return await this.#connectBeside(ctx, discoveryOf(source), controller, hostId);
  }

  /** Connects to an I/O controller, in the place of a connection with other keys if there is one. */
  async connectPath(
    ctx: RequestContext,
    { subsystem, address, outdated }: {
      readonly subsystem: RequestedSubsystem;
      readonly address: TransportAddress;
      readonly outdated: NvmeController | undefined;
    },
    hostId: string,
  ): Promise<string | undefined> {
    const { keys } = this.#settings;
    const connectOptions = this.#options(subsystem, address, hostId);
    if (keys === undefined) return await connectController(this.#host, ctx, connectOptions);
    const direction = keys.controller === undefined ? "unidirectional" : "bidirectional";
    const obstacle = await authenticationObstacle(this.#host, direction);
    if (obstacle !== undefined) return obstacle;
    if (outdated !== undefined && !await hasMultipath(this.#host)) {
      return `${outdated.name} is connected there with other keys, and without native NVMe multipath in the kernel it ` +
        `cannot be replaced, disconnect it first`;
    }
    const beside = outdated !== undefined;
    const failed = await connectAuthenticated(this.#host, ctx, { ...connectOptions, keys, beside });
    if (failed !== undefined) return failed.problem;
    if (beside) {
      await dropOutdated(this.#host, ctx, {
        subsystemNqn: subsystem.subsystemNqn,
        hostNqn: subsystem.hostNqn,
        keys,
      });
    }
    return undefined;
  }

  /** Makes another connection to the address of an I/O controller. */
  async connectBesidePath(
    ctx: RequestContext,
    subsystem: RequestedSubsystem,
    controller: NvmeController,
    hostId: string,
  ): Promise<string | undefined> {
    return await this.#connectBeside(ctx, subsystem, controller, hostId);
  }

  async #connectBeside(
    ctx: RequestContext,
    subsystem: ConnectedSubsystem,
    controller: NvmeController,
    hostId: string,
  ): Promise<string | undefined> {
    const address = addressOf(controller);
    if (address === undefined) return `its address is not known (${controller.address})`;
    const { keys } = this.#settings;
    const connectOptions = this.#options(subsystem, address, hostId);
    if (keys !== undefined && !controller.isDiscovery) {
      return (await connectAuthenticated(this.#host, ctx, { ...connectOptions, keys, beside: true }))?.problem;
    }
    try {
      await connectByKernel(this.#host, connectOptions, { duplicate: true });
      return undefined;
    } catch (error) {
      return describeConnectFailure(messageOf(error), subsystem.hostNqn);
    }
  }

  #options(
    { hostNqn, subsystemNqn, controllerLossSeconds }: ConnectedSubsystem,
    address: TransportAddress,
    hostId: string,
  ): ConnectOptions {
    if (subsystemNqn === discoveryNqn) {
      return { address, subsystemNqn, hostNqn, hostId, keepAliveSeconds: discoveryKeepAliveSeconds };
    }
    return {
      address,
      subsystemNqn,
      hostNqn,
      hostId,
      controllerLossSeconds: controllerLossSeconds ?? this.#settings.controllerLossSeconds,
      keepAliveSeconds: this.#settings.keepAliveSeconds,
      ioQueues: this.#settings.ioQueues,
    };
  }
}

function discoveryOf({ hostNqn }: DiscoverySource): ConnectedSubsystem {
  return { hostNqn, subsystemNqn: discoveryNqn, controllerLossSeconds: undefined };
}

/** Logs the states of connections. */
import type { NvmeController } from "../host/nvme/controllers.ts";
import type { Logger } from "../log.ts";
import { placeOf, type RequestedSubsystem } from "./plan.ts";

/** Logs one line when a connection of ours stops working, works again, or disappears. */
export class StateLog {
  readonly #log: Logger;
  /** States by `<name> <subsystem NQN> <place>`, because a name can return for another connection. */
  readonly #states = new Map<string, string>();

  constructor(log: Logger) {
    this.#log = log;
  }

  update(controllers: readonly NvmeController[], subsystems: ReadonlyMap<string, RequestedSubsystem>): void {
    const hostNqns = new Set([...subsystems.values()].map(({ hostNqn }) => hostNqn));
    const seen = new Set<string>();
    for (const controller of controllers) {
      const { name, state, hostNqn, subsystemNqn } = controller;
      const isDiscovery = controller.isDiscovery && hostNqns.has(hostNqn);
      if (!isDiscovery && !subsystems.has(`${hostNqn} ${subsystemNqn}`)) continue;
      const address = placeOf(controller);
      const key = `${name} ${subsystemNqn} ${address}`;
      seen.add(key);
      const before = this.#states.get(key);
      this.#states.set(key, state);
      if (before === state) continue;
      const fields = { name, address, subsystem: subsystemNqn };
      if (state === "live") this.#log.info(before === undefined ? "is connected" : "is connected again", fields);
      else this.#log.warning("is not connected now", { ...fields, error: `its state is ${state}` });
    }
    for (const key of this.#states.keys()) {
      if (seen.has(key)) continue;
      this.#states.delete(key);
      const [name = "", subsystem = "", address = ""] = key.split(" ");
      this.#log.info("has no such connection any more", { name, address, subsystem });
    }
  }
}

/**
 * The control port of a simulated PoseidonOS: HTTP with JSON, on a loopback address only. In addition to the routes that
 * control.ts has for every storage system (calls, faults by `event`, held calls, devices):
 *
 * | request                 | body                                                              | effect                      |
 * | ----------------------- | ----------------------------------------------------------------- | --------------------------- |
 * | GET /                   |                                                                   | addresses                   |
 * | GET /model              |                                                                   | everything PoseidonOS holds |
 * | GET /leftovers          |                                                                   | what was not cleaned up     |
 * | GET /behaviour, PATCH   | any of {callMs, generation, qos, tcpTransport, saveRestore, halfUnmounts, dead} | how it behaves |
 * | PATCH /arrays/NAME      | {state?, situation?}                                              | puts an array into a state  |
 * | POST /restart           | {memory?: boolean}                                                | PoseidonOS, as after a power cut |
 * | GET /harmful            |                                                                   | requests that would harm a real system |
 * | POST /dagent/stop, /start, /hang, /drop |                                                   | DAgent, and its connections |
 */
import * as z from "zod";
import {
  type CallControl,
  callControl,
  type ControlPort,
  type ControlPortOptions,
  type Leftovers,
  machineOf,
  parse,
  pathsOf,
  serveRoutes,
  sharedRoutes,
  withoutUndefined,
} from "../control.ts";
import type { Machine, Paths } from "../data_plane/data_plane.ts";
import type { Faults } from "../faults.ts";
import type { DAgent } from "./dagent.ts";
import { arrayStates, type PosArray, type PosBehaviour, type PoseidonModel, situations } from "./system.ts";

/** The functions of the control port, for callers in the same process. */
export interface PoseidonControl extends CallControl {
  readonly model: PoseidonModel;
  readonly api: DAgent;
  behave(change: Partial<PosBehaviour>): void;
  setArray(name: string, to: Partial<Pick<PosArray, "state" | "situation">>): void;
  /** `access` holds the NQNs of all subsystems, with or without a volume. */
  leftovers(): Leftovers;
  /** Resolves when hosts see exactly the namespaces that they may access. */
  waitUntilSettled(): Promise<void>;
  /** Ends and starts PoseidonOS and DAgent, with its volumes or as a new installation. */
  restart(options?: { readonly memory?: boolean }): Promise<void>;
  /** @throws StatusError UNIMPLEMENTED for a data plane without a machine */
  machine(): Machine;
  /** @throws StatusError UNIMPLEMENTED for a data plane that no host connects to */
  paths(): Paths;
}

/** The control functions over a model and its DAgent. */
export function createPoseidonControl(model: PoseidonModel, api: DAgent, faults: Faults): PoseidonControl {
  return {
    ...callControl(faults),
    model,
    api,
    behave: (change) => {
      Object.assign(model.behaviour, change);
    },
    setArray: (name, to) => model.setArray(name, to),
    leftovers: () => ({
      volumes: model.arrays.flatMap(({ volumes }) =>
        volumes.map(({ name, uuid, isMounted }) => `${name} ${uuid} ${isMounted ? "Mounted" : "Unmounted"}`)
      ),
      snapshots: [],
      access: model.subsystems.map(({ nqn }) => nqn),
      devices: (model.dataPlane.machine?.devices ?? []).map(({ name }) => name),
    }),
    waitUntilSettled: () => model.dataPlane.waitUntilSettled(),
    async restart({ memory = true } = {}) {
      const wasRunning = api.state === "running";
      await api.stop();
      api.unlock();
      await model.restart(memory);
      if (wasRunning) await api.start();
    },
    paths: () => pathsOf(model.dataPlane),
    machine: () => machineOf(model.dataPlane),
  };
}

const behaviourSchema = z.strictObject({
  callMs: z.number().min(0),
  generation: z.enum(["1.0", "0.11"]),
  qos: z.boolean(),
  tcpTransport: z.boolean(),
  saveRestore: z.boolean(),
  halfUnmounts: z.int().min(0),
  dead: z.boolean(),
}).partial();
const arraySchema = z.strictObject({ state: z.enum(arrayStates), situation: z.enum(situations) }).partial();

/** Serves the control port; `about` is what GET / answers. Throws what serveControl throws. */
export function servePoseidonControl(
  control: PoseidonControl,
  about: () => unknown,
  options: ControlPortOptions,
): Promise<ControlPort> {
  const { model, api } = control;
  return serveRoutes([
    ["GET", /^\/$/, about],
    ["GET", /^\/model$/, () => model.dump()],
    ["GET", /^\/leftovers$/, () => control.leftovers()],
    ["GET", /^\/behaviour$/, () => model.behaviour],
    ["PATCH", /^\/behaviour$/, ({ text }) => {
      control.behave(withoutUndefined(parse(behaviourSchema, text)));
      return model.behaviour;
    }],
    ["PATCH", /^\/arrays\/([^/]+)$/, ({ text, argument }) => {
      control.setArray(argument, withoutUndefined(parse(arraySchema, text)));
    }],
    ["POST", /^\/restart$/, async ({ text }) => {
      const { memory = true } = parse(z.strictObject({ memory: z.boolean().optional() }), text);
      await control.restart({ memory });
    }],
    ["GET", /^\/harmful$/, () => api.harmful],
    ["POST", /^\/dagent\/stop$/, () => api.stop()],
    ["POST", /^\/dagent\/start$/, () => api.start()],
    ["POST", /^\/dagent\/hang$/, () => api.hang()],
    ["POST", /^\/dagent\/drop$/, () => api.dropConnections()],
    ...sharedRoutes(control),
  ], options);
}

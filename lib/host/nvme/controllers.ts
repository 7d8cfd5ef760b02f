/** NVMe controllers as sysfs shows them: this machine's connections to subsystems. */
import type { TransportAddress } from "../../namespace.ts";
import type { Host } from "../host.ts";
import { readAttribute } from "./sysfs.ts";

/** The well-known subsystem NQN of discovery controllers (NVMe base specification). */
export const discoveryNqn = "nqn.2014-08.org.nvmexpress.discovery";

/** A connection of this machine to a subsystem: one path to each of its namespaces. */
export interface NvmeController {
  /** `nvme0`. */
  readonly name: string;
  /** `live`, `connecting`, `resetting`, `deleting` … */
  readonly state: string;
  readonly subsystemNqn: string;
  readonly hostNqn: string;
  readonly hostId: string;
  /** Whether it is a discovery controller, which carries no data. */
  readonly isDiscovery: boolean;
  readonly transport: string;
  /** As sysfs has it: `traddr=192.0.2.1,trsvcid=4420,src_addr=…`. */
  readonly address: string;
}

/** All connections of this machine to a subsystem. */
export async function controllersOf(host: Host, subsystemNqn: string): Promise<readonly NvmeController[]> {
  return (await allControllers(host)).filter((controller) => controller.subsystemNqn === subsystemNqn);
}

/** All NVMe controllers of this machine, including local drives and discovery controllers. */
export async function allControllers(host: Host): Promise<readonly NvmeController[]> {
  const names = await host.list(`${host.roots.sysfs}/class/nvme`) ?? [];
  const controllers = await Promise.all(names.map((name) => readController(host, name)));
  return controllers.filter((controller) => controller !== undefined);
}

/** The traddr and trsvcid in a controller's address. */
export function addressOf(controller: NvmeController): TransportAddress | undefined {
  const fields = new Map(
    controller.address.split(",").map((field) => {
      const equals = field.indexOf("=");
      return [field.slice(0, equals), field.slice(equals + 1)] as const;
    }),
  );
  const traddr = fields.get("traddr");
  const trsvcid = fields.get("trsvcid");
  return traddr === undefined || trsvcid === undefined ? undefined : { traddr, trsvcid };
}

/** Whether a controller is a connection to `address`. */
export function isAt(controller: NvmeController, address: TransportAddress): boolean {
  const at = addressOf(controller);
  return at !== undefined && at.trsvcid === address.trsvcid &&
    canonicalAddress(at.traddr) === canonicalAddress(address.traddr);
}

/** One spelling of an address; IPv6 has many. */
function canonicalAddress(traddr: string): string {
  if (!traddr.includes(":")) return traddr;
  const [plain = "", zone] = traddr.split("%");
  const url = URL.parse(`http://[${plain}]`);
  return `${url === null ? plain.toLowerCase() : url.hostname}${zone === undefined ? "" : `%${zone}`}`;
}

/** Whether a controller works, or may heal by itself as a connecting one does; one that is being deleted never does. */
export function isUsable(controller: NvmeController): boolean {
  return !controller.state.startsWith("deleting") && controller.state !== "dead";
}

/** One controller by its name; undefined when it is not there, or is being removed. */
export async function readController(host: Host, name: string): Promise<NvmeController | undefined> {
  const base = `class/nvme/${name}`;
  const [subsystemNqn, state, hostNqn, hostId, type, transport, address] = await Promise.all([
    readAttribute(host, `${base}/subsysnqn`),
    readAttribute(host, `${base}/state`),
    readAttribute(host, `${base}/hostnqn`),
    readAttribute(host, `${base}/hostid`),
    readAttribute(host, `${base}/cntrltype`),
    readAttribute(host, `${base}/transport`),
    readAttribute(host, `${base}/address`),
  ]);
  if (subsystemNqn === undefined || state === undefined) return undefined;
  return {
    name,
    subsystemNqn,
    state,
    hostNqn: hostNqn ?? "",
    hostId: hostId ?? "",
    isDiscovery: type === "discovery" || subsystemNqn === discoveryNqn,
    transport: transport ?? "",
    address: address ?? "",
  };
}

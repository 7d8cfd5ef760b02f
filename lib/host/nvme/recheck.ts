import type { RequestContext } from "../../context.ts";
import type { Host } from "../host.ts";
import { findMapper } from "../mapper.ts";
import { type BlockDevice, describeDevice, readDevice } from "./devices.ts";

/**
 * The same device read again; use it before each step that would hurt another namespace.
 *
 * @throws StatusError UNAVAILABLE when its name is gone, or now belongs to another namespace or number
 */
export async function recheckDevice(host: Host, ctx: RequestContext, device: BlockDevice): Promise<BlockDevice> {
  const refuse = (problem: string) =>
    ctx.error("UNAVAILABLE", `${problem}, namespace ${device.uuid} has to be found again`);
  if (device.encrypts !== undefined) {
    const mapper = await findMapper(host, device.uuid);
    if (mapper === undefined) throw refuse(`${device.encrypts.name} has been closed`);
    if (mapper.number !== device.number) throw refuse(`${device.encrypts.name} has become device ${mapper.number}`);
    if (mapper.encrypts?.beneath === undefined) throw refuse(`${device.encrypts.name} has lost its device`);
    await recheckDevice(host, ctx, mapper.encrypts.beneath);
    return mapper;
  }
  const now = await readDevice(host, device.name);
  if (now === undefined) throw refuse(`${device.path} is gone`);
  if (now.uuid !== device.uuid || now.subsystemNqn !== device.subsystemNqn) {
    throw refuse(`${device.path} is ${describeDevice(now)} now`);
  }
  if (now.number !== device.number) throw refuse(`${device.path} has become device ${now.number}`);
  const node = await host.blockNumber(device.path);
  if (node !== now.number) {
    throw refuse(`the node ${device.path} is device ${node ?? "none"}, sysfs says ${now.number}`);
  }
  return now;
}

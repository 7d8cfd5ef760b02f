/** Checks that a device still is the namespace that it was. */
import type { RequestContext } from "../../context.ts";
import type { Host } from "../host.ts";
import { findMapper } from "../mapper.ts";
import { type BlockDevice, describeDevice, readDevice } from "./devices.ts";

/**
 * Reads a device again and returns it as it is now. Call it before each step that would damage another namespace.
 *
 * @throws StatusError UNAVAILABLE when its name is gone, or now belongs to another namespace or number
 */
export async function recheckDevice(host: Host, ctx: RequestContext, device: BlockDevice): Promise<BlockDevice> {
  const changedError = (problem: string) =>
    ctx.error("UNAVAILABLE", `${problem}, namespace ${device.uuid} has to be found again`);
  if (device.encrypts !== undefined) {
    const mapper = await findMapper(host, device.uuid);
    if (mapper === undefined) throw changedError(`${device.encrypts.name} has been closed`);
    if (mapper.number !== device.number) {
      throw changedError(`${device.encrypts.name} has become device ${mapper.number}`);
    }
    if (mapper.encrypts?.beneath === undefined) throw changedError(`${device.encrypts.name} has lost its device`);
    await recheckDevice(host, ctx, mapper.encrypts.beneath);
    return mapper;
  }
  const now = await readDevice(host, device.name);
  if (now === undefined) throw changedError(`${device.path} is gone`);
  if (now.uuid !== device.uuid || now.subsystemNqn !== device.subsystemNqn) {
    throw changedError(`${device.path} is ${describeDevice(now)} now`);
  }
  if (now.number !== device.number) throw changedError(`${device.path} has become device ${now.number}`);
  const node = await host.blockNumber(device.path);
  if (node !== now.number) {
    throw changedError(`the node ${device.path} is device ${node ?? "none"}, sysfs says ${now.number}`);
  }
  return now;
}

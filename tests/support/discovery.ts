/** Names and files for tests of the discovery client. */
import { hostNqn } from "../../lib/namespace.ts";
import { FakeHost } from "./fake_host.ts";

/** Namespaces. */
export const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
export const other = "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e";
/** Subsystems. */
export const nqn = "nqn.2019-09.com.example:cluster:1";
export const otherNqn = "nqn.2019-09.com.example:cluster:2";
/** Host NQN of this machine. */
export const us = hostNqn("n1.node");
export const hostId = "f4c1fb1c-0d56-4d0a-9d5d-9c36ed1ffa0c";

/** A line of an input file. */
export const entry = (address = "192.0.2.1", subsystem = nqn, more = "") =>
  `-t tcp -a ${address} -s 8009 -q ${us} -n ${subsystem}${more}\n`;

/** A machine without a simulated Discovery-Client. */
export function quietHost(): FakeHost {
  const host = new FakeHost();
  host.playsDiscoveryClient = false;
  return host;
}

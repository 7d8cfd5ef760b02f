/** Attaches namespaces through LightOS' Discovery-Client, by one file per namespace in its directory. */
import { messageOf } from "../../error.ts";
import { formatAddress, type RemoteNamespace, type TransportAddress } from "../../namespace.ts";
import { type Host, kindBehind } from "../host.ts";
import type { Attacher } from "./attacher.ts";

/** Where the Discovery-Client looks, and under which name it is to connect. */
export interface DiscoveryClientOptions {
  readonly host: Host;
  /** The directory that the Discovery-Client watches (its setting `clientConfigDir`). */
  readonly directory: string;
  readonly hostNqn: string;
}

/**
 * Prefix of temporary files in the watched directory: the daemon ignores them, except when it starts
 * (docs/reference/lightos-api.md 12.3). There is one name for each namespace, so that detach finds what a killed driver left.
 */
export const temporaryPrefix = "tmp.dc.";

/**
 * An attacher that writes one file per namespace UUID (docs/reference/lightos-api.md 10.2, 12.3).
 *
 * The daemon reads a file when it appears and ignores its removal until it starts again; connections stay. A file that is
 * right already is not written again, because each write makes the daemon read the whole directory.
 */
export function createDiscoveryClientAttacher({ host, directory, hostNqn }: DiscoveryClientOptions): Attacher {
  const fileOf = (uuid: string) => `${directory}/${uuid.toLowerCase()}`;
  const temporaryOf = (uuid: string) => `${directory}/${temporaryPrefix}${uuid.toLowerCase()}`;
  return {
    hint: `see that the Discovery-Client runs on this node, watches ${directory}, and reaches the cluster`,
    takesKeys: false,

    async attach(outer, namespace) {
      const ctx = outer.doing(`attach namespace ${namespace.uuid}`);
      const attachError = (problem: string, cause?: unknown) => ctx.error("FAILED_PRECONDITION", problem, { cause });
      if (namespace.discovery.length === 0) {
        throw attachError(`the publish context names no discovery controller of ${namespace.subsystemNqn}`);
      }
      const path = fileOf(namespace.uuid);
      const text = discoveryFile(namespace, hostNqn);
      const kind = await kindBehind(host, directory);
      if (kind !== "directory") {
        throw attachError(
          `${directory} is ${kind === "absent" ? "missing" : "not a directory"}, ` +
            `the LightOS Discovery-Client has to be installed on this node and share its directory with the driver`,
        );
      }
      try {
        if (await host.readText(path) === text) return;
        await host.replaceText(path, text, temporaryOf(namespace.uuid));
      } catch (error) {
        throw attachError(`${path} cannot be written (${messageOf(error)})`, error);
      }
      ctx.log.info("wrote the file for the Discovery-Client", { path, subsystem: namespace.subsystemNqn });
    },

    async detach(outer, uuid) {
      const ctx = outer.doing(`detach namespace ${uuid}`);
      const path = fileOf(uuid);
      try {
        await host.remove(temporaryOf(uuid));
        if (await host.readText(path) === undefined) return;
        await host.remove(path);
      } catch (error) {
        throw ctx.error("UNAVAILABLE", `${path} cannot be removed (${messageOf(error)})`, { cause: error });
      }
      ctx.log.info("removed the file for the Discovery-Client", { path });
    },
  };
}

/** The Discovery-Client's input for one namespace: one line per discovery controller, in the order of their text. */
export function discoveryFile(namespace: RemoteNamespace, hostNqn: string): string {
  const byText = new Map(namespace.discovery.map((address) => [formatAddress(address), address]));
  return [...byText.keys()].sort().map((text) => {
    const address = byText.get(text) as TransportAddress;
    return `-t tcp -a ${address.traddr} -s ${address.trsvcid} -q ${hostNqn} -n ${namespace.subsystemNqn}\n`;
  }).join("");
}

/** Connections by LightOS' Discovery-Client: this side writes one file per namespace into its directory. */
import { messageOf, StatusError } from "../../error.ts";
import { formatAddress, type RemoteNamespace, type TransportAddress } from "../../namespace.ts";
import { type Host, kindBehind } from "../host.ts";
import type { Attacher } from "./attacher.ts";

export interface DiscoveryClientOptions {
  readonly host: Host;
  /** The directory that the Discovery-Client watches (its setting `clientConfigDir`). */
  readonly directory: string;
  readonly hostNqn: string;
}

/**
 * The name of a temporary file in the watched directory begins with this, and the daemon looks away, except when it starts
 * (docs/reference/lightos-api.md 12.3). So there is one for each namespace, which detach finds when a killed driver has left it.
 */
export const temporaryPrefix = "tmp.dc.";

/**
 * Attaches through LightOS' Discovery-Client: one file per namespace UUID in its directory (docs/reference/lightos-api.md 10.2, 12.3).
 *
 * The daemon takes up a file when it appears and ignores its removal until it starts again; connections stay. A file
 * that is right already is not written again, for every write makes the daemon read the directory anew.
 */
export function createDiscoveryClientAttacher({ host, directory, hostNqn }: DiscoveryClientOptions): Attacher {
  const fileOf = (uuid: string) => `${directory}/${uuid.toLowerCase()}`;
  const temporaryOf = (uuid: string) => `${directory}/${temporaryPrefix}${uuid.toLowerCase()}`;
  return {
    hint: `see that the Discovery-Client runs on this node, watches ${directory}, and reaches the cluster`,
    takesKeys: false,

    async attach(ctx, namespace) {
      const refuse = (problem: string, cause?: unknown) =>
        new StatusError("FAILED_PRECONDITION", `Cannot attach namespace ${namespace.uuid}: ${problem}`, { cause });
      if (namespace.discovery.length === 0) {
        throw refuse(`the publish context names no discovery controller of ${namespace.subsystemNqn}`);
      }
      const path = fileOf(namespace.uuid);
      const text = discoveryFile(namespace, hostNqn);
      const kind = await kindBehind(host, directory);
      if (kind !== "directory") {
        throw refuse(
          `${directory} is ${kind === "absent" ? "missing" : "not a directory"}, ` +
            `the LightOS Discovery-Client has to be installed on this node and share its directory with the driver`,
        );
      }
      try {
        if (await host.readText(path) === text) return;
        await host.replaceText(path, text, temporaryOf(namespace.uuid));
      } catch (error) {
        throw refuse(`${path} cannot be written (${messageOf(error)})`, error);
      }
      ctx.log.info("told the Discovery-Client", { path, subsystem: namespace.subsystemNqn });
    },

    async detach(ctx, uuid) {
      const path = fileOf(uuid);
      try {
        await host.remove(temporaryOf(uuid));
        if (await host.readText(path) === undefined) return;
        await host.remove(path);
      } catch (error) {
        throw new StatusError(
          "UNAVAILABLE",
          `Cannot detach namespace ${uuid}: ${path} cannot be removed (${messageOf(error)})`,
          { cause: error },
        );
      }
      ctx.log.info("untold the Discovery-Client", { path });
    },
  };
}

/** The Discovery-Client's input for one namespace: one line per discovery controller, in the order of their text. */
export function discoveryFile(namespace: RemoteNamespace, hostNqn: string): string {
  const byText = new Map(namespace.discovery.map((address) => [formatAddress(address), address]));
  const texts = [...byText.keys()].sort();
  return texts.map((text) => {
    const address = byText.get(text) as TransportAddress;
    return `-t tcp -a ${address.traddr} -s ${address.trsvcid} -q ${hostNqn} -n ${namespace.subsystemNqn}\n`;
  }).join("");
}

/** Opens the data plane of a simulator. */
import { join } from "node:path";
import { messageOf } from "../../error.ts";
import type { Logger } from "../../log.ts";
import type { ClusterIdentity } from "../lightos/model.ts";
import { type DataPlane, noDataPlane } from "./data_plane.ts";

/** A data plane, and the directories of the machine that it simulates. */
export interface OpenedPlane extends AsyncDisposable {
  readonly plane: DataPlane;
  readonly discoveryDir: string | undefined;
  readonly devRoot: string | undefined;
  readonly sysfsRoot: string | undefined;
  /** Directory of the machine's `nvme`. */
  readonly programs: string | undefined;
}

/** Which data plane, and where its machine has its directories. */
export interface DataPlaneSettings {
  readonly data: DataPlane["kind"];
  readonly stateDir: string | undefined;
  readonly discoveryDir: string | undefined;
  readonly devRoot: string | undefined;
  readonly sysfsRoot: string | undefined;
  readonly inBandAuth?: boolean;
}

/**
 * Opens the data plane that `settings` ask for.
 *
 * @param stack removes the directory that was made because there is no state directory
 * @throws StatusError FAILED_PRECONDITION when the machine lacks what the data plane needs
 */
export async function openDataPlane(
  settings: DataPlaneSettings,
  identity: ClusterIdentity,
  stack: AsyncDisposableStack,
  log: Logger,
): Promise<OpenedPlane> {
  if (settings.data === "none") return withoutMachine(noDataPlane());
  let home = settings.stateDir;
  if (home === undefined) {
    const temporary = home = await Deno.makeTempDir({ prefix: "lbcsi-simulate-" });
    stack.defer(() =>
      Deno.remove(temporary, { recursive: true }).catch((error) => {
        log.warning("could not remove the contents", { path: temporary, error: messageOf(error) });
      })
    );
  }
  const contentDir = join(home, "content");
  if (settings.data === "nvmet") {
    const { openNvmetPlane } = await import("./nvmet.ts");
    return withoutMachine(
      await openNvmetPlane({ contentDir, identity, inBandAuth: settings.inBandAuth === true, log }),
    );
  }
  const { openLoopPlane } = await import("./loop.ts");
  const discoveryDir = settings.discoveryDir ?? join(home, "discovery.d");
  const devRoot = settings.devRoot ?? join(home, "dev");
  const sysfsRoot = settings.sysfsRoot ?? join(home, "sys");
  const programs = join(home, "programs");
  const plane = await openLoopPlane({
    programs,
    contentDir,
    discoveryDir,
    devRoot,
    sysfsRoot,
    identity,
    log,
  });
  return {
    plane,
    discoveryDir,
    devRoot,
    sysfsRoot,
    programs,
    [Symbol.asyncDispose]: () => plane[Symbol.asyncDispose](),
  };
}

function withoutMachine(plane: DataPlane): OpenedPlane {
  return {
    plane,
    discoveryDir: undefined,
    devRoot: undefined,
    sysfsRoot: undefined,
    programs: undefined,
    [Symbol.asyncDispose]: () => plane[Symbol.asyncDispose](),
  };
}

/** Which projects the caller of an RPC may use, from its token. */
import { StatusError } from "../../../error.ts";
import type { CallContext } from "../../../grpc/server.ts";
import type { Cluster } from "../cluster.ts";
import type { Caller } from "../token.ts";

/** What the RPCs of the management API work with. */
export interface ServiceParts {
  readonly cluster: Cluster;
  readonly access: Access;
  /** The endpoints of this scheme that the cluster announces, in the order of its servers. */
  readonly apiEndpoints: () => readonly string[];
}

/** The callers of the running calls. */
export class Access {
  readonly #callers = new WeakMap<CallContext, Caller>();

  /** Remembers who made a call. */
  setCaller(call: CallContext, caller: Caller): void {
    this.#callers.set(call, caller);
  }

  /** Who made a call; a call without a known caller has no rights. */
  callerOf(call: CallContext): Caller {
    return this.#callers.get(call) ?? { scope: "projects", projects: [] };
  }

  mayUse(call: CallContext, project: string): boolean {
    const caller = this.callerOf(call);
    return caller.scope === "cluster" || caller.projects.includes(project);
  }

  /** The project, if the caller may use it; throws PERMISSION_DENIED otherwise. An empty one passes. */
  admit(call: CallContext, project: string): string {
    if (project === "" || this.mayUse(call, project)) return project;
    throw new StatusError("PERMISSION_DENIED", `Cannot use project "${project}": the token is not for it`);
  }

  /** The project to list; undefined for all of them, which is the administrator's right. Throws PERMISSION_DENIED. */
  projectFilter(call: CallContext, project: string): string | undefined {
    if (project !== "") return this.admit(call, project);
    return this.callerOf(call).scope === "cluster" ? undefined : "";
  }
}

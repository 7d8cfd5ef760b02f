/** What CreateVolume and CreateSnapshot share: the names of new objects, and who owns them. */
import type { RequestContext } from "../../context.ts";

/** Throws INVALID_ARGUMENT for a name with characters that CSI does not allow (docs/reference/csi.md 2.2). */
export function assertNoControlCharacters(ctx: RequestContext, name: string): void {
  // deno-lint-ignore no-control-regex
  if (!/[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]/.test(name)) return;
  throw ctx.error("INVALID_ARGUMENT", "the name holds control characters");
}

// Keys that provisioner and snapshotter add with --extra-create-metadata (docs/reference/csi.md 16.4).
const metadataKeys: Readonly<Record<string, string>> = {
  "csi.storage.k8s.io/pvc/name": "pvc",
  "csi.storage.k8s.io/pvc/namespace": "namespace",
  "csi.storage.k8s.io/pv/name": "pv",
  "csi.storage.k8s.io/volumesnapshot/name": "volumesnapshot",
  "csi.storage.k8s.io/volumesnapshot/namespace": "namespace",
  "csi.storage.k8s.io/volumesnapshotcontent/name": "content",
};

/** The Kubernetes objects that a volume or snapshot is made for, from the keys that sidecars add to the parameters. */
export function ownerOf(parameters: Readonly<Record<string, string>>): Readonly<Record<string, string>> {
  return Object.fromEntries(
    Object.entries(metadataKeys).flatMap(([key, name]) => {
      const value = parameters[key];
      return value === undefined || value === "" ? [] : [[name, value]];
    }),
  );
}

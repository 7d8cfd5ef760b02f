/** A simulated LightOS cluster that demands authenticated connections. */
import type { AuthKind } from "../../lib/auth_key.ts";
import { createLogger } from "../../lib/log.ts";
import { Secrets } from "../../lib/secrets.ts";
import { lightosBackend } from "../../lib/storage/lightos/backend.ts";
import { nodeNqn } from "./key_machine.ts";
import { callContext } from "./node_calls.ts";
import { startSimulator, type TestSimulator } from "./simulator.ts";

const quiet = createLogger("error", "json", () => {});

/** A backend that talks to the simulator. */
export function openBackend(simulator: TestSimulator, lines: string[] = []) {
  return lightosBackend({
    log: createLogger("debug", "json", (line) => lines.push(line)),
    globalJwt: () => simulator.addresses.jwt,
    globalJwtPath: "/etc/lb-csi/jwt",
    globalJwtFor: "any endpoint",
    ca: undefined,
    verifyTls: true,
    userAgent: "lbcsi/test",
  });
}

/** A cluster that demands authentication, and a volume of it. */
export async function authenticatedCluster(inBandAuth: string | undefined, enabled = true) {
  const simulator = await startSimulator({ inBandAuth: enabled });
  const backend = openBackend(simulator);
  const none = new Secrets();
  const make = (name: string) =>
    backend.createVolume(callContext(undefined, quiet), none, {
      name,
      requiredBytes: 1n << 30n,
      limitBytes: 0n,
      parameters: {
        "mgmt-endpoint": simulator.addresses.grpc.join(","),
        "mgmt-scheme": "grpc",
        "replica-count": "1",
        "project-name": "default",
        ...(inBandAuth === undefined ? {} : { "in-band-auth": inBandAuth }),
      },
    });
  const volume = await make("pvc-1");
  return {
    simulator,
    backend,
    volume,
    make,
    hosts: () => simulator.control.cluster.trustedHosts,
    grant: (secrets: Record<string, string> = {}, given = volume, by = backend) =>
      by.grantAccess(callContext(), new Secrets(secrets), given.id, {
        hostNqn: nodeNqn,
        shared: false,
        volumeContext: given.context ?? {},
      }),
    keysOf: (kind: AuthKind, by = backend) =>
      by.authentication.keysOf(callContext(), none, volume.id, { hostNqn: nodeNqn, kind }),
    async [Symbol.asyncDispose]() {
      await backend[Symbol.asyncDispose]();
      await simulator[Symbol.asyncDispose]();
    },
  };
}

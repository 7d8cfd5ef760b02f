/** What LightOS clusters, simulated or odd, report to `lbcsi doctor`. */
import { ok } from "node:assert/strict";
import { serve, service } from "../../lib/grpc/server.ts";
import { createLogger } from "../../lib/log.ts";
import { Secrets } from "../../lib/secrets.ts";
import { selfSigned } from "../../lib/simulator/certificate.ts";
import type { SystemReport } from "../../lib/storage/backend.ts";
import { lightosReports } from "../../lib/storage/lightos/checks.ts";
import { parseEndpoints } from "../../lib/volume_id.ts";
import {
  ClusterHealth_State as Health,
  ClusterInfo_AuthenticationMode as AuthenticationMode,
  DurosAPI,
} from "../../proto/gen/lightos_pb.ts";
import { ownHostNqn, subsystemNqn } from "./doctor_machine.ts";
import { callContext } from "./node_calls.ts";

export const lightosOptions = {
  log: createLogger("error", "json", () => {}),
  globalJwt: () => undefined,
  globalJwtPath: "/etc/lb-csi/jwt",
  globalJwtFor: "any endpoint" as const,
  ca: undefined,
  verifyTls: true,
  userAgent: "lbcsi/test",
};

export function endpointsOf(addresses: readonly string[]) {
  const endpoints = parseEndpoints(addresses.join(","));
  ok(typeof endpoints !== "string", String(endpoints));
  return endpoints;
}

export async function reportOf(
  addresses: readonly string[],
  secrets: Record<string, string>,
  scheme: "grpc" | "grpcs" = "grpcs",
  given: Partial<typeof lightosOptions> = {},
): Promise<SystemReport> {
  const target = { endpoints: endpointsOf(addresses), scheme };
  const [report] = await lightosReports(
    callContext(),
    { ...lightosOptions, ...given },
    { target, secrets: new Secrets(secrets), hostNqn: ownHostNqn },
  );
  ok(report);
  return report;
}

/** A JSON Web Token without a valid signature. */
export function createToken(claims: Record<string, number>): string {
  const part = (value: unknown) => new TextEncoder().encode(JSON.stringify(value)).toBase64({ alphabet: "base64url" });
  return `${part({ alg: "RS256" })}.${part(claims)}.c2lnbmF0dXJl`;
}

export const secondsFromNow = (days: number) => Math.floor(Date.now() / 1000 + days * 86_400);

/** A LightOS with the answers that a test chooses. */
export async function serveOddLightos(
  given: {
    readonly health?: Health;
    readonly mode?: AuthenticationMode;
    readonly certificateDays?: number;
    readonly host?: { readonly iPAddress: string; readonly hostname: string };
    readonly addresses?: readonly string[];
  },
) {
  const certificate = given.certificateDays === undefined ? undefined : await selfSigned([], given.certificateDays);
  const server = await serve({
    listen: { host: "127.0.0.1", port: 0, ...(certificate === undefined ? {} : { tls: certificate }) },
    log: lightosOptions.log,
    services: [service(DurosAPI, {
      getVersion: () => Promise.resolve({ apiVersion: "v2.0" }),
      getClusterInfo: () =>
        Promise.resolve({
          subsystemNQN: subsystemNqn,
          clusterName: "odd",
          inBandAuthMode: given.mode ?? AuthenticationMode.UnKnown,
          nvmeEndpoints: [...given.addresses ?? []],
        }),
      getCluster: () => Promise.resolve({ health: { state: given.health ?? Health.OK, numInactiveNodes: 1 } }),
      getHost: ({ hostNQN }) => Promise.resolve({ hostNQN, iPAddress: "", hostname: "", ...given.host }),
    })],
  });
  const address = `127.0.0.1:${server.port}`;
  return {
    address,
    report: () =>
      reportOf(
        [address],
        {
          jwt: createToken({ exp: secondsFromNow(99) }),
          ...(certificate === undefined ? {} : { "mgmt-ca.crt": certificate.ca }),
        },
        certificate === undefined ? "grpc" : "grpcs",
      ),
    [Symbol.asyncDispose]: () => server.stop(0),
  };
}

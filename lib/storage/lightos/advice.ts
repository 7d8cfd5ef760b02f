/** What to do about a management endpoint that does not answer calls: for errors and for `lbcsi doctor`. */
import type { Trust } from "../../grpc/tls.ts";

/**
 * What to do about a management endpoint, as the end of a message.
 *
 * @param reason why a call failed
 * @param trust how the endpoint has to prove who it is; undefined: clear text
 */
export function adviceFor(reason: string, trust: Trust | undefined): string {
  if (/speaks management API/.test(reason)) return "use a driver or a LightOS that fit";
  if (/which is not pinned/.test(reason)) {
    return "if the cluster's key was changed, change the pin; else find out who answers";
  }
  if (/does not speak TLS/.test(reason)) {
    return "check the port; if the cluster is to be reached in clear text, mgmt-scheme has to be grpc";
  }
  if (trust === undefined && /before HTTP\/2 began/.test(reason)) {
    return "check the port; if the cluster speaks TLS, mgmt-scheme has to be grpcs";
  }
  if (/does not speak HTTP\/2|instead of a gRPC answer/.test(reason)) {
    return "check address and port, and what is between here and the cluster";
  }
  if (/altnames|does not match|Hostname\/IP/i.test(reason)) {
    return "give the name that the certificate is for (mgmt-server-name), or a certificate for this address";
  }
  if (/expired|not yet valid/i.test(reason)) {
    return "renew the cluster's certificate; see that this machine's clock is right";
  }
  if (/certificates that the server shows cannot be read/.test(reason)) {
    return "mend the chain of certificates on the server, or find out who answers";
  }
  if (trust !== undefined && /certificate|issuer|self.signed/i.test(reason)) {
    return "give the cluster's CA: mgmt-ca.crt in the Secret, ca in the cluster file, or --mgmt-ca";
  }
  return "check network, firewall, port and mgmt-scheme";
}

/** The CA certificates that this machine trusts. */
import type { Logger } from "../log.ts";
import { readPem } from "../pem.ts";
import { readFileIfPresent } from "./option_files.ts";

/** Where distributions keep them: Debian, Alpine; Fedora; SUSE; BSD, Alpine. */
const machineCaFiles = [
  "/etc/ssl/certs/ca-certificates.crt",
  "/etc/pki/tls/certs/ca-bundle.crt",
  "/etc/ssl/ca-bundle.pem",
  "/etc/ssl/cert.pem",
];

/**
 * The CA certificates that this machine trusts, from SSL_CERT_FILE or from the first of the usual files that has any.
 * Undefined when there are none: then the list in the program applies.
 *
 * Some base images set SSL_CERT_FILE, so a file that cannot be read is a warning and not an error.
 */
export function readMachineCa(log: Logger): string | undefined {
  const certificatesIn = (path: string) => {
    const { pem, problems } = readPem(readFileIfPresent(path) ?? "");
    for (const problem of problems) log.warning("skips a certificate to trust", { path, error: problem });
    return pem === "" ? undefined : pem;
  };
  const named = Deno.env.get("SSL_CERT_FILE") ?? "";
  const chosen = named === "" ? undefined : certificatesIn(named);
  if (chosen !== undefined) return chosen;
  if (named !== "") log.warning("cannot read certificates from the file in SSL_CERT_FILE", { path: named });
  return machineCaFiles.map(certificatesIn).find((text) => text !== undefined);
}

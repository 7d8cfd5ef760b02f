/**
 * What `lbcsi-controller` may do: the permissions that are compiled into it. It runs `controller` and `identity`, makes
 * and forgets volumes by network calls, and has no business with the machine that it runs on.
 *
 * Not in here, and so refused: running programs, foreign libraries, facts of the system, code from elsewhere, any other
 * file. Flags on the command line of the compiled program are arguments, nobody can widen this from outside.
 */

/** Directories of sockets: a container has one of them, from a volume of its pod. */
export const socketDirectories = ["/csi", "/var/lib/csi/sockets"] as const;

/**
 * Directories of what it is told: tokens (`--jwt-path`), the cluster file (`--config`), certificates (`--mgmt-ca`), and the
 * files that the cluster file names. Symbolic links in them are followed, as kubelet makes them.
 */
export const configDirectories = ["/etc/lb-csi", "/etc/lb-csi-config", "/etc/lbcsi"] as const;

/** What Debian's ca-certificates makes, and with it the distroless base images, for who is given no certificates. */
const machineCertificates = "/etc/ssl/certs/ca-certificates.crt";

/** The options' own, and those of libraries that throw when they may not ask for them: grpc-js, and yaml for its log. */
const variables = [
  "GRPC_*",
  "grpc_proxy",
  "no_grpc_proxy",
  ...["http", "https", "all", "no"].flatMap((name) => [`${name}_proxy`, `${name.toUpperCase()}_PROXY`]),
  "LB_CSI_*",
  "CSI_ENDPOINT",
  "LOG_STREAM",
  "LOG_TOKENS",
  "SSL_CERT_FILE",
];

/** The options of `deno run` and `deno compile` with other directories in place of the image's, for tests. */
export function permissionsWith(
  sockets: readonly string[],
  configuration: readonly string[],
): readonly string[] {
  return [
    "--no-prompt",
    // Any address: StorageClasses and volume IDs name the management endpoints, and one image serves every cluster. A
    // NetworkPolicy can say more, for it knows the cluster.
    "--allow-net",
    `--allow-read=${[...sockets, ...configuration, machineCertificates].join(",")}`,
    // To make the socket, and to remove one that an earlier process has left.
    `--allow-write=${sockets.join(",")}`,
    `--allow-env=${variables.join(",")}`,
    // Code from some sites is allowed by default, and stays so with --deny-import alone (Deno 2.9.5): a place where
    // nobody is.
    "--allow-import=127.0.0.1:1",
  ];
}

/** The options with which `lbcsi-controller` is compiled. */
export const controllerPermissions = permissionsWith(socketDirectories, configDirectories);

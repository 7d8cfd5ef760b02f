/**
 * The permissions that are compiled into `lbcsi-controller`. It runs `controller` and `identity`, manages volumes by
 * network calls, and needs nothing of the machine that it runs on.
 *
 * Everything else is denied: running programs, native libraries, information about the system, code from other places, any
 * other file. Flags on the command line of the compiled program are its arguments, so they cannot extend the permissions.
 */

/** Directories for the CSI socket: a container has one of them, from a volume of its pod. */
export const socketDirectories = ["/csi", "/var/lib/csi/sockets"] as const;

/**
 * Directories for configuration: tokens (`--jwt-path`), the cluster file (`--config`), certificates (`--mgmt-ca`), and the
 * files that the cluster file names. Symbolic links in them are followed, because kubelet makes such links.
 */
export const configDirectories = ["/etc/lb-csi", "/etc/lb-csi-config", "/etc/lbcsi"] as const;

/** The certificates of Debian and of distroless base images, used when `--mgmt-ca` is not given. */
const machineCertificates = "/etc/ssl/certs/ca-certificates.crt";

/** The variables of the options, and those without which libraries throw: grpc-js, and yaml for its log. */
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

/** The options for `deno run` and `deno compile`. Tests give other directories than those of the image. */
export function permissionsWith(
  sockets: readonly string[],
  configuration: readonly string[],
): readonly string[] {
  return [
    "--no-prompt",
    // Any address, because StorageClasses and volume IDs name the management endpoints, and one image serves every cluster.
    // A NetworkPolicy can be stricter, because it belongs to one cluster.
    "--allow-net",
    `--allow-read=${[...sockets, ...configuration, machineCertificates].join(",")}`,
    // Creates the socket, and removes one that an earlier process has left.
    `--allow-write=${sockets.join(",")}`,
    `--allow-env=${variables.join(",")}`,
    // Deno allows imports from some sites by default, even with --deny-import (Deno 2.9.5). This address replaces them;
    // nothing listens there.
    "--allow-import=127.0.0.1:1",
  ];
}

/** The options with which `lbcsi-controller` is compiled. */
export const controllerPermissions = permissionsWith(socketDirectories, configDirectories);

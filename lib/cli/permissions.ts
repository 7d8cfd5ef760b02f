/** The permissions that are compiled into the executable for controllers. */
import { storageSystems } from "./backends.ts";
import { type Settings, UsageError } from "./options.ts";
import type { clusterFileOption, serviceOptions, tokenOption, trustOptions } from "./option_groups.ts";

type PathSettings =
  & Pick<Settings<typeof serviceOptions>, "endpoint" | "backend">
  & Partial<Settings<typeof tokenOption> & Pick<Settings<typeof trustOptions>, "mgmt-ca">>
  & Partial<Settings<typeof clusterFileOption>>;

/**
 * Throws UsageError for paths in directories that this executable may not use. Otherwise the first sign of them would be a
 * missing token when the first volume is created.
 */
export function assertPermitted(settings: PathSettings): void {
  const { endpoint, backend, "jwt-path": jwt, "mgmt-ca": ca, config } = settings;
  const uses = [
    ["endpoint", endpoint, "write"],
    ["jwt-path", storageSystems[backend].takesTokens ? jwt : undefined, "read"],
    ["mgmt-ca", ca, "read"],
    ["config", config, "read"],
  ] as const;
  const problems = uses.flatMap(([option, path, name]) =>
    path === undefined || Deno.permissions.querySync({ name, path }).state === "granted"
      ? []
      : [`--${option} "${path}": this executable was built without the right to ${name} there`]
  );
  if (problems.length > 0) throw new UsageError(problems.join("\n"));
}

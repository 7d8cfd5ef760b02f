/** `lbcsi attach`: attaches a volume to this machine without an orchestrator, and mounts it. */
import * as z from "zod";
import type { RequestContext } from "../context.ts";
import { parseAddress, type TransportAddress } from "../namespace.ts";
import type { Attached, MountRequest } from "./attach_volume.ts";
import { defineCommand } from "./command.ts";
import { connectionTuning } from "./compose.ts";
import { assertDiscoveryDirectory } from "./discovery_directory.ts";
import { readKeyFiles } from "./key_files.ts";
import { connectionOptions, exitStatusText, keyOptions, volumeOptions } from "./option_groups.ts";
import { switchSchema } from "./option_schemas.ts";
import { type Options, type Settings, UsageError } from "./options.ts";
import { runShellCommand } from "./shell_command.ts";
import { openVolumeRequest } from "./volume_request.ts";

/** IP addresses with or without a port, separated by commas. */
function addressList(defaultPort: string): z.ZodType<readonly TransportAddress[], string> {
  return z.string().transform((list, check) =>
    list.split(",").flatMap((text) => {
      const bare = text.includes(":") && !text.startsWith("[") ? `[${text}]` : text;
      const address = parseAddress(text) ?? parseAddress(`${bare}:${defaultPort}`);
      if (address === undefined) check.addIssue(`"${text}" is not an IP address, or one with a port`);
      return address === undefined ? [] : [address];
    })
  );
}

const attachOptions = {
  ...volumeOptions,
  ...connectionOptions,
  address: {
    value: "LIST",
    meaning:
      "with --nqn and --attach=direct: IP[:PORT] of I/O controllers, separated by commas; port 4420 if none is given",
    schema: addressList("4420").optional(),
  },
  discovery: {
    value: "LIST",
    meaning: "with --nqn and --attach=discovery-client: IP[:PORT] of discovery controllers; port 8009 if none is given",
    schema: addressList("8009").optional(),
  },
  ...keyOptions,
  "volume-attributes": {
    value: "LIST",
    meaning:
      "volumeAttributes of the PersistentVolume, key=value separated by commas; PoseidonOS needs them, and LightOS " +
      "in-band-auth",
    schema: z.string().regex(/^[^=,]+=[^=,]*(,[^=,]+=[^=,]*)*$/, "is not key=value,key=value")
      .transform((list): Record<string, string> =>
        Object.fromEntries(list.split(",").map((pair) => [pair.split("=")[0] ?? "", pair.split("=")[1] ?? ""]))
      ).optional(),
  },
  fs: {
    value: "TYPE",
    meaning:
      "with --mount: the file system that the volume has to have; with --format: the one that it gets, ext4 if none is given",
    schema: z.enum(["ext4", "xfs", "btrfs"], { error: "is not ext4, xfs or btrfs" }).optional(),
  },
  "read-only": { meaning: "with --mount: mount it read-only", schema: switchSchema },
  format: {
    meaning: "with --mount: make a file system if the volume is blank; without this, nothing is ever formatted",
    schema: switchSchema,
  },
  json: { meaning: "print what was attached as JSON", schema: switchSchema },
} as const satisfies Options;

const helpText = `usage: lbcsi attach VOLUME_ID --node-id ID [--mount DIR [--format] [--read-only]] ...
       lbcsi attach --uuid UUID --nqn NQN --address IP[:PORT],... --node-id ID ...

Connects this machine to a volume as the node plugin does, without an orchestrator, and prints its block device. It may be
repeated. It rejects a volume that another host has access to, and never overwrites what is on a volume: only --format makes
a file system, and only on a device that was read and found blank.

${exitStatusText}`;

/** `lbcsi attach`. */
export const attachCommand = defineCommand(attachOptions, run, helpText);

type AttachSettings = Settings<typeof attachOptions>;

async function run(settings: AttachSettings): Promise<number> {
  assertAttachSettings(settings);
  return await runShellCommand("attach the volume", settings, async (ctx) => {
    await attach(ctx, settings);
  });
}

function assertAttachSettings(settings: AttachSettings): void {
  const { mount, fs, format, "read-only": readOnly, address = [], discovery = [] } = settings;
  if (mount === undefined && (fs !== undefined || format || readOnly)) {
    throw new UsageError("--fs, --format and --read-only are for --mount, which is missing");
  }
  if (format && readOnly) throw new UsageError("--format and --read-only exclude each other");
  const needed = settings.attach === "direct" ? { address } : { discovery };
  for (const [name, list] of Object.entries(needed)) {
    if (settings.volume === undefined && settings.nqn !== undefined && list.length === 0) {
      throw new UsageError(
        `--${name} is missing: with --nqn and --attach=${settings.attach} it says where to connect`,
      );
    }
  }
  if (settings.attach !== "direct" && settings["dhchap-key-file"] !== undefined) {
    throw new UsageError(
      "--dhchap-key-file: with --attach=discovery-client the daemon has the keys, not this command",
    );
  }
  assertDiscoveryDirectory(settings["discovery-dir"]);
}

/** Attaches, and prints the device before anything is closed: a script needs it even when closing fails. */
async function attach(ctx: RequestContext, settings: AttachSettings): Promise<void> {
  const { mount, fs, format, "read-only": readOnly, address = [], discovery = [] } = settings;
  await using opened = await openVolumeRequest(settings, ctx.log, {
    addresses: address,
    discovery,
    volumeContext: settings["volume-attributes"],
    tuning: connectionTuning(settings),
    keys: readKeyFiles(settings),
  });
  const { machine, request, hostEncryption } = opened;
  if (format && hostEncryption !== undefined) {
    throw new UsageError(
      `--format: the volume is encrypted on its host (${hostEncryption}), so it must not get a file system in clear text`,
    );
  }
  const { assertReady, mountPrograms } = await import("./readiness.ts");
  await assertReady(ctx, machine.host, {
    rights: settings.attach === "direct" || mount !== undefined,
    nvme: true,
    programs: {
      ...(settings.attach === "direct" ? { "nvme-cli": ["nvme"] } : {}),
      ...(mount === undefined ? {} : mountPrograms(fs ?? (format ? "ext4" : undefined))),
    },
  });
  const { attachVolume } = await import("./attach_volume.ts");
  const mountRequest: MountRequest | undefined = mount === undefined
    ? undefined
    : { path: mount, fsType: fs, readOnly, format };
  const attached = await attachVolume(ctx, machine, request, mountRequest);
  console.log(describeAttached(attached, settings.json));
}

function describeAttached({ device, mount }: Attached, json: boolean): string {
  const { uuid, path, sizeBytes, subsystemNqn } = device;
  if (json) {
    return JSON.stringify({ uuid, device: path, sizeBytes: Number(sizeBytes), subsystemNqn, mount }, undefined, 2);
  }
  return mount === undefined ? path : `${path} ${mount.path}`;
}

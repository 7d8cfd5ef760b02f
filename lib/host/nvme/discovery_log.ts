/** Reads the log page of a discovery controller: the addresses of subsystems. */
import * as z from "zod";
import type { RequestContext } from "../../context.ts";
import { formatAddress, parseAddress, type TransportAddress } from "../../namespace.ts";
import type { Host } from "../host.ts";
import type { NvmeController } from "./controllers.ts";
import { wordsOf } from "./nvme_cli.ts";

/** What a discovery controller reports. */
export interface DiscoveryLog {
  /** Changes with its content. */
  readonly generation: bigint;
  /** I/O controllers for this host NQN, over TCP. */
  readonly controllers: readonly { readonly subsystemNqn: string; readonly address: TransportAddress }[];
  /** Other discovery controllers, over TCP. */
  readonly referrals: readonly TransportAddress[];
}

const discoverySchema = z.object({
  genctr: z.number().int().nonnegative(),
  records: z.array(z.object({
    trtype: z.string(),
    subtype: z.string(),
    trsvcid: z.string(),
    subnqn: z.string(),
    traddr: z.string(),
  })),
});

/**
 * Reads the discovery log page over an existing connection, with nvme-cli: sysfs does not show the page.
 *
 * @param controller a live discovery controller; nvme-cli does not wait for one that is connecting
 * @throws StatusError UNAVAILABLE when it cannot be read, INTERNAL when the output of nvme-cli is not understood
 */
export async function readDiscoveryLog(
  host: Host,
  outer: RequestContext,
  controller: NvmeController,
): Promise<DiscoveryLog> {
  const ctx = outer.doing(`read the discovery log page over ${controller.name} (${controller.address})`);
  const result = await host.run("nvme", ["discover", `--device=${controller.name}`, "--output-format=json"], {
    signal: ctx.signal,
    onAbort: "kill",
    log: ctx.log,
  });
  if (result.code !== 0) {
    throw ctx.error("UNAVAILABLE", `${wordsOf(result) || `nvme exits ${result.code}`}`);
  }
  let json: unknown;
  try {
    json = JSON.parse(result.stdout);
  } catch (error) {
    throw ctx.error("INTERNAL", `nvme-cli's answer is not JSON`, { cause: error });
  }
  const parsed = discoverySchema.safeParse(json);
  if (!parsed.success) {
    const problems = parsed.error.issues.map(({ path, message }) => `${path.join(".")}: ${message}`).join("; ");
    throw ctx.error("INTERNAL", `nvme-cli's answer is not understood (${problems})`);
  }
  const records = parsed.data.records.filter(({ trtype }) => trtype === "tcp").flatMap((record) => {
    // Some storage servers pad the fixed-length fields of the page with blanks.
    const text = record.traddr.trim();
    const address = parseAddress(formatAddress({ traddr: text, trsvcid: record.trsvcid.trim() }));
    return address === undefined ? [] : [{ subtype: record.subtype, subsystemNqn: record.subnqn.trim(), address }];
  });
  return {
    generation: BigInt(parsed.data.genctr),
    controllers: records.filter(({ subtype }) => subtype === "nvme subsystem")
      .map(({ subsystemNqn, address }) => ({ subsystemNqn, address })),
    referrals: records.filter(({ subtype }) => subtype === "discovery subsystem referral")
      .map(({ address }) => address),
  };
}

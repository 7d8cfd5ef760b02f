/**
 * The subcommands of lbcsi. Each one is loaded when it is used, so a node plugin never pays for a simulator, and
 * `lbcsi version` loads nothing else.
 */
import { StatusError } from "../error.ts";
import { didYouMean } from "../suggestion.ts";
import type { Command, CommandSummary } from "./command.ts";
import { describeOptions, UsageError } from "./options.ts";
import { describeProgram, version } from "./version.ts";

interface TableEntry {
  /** One line for the list of commands. */
  readonly summary: string;
  load(): Promise<Command>;
}

const commandTable: Readonly<Record<string, TableEntry>> = {
  controller: {
    summary: "serve the CSI identity and controller services",
    load: async () => (await import("./controller.ts")).controllerCommand,
  },
  node: {
    summary: "serve the CSI identity and node services",
    load: async () => (await import("./node.ts")).nodeCommand,
  },
  identity: {
    summary: "serve the CSI identity service alone",
    load: async () => (await import("./identity.ts")).identityCommand,
  },
  sweep: {
    summary: "list or remove the inline volumes that a dead node has left behind",
    load: async () => (await import("./sweep.ts")).sweepCommand,
  },
  simulate: {
    summary: "run a simulated storage cluster for trials and tests",
    load: async () => (await import("./simulate.ts")).simulateCommand,
  },
  attach: {
    summary: "attach a volume to this machine by hand, and mount it",
    load: async () => (await import("./attach.ts")).attachCommand,
  },
  detach: {
    summary: "undo lbcsi attach",
    load: async () => (await import("./detach.ts")).detachCommand,
  },
  list: {
    summary: "show the volumes on this machine, their paths and mounts",
    load: async () => (await import("./list.ts")).listCommand,
  },
  doctor: {
    summary: "check this machine and the cluster",
    load: async () => (await import("./doctor.ts")).doctorCommand,
  },
  "discovery-client": {
    summary: "keep this machine connected to the subsystems that the files of a directory name",
    load: async () => (await import("./discovery_client.ts")).discoveryClientCommand,
  },
  completion: {
    summary: "print a script that lets a shell complete lbcsi's options",
    load: async () => (await import("./completion.ts")).completionCommand,
  },
  demo: {
    summary: "create, use and delete volumes on a simulated cluster",
    load: async () => (await import("./demo.ts")).demoCommand,
  },
};

/**
 * Runs the command that `args` names, and gives the exit status: 2 for arguments that cannot be used, 1 for a failure that
 * was foreseen. Anything else is thrown.
 */
export async function runCommandLine(args: readonly string[]): Promise<number> {
  const [name, ...rest] = args;
  if (name === undefined || name === "help" || name === "--help" || name === "-h") {
    console.log(helpOfProgram());
    return name === undefined ? 2 : 0;
  }
  if (name === "version" || name === "--version") {
    console.log(describeProgram());
    return 0;
  }
  const entry = Object.hasOwn(commandTable, name) ? commandTable[name] : undefined;
  if (entry === undefined) {
    const meant = didYouMean(name, Object.keys(commandTable));
    console.error(`lbcsi: there is no command "${name}"${meant || ";"} lbcsi --help lists them`);
    return 2;
  }
  const command = await entry.load();
  if (rest.includes("--help") || rest.includes("-h")) {
    console.log(helpOfCommand(name, entry.summary, command));
    return 0;
  }
  return await runCommand(name, command, rest);
}

async function runCommand(name: string, command: Command, args: readonly string[]): Promise<number> {
  try {
    return await command.run(args, listCommands);
  } catch (error) {
    if (error instanceof UsageError) {
      console.error(`lbcsi ${name}: ${error.message}\nlbcsi ${name} --help lists the options.`);
      return 2;
    }
    if (error instanceof StatusError) {
      console.error(`lbcsi ${name}: ${error.message}`);
      return 1;
    }
    throw error;
  }
}

async function listCommands(): Promise<readonly CommandSummary[]> {
  return await Promise.all(
    Object.entries(commandTable).map(async ([name, { summary, load }]) => ({
      name,
      summary,
      options: (await load()).options,
    })),
  );
}

function helpOfProgram(): string {
  const width = Math.max(...Object.keys(commandTable).map((name) => name.length)) + 2;
  const rows = Object.entries(commandTable).map(([name, { summary }]) => `  ${name.padEnd(width)}${summary}`);
  return [
    `lbcsi ${version}: CSI driver for NVMe/TCP storage`,
    "",
    "usage: lbcsi COMMAND [OPTIONS]",
    "",
    ...rows,
    `  ${"version".padEnd(width)}print the version`,
    "",
    "lbcsi COMMAND --help lists the options of a command.",
  ].join("\n");
}

function helpOfCommand(name: string, summary: string, { helpText, options }: Command): string {
  const text = helpText === undefined ? [] : ["", helpText];
  return [`lbcsi ${name}: ${summary}`, ...text, "", describeOptions(options)].join("\n");
}

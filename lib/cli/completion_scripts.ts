/**
 * Completion scripts for shells, made from the same tables as the help text, so they cannot offer an option that does not
 * exist.
 *
 * A shell sources the script once; pressing Tab starts no program of this driver.
 */
import type { CommandSummary } from "./command.ts";
import { choicesOf } from "./option_schemas.ts";
import type { Option } from "./options.ts";

/** The shells that have a completion script. */
export const shells = ["bash", "zsh", "fish"] as const;
/** One of them. */
export type Shell = typeof shells[number];

/** The completion script of a shell, for `source <(lbcsi completion bash)`. */
export function completionScript(shell: Shell, commands: readonly CommandSummary[]): string {
  return { bash, zsh, fish }[shell](commands);
}

interface Flag {
  /** `--log-level`, `-l`. */
  readonly spellings: readonly string[];
  readonly meaning: string;
  /** What may follow it. Undefined: it takes no value. */
  readonly value: Value | undefined;
}

type Value = { readonly kind: "choices"; readonly choices: readonly string[] } | {
  readonly kind: "file" | "directory" | "text";
};

const helpFlag: Flag = { spellings: ["--help", "-h"], meaning: "list the options", value: undefined };

function flagsOf({ options }: CommandSummary): readonly Flag[] {
  const flags = Object.entries(options).filter(([, option]) => !option.word).map(([name, option]) => ({
    spellings: [`--${name}`, ...option.short === undefined ? [] : [`-${option.short}`]],
    meaning: option.meaning,
    value: option.value === undefined ? undefined : valueOf(option),
  }));
  return [...flags, helpFlag];
}

/** What the positional argument may be; a command has at most one. */
function wordOf({ options }: CommandSummary): Value | undefined {
  const word = Object.values(options).find((option) => option.word);
  return word === undefined ? undefined : valueOf(word);
}

function valueOf(option: Option): Value {
  const choices = choicesOf(option);
  if (choices.length > 0) return { kind: "choices", choices };
  if (option.value === "FILE") return { kind: "file" };
  if (option.value === "DIR" || option.value === "PATH") return { kind: "directory" };
  return { kind: "text" };
}

const quote = (text: string) => `'${text.replaceAll("'", `'\\''`)}'`;

function bash(commands: readonly CommandSummary[]): string {
  const reply = (value: Value) => {
    switch (value.kind) {
      case "choices":
        return `COMPREPLY=($(compgen -W ${quote(value.choices.join(" "))} -- "$word"))`;
      case "file":
        return `compopt -o filenames; COMPREPLY=($(compgen -f -- "$word"))`;
      case "directory":
        return `compopt -o filenames; COMPREPLY=($(compgen -d -- "$word"))`;
      case "text":
        return "COMPREPLY=()";
    }
  };
  const cases = commands.map((command) => {
    const flags = flagsOf(command);
    const values = flags.flatMap(({ spellings, value }) =>
      value === undefined ? [] : [`        ${spellings.join("|")}) ${reply(value)}; return ;;`]
    );
    const word = wordOf(command);
    return [
      `    ${command.name})`,
      `      case "$before" in`,
      ...values,
      "      esac",
      ...word === undefined || word.kind === "text"
        ? []
        : [`      if [[ "$word" != -* ]]; then ${reply(word)}; return; fi`],
      `      COMPREPLY=($(compgen -W ${quote(flags.flatMap(({ spellings }) => spellings).join(" "))} -- "$word"))`,
      "      ;;",
    ].join("\n");
  });
  // "=" ends a word in bash, so "--attach=d" is three words here.
  return `# Completion of lbcsi for bash: source <(lbcsi completion bash)
_lbcsi() {
  local word="\${COMP_WORDS[COMP_CWORD]}" before="\${COMP_WORDS[COMP_CWORD - 1]}"
  if [[ "$word" == = ]]; then
    word=""
  elif [[ "$before" == = && COMP_CWORD -ge 2 ]]; then
    before="\${COMP_WORDS[COMP_CWORD - 2]}"
  fi
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W ${quote([...commands.map(({ name }) => name), "--help"].join(" "))} -- "$word"))
    return
  fi
  case "\${COMP_WORDS[1]}" in
${cases.join("\n")}
  esac
}
complete -F _lbcsi lbcsi
`;
}

function zsh(commands: readonly CommandSummary[]): string {
  // These characters have a special meaning in the specifications of _arguments.
  const plain = (text: string) => text.replace(/[\\[\]:]/g, "\\$&");
  const action = (value: Value) => {
    switch (value.kind) {
      case "choices":
        return `(${value.choices.join(" ")})`;
      case "file":
        return "_files";
      case "directory":
        return "_files -/";
      case "text":
        return " ";
    }
  };
  const cases = commands.map((command) => {
    const flags = flagsOf(command).flatMap(({ spellings, meaning, value }) =>
      spellings.map((spelling) => {
        const takes = value === undefined ? "" : `:value:${action(value)}`;
        const joined = value === undefined ? "" : spelling.startsWith("--") ? "=" : "+";
        return quote(`${spelling}${joined}[${plain(meaning)}]${takes}`);
      })
    );
    const word = wordOf(command);
    if (word !== undefined) flags.push(quote(`1:value:${action(word)}`));
    return `    ${command.name}) _arguments ${flags.join(" ")} ;;`;
  });
  return `#compdef lbcsi
# Completion of lbcsi for zsh: source <(lbcsi completion zsh), after compinit
_lbcsi() {
  if (( CURRENT == 2 )); then
    local -a commands=(${commands.map(({ name, summary }) => quote(`${plain(name)}:${plain(summary)}`)).join(" ")})
    _describe command commands
    return
  fi
  local command=$words[2]
  shift words
  (( CURRENT-- ))
  case $command in
${cases.join("\n")}
  esac
}
compdef _lbcsi lbcsi
`;
}

function fish(commands: readonly CommandSummary[]): string {
  const escape = (text: string) => `'${text.replaceAll("\\", "\\\\").replaceAll("'", "\\'")}'`;
  const takes = (value: Value) => {
    switch (value.kind) {
      case "choices":
        return ` -x -a ${escape(value.choices.join(" "))}`;
      case "file":
        return " -r -F";
      case "directory":
        return " -x -a '(__fish_complete_directories)'";
      case "text":
        return " -x";
    }
  };
  const lines = commands.flatMap((command) => {
    const within = `complete -c lbcsi -n ${escape(`__fish_seen_subcommand_from ${command.name}`)}`;
    const flags = flagsOf(command).map(({ spellings, meaning, value }) => {
      const names = spellings.map((text) => text.startsWith("--") ? ` -l ${text.slice(2)}` : ` -s ${text.slice(1)}`);
      return `${within}${names.join("")} -d ${escape(meaning)}${value === undefined ? "" : takes(value)}`;
    });
    const word = wordOf(command);
    return word?.kind === "choices" ? [...flags, `${within} -a ${escape(word.choices.join(" "))}`] : flags;
  });
  return [
    "# Completion of lbcsi for fish: lbcsi completion fish | source",
    "complete -c lbcsi -f",
    ...commands.map(({ name, summary }) =>
      `complete -c lbcsi -n __fish_use_subcommand -a ${name} -d ${escape(summary)}`
    ),
    ...lines,
    "",
  ].join("\n");
}

/**
 * The texts in a TypeScript source, for tests that compare documents with what the program can say.
 */

/** One text: what stands in a string or template, with `…` for each value in it; texts joined by `+` are one. */
export interface Literal {
  readonly text: string;
  /** The code before it, up to 40 characters without blanks: `refuse(`. */
  readonly before: string;
}

/** All texts of `source`, those within the values of templates too. Comments and regular expressions are skipped. */
export function literalsIn(source: string): readonly Literal[] {
  const found: Literal[] = [];
  scan(source, 0, found);
  return found;
}

/** Reads code from `at` to its end, or to the brace that closes a template's value; gives the place behind it. */
function scan(source: string, at: number, found: Literal[]): number {
  let code = "";
  let open: { text: string; before: string } | undefined;
  let depth = 0;
  const close = () => {
    if (open !== undefined) found.push(open);
    open = undefined;
  };
  while (at < source.length) {
    const char = source[at] ?? "";
    if (source.startsWith("//", at)) at = endOf(source, "\n", at);
    else if (source.startsWith("/*", at)) at = endOf(source, "*/", at);
    else if (char === "/" && /(?:^|[(,=:[!&|?{};>]|return)$/.test(code.trimEnd().slice(-8))) {
      at = behindRegExp(source, at);
      code += "/r/";
    } else if (char === '"' || char === "'" || char === "`") {
      const { text, next } = readLiteral(source, at, found);
      if (open !== undefined && code.trim() === "+") open.text += text;
      else {
        close();
        open = { text, before: code.replace(/\s/g, "").slice(-40) };
      }
      // A status code before a message tells that the message is an error: `ctx.error("ABORTED", "…")`.
      code = /\.error\(\s*$/.test(code) ? `${code.trimEnd()}"${text}"` : "";
      at = next;
      continue;
    } else {
      if (char === "{") depth++;
      if (char === "}" && depth-- === 0) break;
      code += char;
      at++;
      continue;
    }
  }
  close();
  return at + 1;
}

function readLiteral(
  source: string,
  start: number,
  found: Literal[],
): { readonly text: string; readonly next: number } {
  const quote = source[start];
  let text = "";
  let at = start + 1;
  while (at < source.length && source[at] !== quote) {
    if (source[at] === "\\") {
      text += source[at + 1] === "n" ? "\n" : source[at + 1] ?? "";
      at += 2;
    } else if (quote === "`" && source.startsWith("${", at)) {
      text += "…";
      at = scan(source, at + 2, found);
    } else text += source[at++] ?? "";
  }
  return { text, next: at + 1 };
}

function endOf(source: string, mark: string, at: number): number {
  const end = source.indexOf(mark, at);
  return end < 0 ? source.length : end + mark.length;
}

function behindRegExp(source: string, start: number): number {
  let inClass = false;
  for (let at = start + 1; at < source.length; at++) {
    const char = source[at];
    if (char === "\\") at++;
    else if (char === "[") inClass = true;
    else if (char === "]") inClass = false;
    else if (char === "/" && !inClass) return at + 1;
  }
  return source.length;
}

/** Finds the known word that an unknown one was most likely meant to be, and how far two words are apart. */

/**
 * The word of `known` that `word` was most likely meant to be: the one with the fewest slips of the keyboard (a character
 * added, left out, replaced, or swapped with its neighbour). One slip for each three characters is allowed, and at least one.
 * Case and the separators "-", "_" and "." do not count. Undefined when none is close.
 */
export function closestWord(word: string, known: readonly string[]): string | undefined {
  const plain = plainForm(word);
  let best: string | undefined;
  let fewest = Math.max(1, Math.floor(plain.length / 3)) + 1;
  for (const candidate of known) {
    const slips = slipsBetween(plain, plainForm(candidate));
    if (slips >= fewest) continue;
    best = candidate;
    fewest = slips;
  }
  return best;
}

/**
 * What is wrong with keys that a map may not have:
 * `"replica-cuont" (did you mean "replica-count"?), "colour" unknown (known: replica-count, compression)`.
 */
export function unknownKeys(keys: readonly string[], known: readonly string[]): string {
  const named = keys.map((key) => {
    const meant = closestWord(key, known);
    return meant === undefined ? `"${key}"` : `"${key}" (did you mean "${meant}"?)`;
  });
  return `${named.join(", ")} unknown (known: ${known.join(", ")})`;
}

/** `, did you mean "replica-count"?`, to follow an unknown word in a message; empty when no known word is close. */
export function didYouMean(word: string, known: readonly string[]): string {
  const meant = closestWord(word, known);
  return meant === undefined ? "" : `, did you mean "${meant}"?`;
}

/** Longer words are cut: comparing them costs the square of their length, and no known word is that long. */
const longestWord = 100;

function plainForm(word: string): string {
  return word.slice(0, longestWord).toLowerCase().replace(/[-_.]/g, "");
}

/**
 * How many slips of the keyboard turn one text into the other: the restricted Damerau-Levenshtein distance, in which a
 * swapped pair of letters is not changed again.
 */
export function slipsBetween(a: string, b: string): number {
  let beforePrevious: number[] = [];
  let previous = Array.from({ length: b.length + 1 }, (_, column) => column);
  for (let row = 1; row <= a.length; row++) {
    const current = [row];
    for (let column = 1; column <= b.length; column++) {
      const isSame = a[row - 1] === b[column - 1];
      let slips = Math.min(
        at(previous, column) + 1,
        at(current, column - 1) + 1,
        at(previous, column - 1) + (isSame ? 0 : 1),
      );
      if (row > 1 && column > 1 && a[row - 1] === b[column - 2] && a[row - 2] === b[column - 1]) {
        slips = Math.min(slips, at(beforePrevious, column - 2) + 1);
      }
      current.push(slips);
    }
    [beforePrevious, previous] = [previous, current];
  }
  return at(previous, b.length);
}

function at(numbers: readonly number[], index: number): number {
  return numbers[index] ?? Infinity;
}

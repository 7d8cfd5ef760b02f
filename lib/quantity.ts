/**
 * Kubernetes quantities, as people write sizes: `10Gi`, `1.5T`, `1e9`, bytes without a suffix.
 */

const factors: Readonly<Record<string, readonly [base: bigint, power: bigint]>> = {
  "": [1000n, 0n],
  k: [1000n, 1n],
  M: [1000n, 2n],
  G: [1000n, 3n],
  T: [1000n, 4n],
  P: [1000n, 5n],
  E: [1000n, 6n],
  Ki: [1024n, 1n],
  Mi: [1024n, 2n],
  Gi: [1024n, 3n],
  Ti: [1024n, 4n],
  Pi: [1024n, 5n],
  Ei: [1024n, 6n],
};

/**
 * The bytes that a quantity names, a part of one counted as one; undefined for a text that is no quantity, for a negative
 * one and for zero. The suffixes for thousandths and less are quantities in Kubernetes, but no sizes.
 */
export function parseQuantity(text: string): bigint | undefined {
  const match = /^\+?(\d{0,20})(?:\.(\d{0,20}))?(?:([kMGTPE]|[KMGTPE]i)|[eE]\+?(\d{1,2}))?$/.exec(text);
  if (match === null) return undefined;
  const [, whole = "", fraction = "", suffix = "", exponent = "0"] = match;
  if (whole + fraction === "") return undefined;
  const [base, power] = factors[suffix] ?? [1000n, 0n];
  const unscaled = BigInt(whole + fraction) * base ** power * 10n ** BigInt(exponent);
  const scale = 10n ** BigInt(fraction.length);
  const bytes = (unscaled + scale - 1n) / scale;
  return bytes === 0n ? undefined : bytes;
}

/**
 * Requests as an attacker would send them: any message of a schema, with fields that are missing, almost right, huge, or
 * written to be taken for something else (an option, a path elsewhere, a key of a prototype).
 */
import { create, type DescField, type DescMessage, type Message, ScalarType } from "@bufbuild/protobuf";
import fc from "fast-check";

/** Begins every text that must never become an argument of its own. */
export const injected = "--injected";

/** Any message of `schema`; `words` are texts that get further than arbitrary ones, IDs and paths that exist. */
export function randomMessage(schema: DescMessage, words: readonly string[], depth = 0): fc.Arbitrary<Message> {
  const fields = schema.members.map((member) => {
    if (member.kind === "oneof") {
      const cases = member.fields.map((field) =>
        valueOf(field, words, depth).map((value) => ({ case: field.localName, value }))
      );
      return [member.localName, fc.oneof(fc.constant({ case: undefined }), ...cases)] as const;
    }
    return [member.localName, fc.option(valueOf(member, words, depth), { nil: undefined })] as const;
  });
  return fc.record(Object.fromEntries(fields)).map((values) => create(schema, values));
}

/** `good` with some of its fields as `randomMessage` would have them: what gets past the first checks. */
export function spoiledMessage(
  schema: DescMessage,
  good: Readonly<Record<string, unknown>>,
  words: readonly string[],
): fc.Arbitrary<Message> {
  const names = schema.members.map(({ localName }) => localName);
  return fc.tuple(randomMessage(schema, words), fc.subarray(names, { maxLength: Math.min(2, names.length) })).map(
    ([random, spoiled]) => {
      const values = Object.entries(random).filter(([name]) => spoiled.includes(name));
      return create(schema, { ...good, ...Object.fromEntries(values) });
    },
  );
}

function valueOf(field: DescField, words: readonly string[], depth: number): fc.Arbitrary<unknown> {
  switch (field.fieldKind) {
    case "message":
      return depth > 3 ? fc.constant(undefined) : randomMessage(field.message, words, depth + 1);
    case "enum":
      return fc.oneof(
        fc.constantFrom(...field.enum.values.map(({ number }) => number)),
        fc.integer({ min: 0, max: 99 }),
      );
    case "scalar":
      return scalar(field.scalar, words);
    case "list": {
      const element = field.listKind === "message"
        ? randomMessage(field.message, words, depth + 1)
        : field.listKind === "enum"
        ? fc.constantFrom(...field.enum.values.map(({ number }) => number))
        : scalar(field.scalar, words);
      return fc.array(element, { maxLength: 3 });
    }
    case "map": {
      const value = field.mapKind === "scalar" ? scalar(field.scalar, words) : fc.constant(undefined);
      return fc.dictionary(text(words), value, { maxKeys: 4 });
    }
  }
}

function scalar(type: ScalarType, words: readonly string[]): fc.Arbitrary<unknown> {
  switch (type) {
    case ScalarType.STRING:
      return text(words);
    case ScalarType.BOOL:
      return fc.boolean();
    case ScalarType.BYTES:
      return fc.uint8Array({ maxLength: 64 });
    case ScalarType.INT64:
    case ScalarType.SINT64:
    case ScalarType.SFIXED64:
      return fc.oneof(fc.bigInt(-(1n << 63n), (1n << 63n) - 1n), fc.constantFrom(0n, 1n << 30n, (1n << 63n) - 1n));
    case ScalarType.UINT64:
    case ScalarType.FIXED64:
      return fc.oneof(fc.bigInt(0n, (1n << 64n) - 1n), fc.constantFrom(0n, 1n << 30n));
    case ScalarType.UINT32:
    case ScalarType.FIXED32:
      return fc.nat(0xffffffff);
    case ScalarType.DOUBLE:
    case ScalarType.FLOAT:
      return fc.float();
    default:
      return fc.integer();
  }
}

/** A text: mostly one of `words`, whole, changed a little or put together; otherwise anything. */
function text(words: readonly string[]): fc.Arbitrary<string> {
  const word = fc.constantFrom(
    ...words,
    ...["", " ", "..", "/", "/..", "\0", "\n", injected, `${injected}=x`, "-o", "__proto__", "constructor", "%n", "é"],
  );
  return fc.oneof(
    { weight: 6, arbitrary: fc.constantFrom(...words) },
    { weight: 2, arbitrary: fc.tuple(word, word).map(([a, b]) => a + b) },
    { weight: 2, arbitrary: fc.array(word, { maxLength: 4 }).map((parts) => parts.join("/")) },
    { weight: 1, arbitrary: fc.string({ unit: "binary", maxLength: 40 }) },
    { weight: 1, arbitrary: fc.constantFrom("x".repeat(5000), `/${"y/".repeat(3000)}`, "🜁".repeat(500)) },
  );
}

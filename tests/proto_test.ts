import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import {
  type DescEnum,
  type DescExtension,
  type DescField,
  type DescMessage,
  type DescService,
  getOption,
  ScalarType,
} from "@bufbuild/protobuf";
import * as csi from "../proto/gen/csi_pb.ts";

Deno.test("proto/gen is up to date with proto/*.proto", async () => {
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--quiet", fileURLToPath(new URL("../proto/generate.ts", import.meta.url)), "--check"],
  }).output();

  assert.equal(code, 0, new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr));
});

/** The lines of a fact table. */
function expectedFacts(name: string): string[] {
  const text = Deno.readTextFileSync(new URL(`./fixtures/${name}`, import.meta.url));
  return text.split("\n").filter((line) => line !== "" && !line.startsWith("#"));
}

const own = (typeName: string) => typeName.replace(/^csi\.v1\./, "");
const marks = (...flags: readonly (readonly [mark: string, set: boolean])[]) =>
  flags.map(([mark, set]) => set ? ` ${mark}` : "").join("");

function fieldType(field: DescField): string {
  switch (field.fieldKind) {
    case "scalar":
      return ScalarType[field.scalar].toLowerCase();
    case "enum":
      return own(field.enum.typeName);
    case "message":
      return own(field.message.typeName);
    case "list":
      if (field.listKind === "scalar") return `${ScalarType[field.scalar].toLowerCase()} repeated`;
      return `${own(field.listKind === "enum" ? field.enum.typeName : field.message.typeName)} repeated`;
    case "map":
      assert.equal(field.mapKind, "scalar");
      return `map<${ScalarType[field.mapKey].toLowerCase()},${
        field.scalar === undefined ? "?" : ScalarType[field.scalar].toLowerCase()
      }>`;
  }
}

function messageFacts(message: DescMessage): string[] {
  const name = own(message.typeName);
  const fields = message.fields.map((field) => {
    const optional = field.oneof === undefined && field.proto.proto3Optional;
    const oneof = field.oneof === undefined ? "" : ` oneof=${field.oneof.name}`;
    const secret = getOption(field, csi.csi_secret);
    const alpha = getOption(field, csi.alpha_field);
    return `${field.number} ${name}.${field.name} ${fieldType(field)}` +
      marks(["optional", optional]) + oneof + marks(["secret", secret], ["alpha", alpha]);
  });
  return [
    `message ${name}${marks(["alpha", getOption(message, csi.alpha_message)])}`,
    ...fields,
    ...message.nestedMessages.filter(({ proto }) => !proto.options?.mapEntry).flatMap(messageFacts),
    ...message.nestedEnums.flatMap(enumFacts),
  ];
}

function enumFacts(description: DescEnum): string[] {
  const name = own(description.typeName);
  return [
    `enum ${name}${marks(["alpha", getOption(description, csi.alpha_enum)])}`,
    ...description.values.map((value) =>
      `${value.number} ${name}.${value.name}${marks(["alpha", getOption(value, csi.alpha_enum_value)])}`
    ),
  ];
}

function serviceFacts(service: DescService): string[] {
  const name = own(service.typeName);
  return [
    `service ${name}${marks(["alpha", getOption(service, csi.alpha_service)])}`,
    ...service.methods.map((method) => {
      assert.ok(method.methodKind === "unary" || method.methodKind === "server_streaming");
      const stream = method.methodKind === "server_streaming" ? "stream " : "";
      return `rpc ${name}.${method.name} ${own(method.input.typeName)} ${stream}${own(method.output.typeName)}` +
        marks(["alpha", getOption(method, csi.alpha_method)]);
    }),
  ];
}

function extensionFact(extension: DescExtension): string {
  const extendee = extension.extendee.typeName.replace("google.protobuf.", "");
  assert.equal(extension.fieldKind, "scalar");
  const type = extension.fieldKind === "scalar" ? ScalarType[extension.scalar].toLowerCase() : "";
  return `extension ${extendee} ${extension.number} ${extension.name} ${type}`;
}

Deno.test("csi.proto has every message, field, enum value, method and mark of CSI 1.12 and 1.13, and nothing else", () => {
  const file = csi.file_csi;

  const facts = [
    ...file.services.flatMap(serviceFacts),
    ...file.messages.flatMap(messageFacts),
    ...file.enums.flatMap(enumFacts),
    ...file.extensions.map(extensionFact),
  ].sort();

  assert.equal(file.proto.package, "csi.v1");
  assert.equal(file.proto.syntax, "proto3");
  assert.deepEqual(facts, [...expectedFacts("csi_wire.txt"), ...expectedFacts("csi_wire_1_13.txt")].sort());
  assert.ok(facts.length > 300);
});

Deno.test("csi.proto marks every map of secrets as secret, and nothing else", () => {
  const fields = csi.file_csi.messages.flatMap(({ fields }) => fields);

  for (const field of fields) {
    assert.equal(getOption(field, csi.csi_secret), field.name === "secrets", `${field.parent.typeName}.${field.name}`);
  }
  assert.equal(fields.filter(({ name }) => name === "secrets").length, 22);
});

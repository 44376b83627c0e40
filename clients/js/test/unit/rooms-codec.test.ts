// Envelopes in both forms: the generated code is current, and text and binary say the same.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { fromBinary, fromJson, type JsonValue, toBinary, toJson } from "@bufbuild/protobuf";
import { expect, test } from "vitest";
import { binary } from "../../src/rooms/binary.ts";
import { json } from "../../src/rooms/json.ts";
import { EnvelopeSchema } from "../../src/rooms/v1/rooms_pb.ts";
import { CHAT, type Outgoing, PRESENCE } from "../../src/rooms/wire.ts";

const file = (path: string): Buffer => readFileSync(fileURLToPath(new URL(path, import.meta.url)));

test("the generated code is that of rooms.proto", () => {
  const hash = createHash("sha256").update(file("../../../../spec/rooms/v1/rooms.proto")).digest("hex");
  expect(String(file("../../src/rooms/v1/rooms_pb.ts")), "npm run generate").toContain(hash);
});

const position = { x: 0.5, y: -1, z: 3 };
const rotation = { x: 0, y: 0.5, z: 0, w: 1 };

test.each<Outgoing>([
  { clientHello: { clientId: "c", displayName: "Ada", version: 1, features: ["batch", "acks"], presence: { displayName: "Ada", position, avatarConfig: { height: 2 } } } },
  { positionUpdate: { entityId: "e", position, rotation, sequenceNumber: 7 } },
  { positionUpdate: { entityId: "e", position, rotation: undefined } },
  { messageId: "1", entitySpawn: { entityId: "e", templateId: "t", components: { a: "ä", __proto__: "x" } } },
  { entityUpdate: { entityId: "e", components: { a: new Uint8Array([0, 255]), b: new Uint8Array() } } },
  { entityDespawn: { entityId: "e" } },
  { chatMessage: { message: "m\u0000\ud83d\ude00" } },
  { to: "c-2", reliable: true, chatMessage: { message: "m", type: CHAT.WHISPER } },
  { presenceEvent: { eventType: PRESENCE.UPDATE, data: { displayName: "Ada", hostClientId: "h" } } },
  { ack: { seq: 2n ** 63n, more: [2n ** 64n - 1n] } },
  { custom: { name: "n", data: new Uint8Array([250, 251, 252, 253, 254, 255]) } },
])("what is said: %o", (message) => {
  const text = fromJson(EnvelopeSchema, JSON.parse(json.encode(message) as string) as JsonValue);
  expect(toJson(EnvelopeSchema, fromBinary(EnvelopeSchema, binary.encode(message) as Uint8Array))).toEqual(toJson(EnvelopeSchema, text));
});

/** Without the names of types and absent members, in which the forms differ. */
function plain(value: unknown): unknown {
  // Floats have single precision in protobuf.
  if (typeof value === "number") return Math.fround(value);
  if (typeof value !== "object" || value === null || value instanceof Uint8Array) return value;
  if (Array.isArray(value)) return value.map(plain);
  const members = Object.entries(value).filter(([name, each]) => !name.startsWith("$") && each !== undefined && each !== "");
  return Object.fromEntries(members.map(([name, each]) => [name, plain(each)]));
}

const player = { clientId: "c", displayName: "Ada", avatarUrl: "u", position: { x: 1 }, rotation: { w: 1 } };
const entity = { id: "e", templateId: "t", ownerId: "c", position: { y: 2 }, components: { a: "b" }, binaryComponents: { m: "/w==" } };

test.each<JsonValue>([
  { sender: "c", positionUpdate: { entityId: "e", position: { x: 1.5 }, sequenceNumber: 9 } },
  { sender: "c", seq: "18446744073709551615", reliable: true, to: "d", chatMessage: { message: "m", type: "SHOUT", timestamp: "-5", fromClientId: "c" } },
  { sender: "c", entitySpawn: { entityId: "e", templateId: "t", ownerId: "c", components: { a: "b" } } },
  { sender: "c", entityUpdate: { entityId: "e", components: { a: "_-8=", b: "" } } },
  { sender: "c", entityDespawn: { entityId: "e" } },
  { sender: "c", seq: "3", presenceEvent: { clientId: "c", eventType: "LEAVE" } },
  { sender: "c", presenceEvent: { clientId: "c", data: { displayName: "Ada", position: {}, hostClientId: "h" } } },
  { positionBatch: { entries: [{ sender: "c", update: { entityId: "e", position: { x: 1 } } }, { sender: "d" }], timestamp: "1" } },
  { error: { code: "rate_limited", message: "m", retryAfterMs: 5, messageId: "1" } },
  { custom: { name: "n", data: "AAEC" } },
  { sender: "c", clientHello: { clientId: "c" } },
  { serverHello: { serverVersion: "1", assignedClientId: "c", roomId: "r", connectionId: "k", initialState: { players: [player], entities: [entity], lastUpdate: "1" }, more: true } },
])("what is heard: %o", (message) => {
  const bytes = toBinary(EnvelopeSchema, fromJson(EnvelopeSchema, message));
  const heard = json.decode(JSON.stringify(message));
  const { case: kind } = heard?.payload ?? {};
  const other = binary.decode(bytes);
  if (kind === "other") return expect(other?.sender).toBe(heard?.sender);
  const known = plain(heard) as { payload: { value: object } };
  return expect(plain(other)).toMatchObject(known);
});

interface Case { name: string; kind: string; stamped: string; stamped_text?: JsonValue }
const { cases } = JSON.parse(String(file("../../../../spec/rooms/messages.json"))) as { cases: Case[] };
const KINDS_OF_CLIENTS = ["client_hello", "ack"];

test.each(cases)("spec/rooms: $name", ({ kind, stamped, stamped_text }) => {
  const heard = binary.decode(new Uint8Array(Buffer.from(stamped, "hex")));
  const name = heard?.payload.case.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
  // Messages that only clients send are not read here.
  if (!KINDS_OF_CLIENTS.includes(kind)) expect(name).toBe(kind);
  if (stamped_text === undefined) return;
  const read = json.decode(JSON.stringify(stamped_text));
  if (read?.payload.case === "other") expect(KINDS_OF_CLIENTS).toContain(kind);
  else expect(plain(heard)).toMatchObject(plain(read) as object);
});

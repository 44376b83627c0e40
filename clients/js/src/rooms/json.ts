// Envelopes as text: the JSON mapping of proto3, which leaves out what has its default, and writes int64 as text and bytes as base64.

import { isObject, type JsonObject, parse } from "../messages.ts";
import {
  type Avatar,
  CHAT,
  type Codec,
  type EntitySnapshot,
  type Limits,
  type Payload,
  type Payloads,
  type PlayerSnapshot,
  type PositionUpdate,
  PRESENCE,
  type PresenceData,
  type Rotation,
  type ServerHello,
  type Vector,
} from "./wire.ts";

/** The codec of text messages. */
export const json: Codec = {
  encode: (envelope) => JSON.stringify(envelope, (key, value) => write(key, value)),
  decode(body) {
    const message = typeof body === "string" ? parse(body) : undefined;
    if (!isObject(message)) return undefined;
    try {
      const payload = readPayload(message);
      return payload && { sender: str(message["sender"]), reliable: message["reliable"] === true, seq: int(message["seq"]), to: str(message["to"]), payload };
    } catch {
      // Not the JSON of these messages: a number or base64 that is none.
      return undefined;
    }
  },
};

const PRESENCE_NAMES: readonly string[] = Object.keys(PRESENCE);
const CHAT_NAMES: readonly string[] = Object.keys(CHAT);

function write(key: string, value: unknown): unknown {
  if (value instanceof Uint8Array) return toBase64(value);
  if (typeof value === "bigint") return String(value);
  if (typeof value !== "number") return value;
  if (key === "eventType") return PRESENCE_NAMES[value];
  return key === "type" ? CHAT_NAMES[value] : value;
}

const READERS: { [K in keyof Payloads]: (value: JsonObject) => Payloads[K] } = {
  serverHello,
  positionUpdate,
  positionBatch: ({ entries }) => ({
    entries: list(entries).map(({ sender, update }) => ({ sender: str(sender), update: isObject(update) ? positionUpdate(update) : undefined })),
  }),
  entitySpawn: ({ entityId, templateId, ownerId, components }) => ({
    entityId: str(entityId), templateId: str(templateId), ownerId: str(ownerId), components: map(components, str),
  }),
  entityUpdate: ({ entityId, components }) => ({ entityId: str(entityId), components: map(components, bytes) }),
  entityDespawn: ({ entityId }) => ({ entityId: str(entityId) }),
  chatMessage: ({ fromClientId, message, timestamp, type }) => ({
    fromClientId: str(fromClientId), message: str(message), timestamp: int(timestamp), type: enumeration(CHAT_NAMES, type),
  }),
  presenceEvent: ({ clientId, eventType, data }) => ({
    clientId: str(clientId), eventType: enumeration(PRESENCE_NAMES, eventType), data: isObject(data) ? presence(data) : undefined,
  }),
  error: ({ code, message, retryAfterMs, messageId }) => ({
    code: str(code), message: str(message), retryAfterMs: num(retryAfterMs), messageId: str(messageId),
  }),
  custom: ({ name, data }) => ({ name: str(name), data: bytes(data) }),
};

function readPayload(message: JsonObject): Payload | undefined {
  for (const name of Object.keys(message)) {
    if (!Object.hasOwn(READERS, name) || !isObject(message[name])) continue;
    return { case: name, value: READERS[name as keyof Payloads](message[name]) } as Payload;
  }
  // A later kind, or one of clients only.
  return typeof message["sender"] === "string" ? { case: "other" } : undefined;
}

function serverHello(hello: JsonObject): ServerHello {
  const { initialState: state, limits } = hello;
  return {
    serverVersion: str(hello["serverVersion"]),
    assignedClientId: str(hello["assignedClientId"]),
    roomId: str(hello["roomId"]),
    connectionId: str(hello["connectionId"]),
    initialState: isObject(state) ? { entities: list(state["entities"]).map(entity), players: list(state["players"]).map(player) } : undefined,
    limits: isObject(limits) ? readLimits(limits) : undefined,
    more: hello["more"] === true,
  };
}

function readLimits({ messagesPerSecond, messageBytesMax, entitiesMax, entityBytesMax }: JsonObject): Limits {
  return {
    messagesPerSecond: num(messagesPerSecond), messageBytesMax: num(messageBytesMax), entitiesMax: num(entitiesMax), entityBytesMax: num(entityBytesMax),
  };
}

function entity({ id, templateId, ownerId, position, rotation, components, binaryComponents }: JsonObject): EntitySnapshot {
  return {
    id: str(id),
    templateId: str(templateId),
    ownerId: str(ownerId),
    ...place(position, rotation),
    components: map(components, str),
    binaryComponents: map(binaryComponents, bytes),
  };
}

function player(value: JsonObject): PlayerSnapshot {
  return { clientId: str(value["clientId"]), ...presence(value) };
}

function presence({ displayName, avatarUrl, position, rotation, avatarConfig, hostClientId }: JsonObject): PresenceData {
  return {
    displayName: str(displayName),
    avatarUrl: str(avatarUrl),
    ...place(position, rotation),
    avatarConfig: isObject(avatarConfig) ? (avatarConfig as Avatar) : undefined,
    hostClientId: str(hostClientId),
  };
}

function positionUpdate({ entityId, position, rotation, sequenceNumber }: JsonObject): PositionUpdate {
  return { entityId: str(entityId), ...place(position, rotation), sequenceNumber: num(sequenceNumber) };
}

function place(position: unknown, rotation: unknown): { position: Vector | undefined; rotation: Rotation | undefined } {
  return {
    position: isObject(position) ? { x: num(position["x"]), y: num(position["y"]), z: num(position["z"]) } : undefined,
    rotation: isObject(rotation) ? { x: num(rotation["x"]), y: num(rotation["y"]), z: num(rotation["z"]), w: num(rotation["w"]) } : undefined,
  };
}

function list(value: unknown): JsonObject[] {
  return Array.isArray(value) ? value.filter(isObject) : [];
}

function map<T>(value: unknown, read: (value: unknown) => T): Record<string, T> {
  const entries = isObject(value) ? Object.entries(value) : [];
  return Object.fromEntries(entries.map(([name, each]) => [name, read(each)]));
}

function str(value: unknown): string {
  return typeof value === "string" ? value : "";
}

function num(value: unknown): number {
  return value === undefined || value === null ? 0 : Number(value);
}

function int(value: unknown): bigint {
  return BigInt((value as string | undefined) ?? 0);
}

function enumeration(names: readonly string[], value: unknown): number {
  return typeof value === "string" ? names.indexOf(value) : num(value);
}

function bytes(value: unknown): Uint8Array {
  const binary = atob(str(value).replace(/-/g, "+").replace(/_/g, "/"));
  return Uint8Array.from(binary, (character) => character.charCodeAt(0));
}

function toBase64(value: Uint8Array): string {
  let binary = "";
  for (const byte of value) binary += String.fromCharCode(byte);
  return btoa(binary);
}

// A room's gateway without a network: what it says and hears is JSON here, whichever form the client speaks.

import { fromBinary, fromJson, type JsonValue, toBinary, toJson } from "@bufbuild/protobuf";
import { vi } from "vitest";
import { binary } from "../../src/rooms/binary.ts";
import { connectRoom, type Room, type RoomEvents, type RoomOptions } from "../../src/rooms/index.ts";
import { EnvelopeSchema } from "../../src/rooms/v1/rooms_pb.ts";
import { FakeSocket } from "./fake-socket.ts";

export type Form = "text" | "binary";
export const FORMS: Form[] = ["text", "binary"];
export const ME = "c-me";

let open: Room[] = [];

/** A room that connects. */
export async function enter(options: Partial<RoomOptions> = {}, form: Form = "text"): Promise<Room> {
  const room = connectRoom({
    url: "https://gateway.test", room: "lobby", clientId: ME, WebSocket: FakeSocket, random: () => 0.5,
    ...(options.userId === undefined ? { getToken: () => "t" } : {}), ...(form === "binary" ? { binary } : {}), ...options,
  });
  open.push(room);
  await turn();
  return room;
}

/** A room that is open, with no other member and no entity in it. */
export async function entered(options: Partial<RoomOptions> = {}, form: Form = "text"): Promise<Room> {
  const room = await enter(options, form);
  FakeSocket.last.open();
  hello({});
  return room;
}

export function closeAll(): void {
  for (const room of open) room.close();
  open = [];
}

export const turn = (ms = 0): Promise<unknown> => vi.advanceTimersByTimeAsync(ms);

const isBinary = (socket: FakeSocket): boolean => socket.sent[0] instanceof Uint8Array;

/** The gateway says `envelope`. */
export function say(envelope: object, socket: FakeSocket = FakeSocket.last): void {
  if (!isBinary(socket)) return socket.say(envelope);
  const bytes = toBinary(EnvelopeSchema, fromJson(EnvelopeSchema, envelope as JsonValue));
  socket.sayRaw(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength) as ArrayBuffer);
}

/** The gateway greets. */
export function hello(state: { entities?: object[]; players?: object[] }, more: object = {}, socket: FakeSocket = FakeSocket.last): void {
  const serverHello = { serverVersion: "1", assignedClientId: ME, roomId: "lobby", connectionId: "k-1", version: 1, initialState: state, ...more };
  say({ type: "SERVER_HELLO", serverHello }, socket);
}

/** Everything that the client has said, without its hello. */
export function sent(socket: FakeSocket = FakeSocket.last): any[] {
  return socket.sent.map((message) => (message instanceof Uint8Array ? toJson(EnvelopeSchema, fromBinary(EnvelopeSchema, message)) : message))
    .filter((message) => !("clientHello" in (message as object)));
}

/** All events of the room but its states, as they come: the name, and an id or a word. */
export function watch(room: Room): string[] {
  const seen: string[] = [];
  const on = <K extends keyof RoomEvents>(event: K, word: (value: RoomEvents[K]) => unknown): void => {
    room.on(event, (value) => void seen.push(`${event} ${String(word(value))}`));
  };
  on("join", ({ member, initial }) => `${member.clientId}${initial ? " initial" : ""}`);
  on("leave", ({ member }) => member.clientId);
  on("presence", ({ member }) => `${member.clientId} ${member.name}`);
  on("spawn", ({ entity, initial }) => `${entity.owner}/${entity.id}${initial ? " initial" : ""}`);
  on("update", ({ entity, components }) => `${entity.id} ${Object.keys(components)}`);
  on("despawn", ({ entity }) => entity.id);
  on("move", ({ entity }) => `${entity.id} ${entity.position?.x}`);
  on("chat", ({ from, text, kind }) => `${from} ${text} ${kind}`);
  on("custom", ({ from, name, data }) => `${from} ${name} ${[...data]}`);
  on("error", ({ code, entityId, retryAfterMs }) => [code, entityId, retryAfterMs].filter((word) => word !== undefined).join(" "));
  return seen;
}

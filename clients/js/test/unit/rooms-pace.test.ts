// The pace of a room: positions 20 times a second with the newest, everything below the gateway's limit.

import { afterEach, beforeEach, expect, test, vi } from "vitest";
import type { Room } from "../../src/rooms/index.ts";
import { FakeSocket } from "../support/fake-socket.ts";
import { closeAll, enter, entered, hello, say, sent, turn } from "../support/rooms.ts";

beforeEach(() => {
  vi.useFakeTimers();
  FakeSocket.all = [];
});

afterEach(() => {
  closeAll();
  vi.useRealTimers();
});

const moves = (): number[] => sent().filter((message) => "positionUpdate" in message).map(({ positionUpdate }) => positionUpdate.position.x);

/** Moves `ids` every 5 ms for `ms`. */
async function drag(room: Room, ids: string[], ms: number): Promise<void> {
  for (let at = 0; at < ms; at += 5) {
    for (const id of ids) room.move(id, { x: at, y: 0 });
    await turn(5);
  }
}

test("the first position leaves at once, then the newest 20 times a second", async () => {
  const room = await entered();
  await drag(room, ["a"], 200);
  await turn(1_000);
  expect(moves()).toEqual([0, 45, 95, 145, 195]);
  room.move("a", { x: 7, y: 0 });
  expect(moves().at(-1)).toBe(7);
  expect(sent().map(({ positionUpdate }) => positionUpdate.sequenceNumber)).toEqual([1, 2, 3, 4, 5, 6]);
});

test("entities take turns below the limit, and other messages go first", async () => {
  const room = await entered({ sendRate: { perSecond: 50, burst: 5 } });
  const ids = Array.from({ length: 10 }, (_, n) => `e${n}`);
  await drag(room, ids, 1_000);
  const counts = ids.map((id) => sent().filter(({ positionUpdate }) => positionUpdate.entityId === id).length);
  expect(counts.reduce((sum, n) => sum + n)).toBeLessThanOrEqual(56);
  expect(Math.min(...counts)).toBeGreaterThanOrEqual(5);
  for (const id of ids) room.move(id, { x: 1, y: 0 });
  room.chat("first");
  await turn(25);
  expect(sent().at(-1)).toEqual({ chatMessage: { message: "first" } });
});

test("the gateway's limit is kept", async () => {
  const room = await enter();
  FakeSocket.last.open();
  hello({}, { limits: { messagesPerSecond: 20 } });
  for (let n = 0; n < 100; n += 1) room.chat(String(n));
  expect(sent().length).toBe(20);
  await turn(1_000);
  expect(sent().length).toBe(38);
});

test("a refused message is a pause, a connection that was too fast is slower", async () => {
  const room = await entered();
  say({ error: { code: "rate_limited", message: "m", retryAfterMs: 400 } });
  room.chat("x");
  await turn(399);
  expect(sent()).toEqual([]);
  await turn(2);
  expect(sent().length).toBe(1);
  FakeSocket.last.end(1008, "too many messages");
  await turn(6_000);
  FakeSocket.last.open();
  hello({});
  for (let n = 0; n < 200; n += 1) room.chat(String(n));
  expect(sent().length).toBe(50);
});

test("positions wait for a slow network, and the newest goes out", async () => {
  const room = await entered();
  FakeSocket.last.bufferedAmount = 100_000;
  await drag(room, ["a"], 500);
  expect(sent()).toEqual([]);
  FakeSocket.last.bufferedAmount = 0;
  await turn(60);
  expect(moves()).toEqual([495]);
});

test("a position of an entity that is gone is not sent", async () => {
  const room = await entered();
  room.move("a", { x: 1, y: 0 });
  room.move("a", { x: 2, y: 0 });
  room.despawn("a");
  await turn(1_000);
  expect(sent().map((message) => Object.keys(message)[0])).toEqual(["positionUpdate", "entityDespawn"]);
});

test("a rotation stays until there is another one", async () => {
  const room = await entered();
  const rotation = { x: 0, y: 1, z: 0, w: 0 };
  room.move("a", { x: 1, y: 0 }, rotation);
  await turn(50);
  room.move("a", { x: 2, y: 0 });
  expect(sent().map(({ positionUpdate }) => positionUpdate.rotation)).toEqual([rotation, rotation]);
});

test("presence is sent with its newest values", async () => {
  const room = await entered();
  for (let n = 0; n < 50; n += 1) room.setPresence({ name: String(n) });
  await turn(200);
  expect(sent().map(({ presenceEvent }) => presenceEvent.data.displayName)).toEqual(["0", "49"]);
});

// Events against a scripted gateway: typed messages, acknowledgements.

import { afterEach, beforeEach, expect, test } from "vitest";
import { WebSocket } from "ws";
import { connectEvents, type Events, type EventsOptions } from "../../src/index.ts";
import { GatewayDouble, messages, type Peer } from "../support/gateway-double.ts";

type Types = { task: { id: number }; note: string };

let gateway: GatewayDouble;
let connections: Events<any>[] = [];

beforeEach(async () => {
  gateway = await GatewayDouble.start();
});

afterEach(async () => {
  for (const connection of connections) connection.close();
  connections = [];
  await gateway.stop();
});

async function open(options: Partial<EventsOptions> = {}): Promise<[Events<Types>, Peer]> {
  const events = connectEvents<Types>({ url: `${gateway.url}/ws`, getToken: () => "t", WebSocket, backoff: { baseMs: 1 }, ...options });
  connections.push(events);
  return [events, await gateway.peers.next()];
}

const task = (n: number, more: object = {}): unknown => ({
  type: "task", event_id: `${n}-0-000000aa`, timestamp: "2026-11-21T12:00:00Z", data: { id: n }, ...more,
});

test("messages are typed by name", async () => {
  const [events, peer] = await open();
  const heard: (number | string)[] = [];
  events.onType("task", ({ data, event_id }) => heard.push(data.id + 1, event_id));
  events.onType("note", ({ data }) => heard.push(data.toUpperCase()));
  peer.say({ type: "connected", connection_id: "c", user_id: "u", event_id: "1-0-000000aa", expires_at: 99, heartbeat: { interval: 30, timeout: 60 } });
  expect(await events.once("connected")).toEqual({ connectionId: "c", userId: "u", eventId: "1-0-000000aa", expiresAt: 99 });
  expect([events.connectionId, events.lastEventId]).toEqual(["c", "1-0-000000aa"]);
  peer.say(task(1), { type: "note", event_id: "2-0-000000aa", timestamp: "", data: "hi" });
  await messages(events, 2);
  expect(heard).toEqual([2, "1-0-000000aa", "HI"]);
});

test("a message is acknowledged after its handlers have done their work, again when it comes again, and handled once", async () => {
  const [events, peer] = await open();
  let finish: () => void = () => undefined;
  let calls = 0;
  events.onType("task", async () => {
    calls += 1;
    await new Promise<void>((resolve) => (finish = resolve));
  });
  peer.say(task(1, { ack: true }), task(1, { ack: true }), { type: "ping" });
  expect(await peer.said.next()).toEqual({ type: "pong" });
  expect([calls, peer.said.size]).toEqual([1, 0]);
  finish();
  expect(await peer.said.next()).toEqual({ type: "ack", event_id: "1-0-000000aa" });
  peer.say(task(1, { ack: true }));
  expect(await peer.said.next()).toEqual({ type: "ack", event_id: "1-0-000000aa" });
  expect(calls).toBe(1);
});

test("what a handler failed on is not acknowledged, and handled when it comes again", async () => {
  const [events, peer] = await open();
  let fail = true;
  events.onType("task", () => {
    if (fail) throw new Error("not now");
  });
  peer.say(task(1, { ack: true }));
  expect((await events.once("error")).code).toBe("handler");
  fail = false;
  peer.say(task(2), task(1, { ack: true }));
  expect(await peer.said.next()).toEqual({ type: "ack", event_id: "1-0-000000aa" });
  // A repeated message is old: the position stays.
  expect(events.lastEventId).toBe("2-0-000000aa");
});

test("a message without a handler is not acknowledged", async () => {
  const [events, peer] = await open();
  peer.say(task(1, { ack: true }), { type: "ping" });
  expect(await peer.said.next()).toEqual({ type: "pong" });
  events.on("message", () => undefined);
  peer.say(task(1, { ack: true }));
  expect(await peer.said.next()).toEqual({ type: "ack", event_id: "1-0-000000aa" });
});

test("a message of a loop is acknowledged when the loop comes back for the next", async () => {
  const [events, peer] = await open();
  const loop = events[Symbol.asyncIterator]();
  peer.say(task(1, { ack: true }), task(2, { ack: true }), { type: "ping" });
  expect((await loop.next()).value?.eventId).toBe("1-0-000000aa");
  expect(await peer.said.next()).toEqual({ type: "pong" });
  expect(peer.said.size).toBe(0);
  await loop.next();
  expect(await peer.said.next()).toEqual({ type: "ack", event_id: "1-0-000000aa" });
  await loop.return?.();
  expect(await peer.said.next()).toEqual({ type: "ack", event_id: "2-0-000000aa" });
});

test("acknowledged by hand, also after a reconnect", async () => {
  const [events, peer] = await open({ autoAck: false });
  events.on("message", () => undefined);
  peer.say(task(1, { ack: true }));
  await events.once("message");
  peer.drop();
  await events.once("state");
  events.ack("1-0-000000aa");
  const second = await gateway.peers.next();
  expect(second.lastEventId).toBe("1-0-000000aa");
  expect(await second.said.next()).toEqual({ type: "ack", event_id: "1-0-000000aa" });
});

test("with the envelope a message is acknowledged by its own id and resumed by its position", async () => {
  gateway.protocol = "wsproxy.id.v1";
  const [events, peer] = await open({ envelope: true });
  events.on("message", () => undefined);
  peer.sayRaw(`7-0-000000aa\n${JSON.stringify({ type: "task", event_id: "order-1", data: { id: 1 }, ack: true })}`);
  expect(await peer.said.next()).toEqual({ type: "ack", event_id: "order-1" });
  expect(events.lastEventId).toBe("7-0-000000aa");
});

test("a message without a position comes again until it is acknowledged, and others of its id are handled too", async () => {
  gateway.protocol = "wsproxy.id.v1";
  const [events, peer] = await open();
  const heard: number[] = [];
  events.onType("task", ({ data }) => {
    heard.push(data.id);
    if (heard.length === 1) throw new Error("not now");
  });
  events.on("error", () => undefined);
  const say = (id: number): void => peer.sayRaw(`\n${JSON.stringify({ type: "task", event_id: "evt_9", data: { id }, ack: true })}`);
  for (const id of [1, 1, 2]) say(id);
  expect([await peer.said.next(), await peer.said.next()]).toEqual(Array(2).fill({ type: "ack", event_id: "evt_9" }));
  expect(heard).toEqual([1, 1, 2]);
  expect(events.lastEventId).toBe("");
});

test("with the envelope a message without an id of its own has its position as id", async () => {
  gateway.protocol = "wsproxy.id.v1";
  const [events, peer] = await open();
  const ids: string[] = [];
  events.on("message", ({ data }) => ids.push(data.event_id));
  peer.sayRaw(`7-0-000000aa\n${JSON.stringify({ type: "task", data: { id: 1 }, ack: true })}`);
  expect(await peer.said.next()).toEqual({ type: "ack", event_id: "7-0-000000aa" });
  expect(ids).toEqual(["7-0-000000aa"]);
});

test("an event of the application's may have any type, and none of them moves the heartbeat, the token or the id", async () => {
  gateway.protocol = "wsproxy.id.v1";
  const [events, peer] = await open();
  const heard: string[] = [];
  events.on("message", ({ data }) => heard.push(data.type));
  const told: unknown[] = [];
  events.on("connected", () => told.push("connected"));
  events.on("refreshed", () => told.push("refreshed"));
  const words = ["ping", "pong", "ack", "connected", "refreshed", "resumed", "bus_recovered"];
  for (const type of words) peer.sayRaw(`\n${JSON.stringify({ type, timestamp: "2026-11-21T12:00:00Z", data: { connection_id: "x", count: 1 } })}`);
  for (const type of words) peer.sayRaw(`7-0-000000a${words.indexOf(type)}\n${JSON.stringify({ type, data: null })}`);
  peer.sayRaw("\n" + JSON.stringify({ type: "ping", timestamp: "2026-11-21T12:00:00Z" }));
  expect(await peer.said.next()).toEqual({ type: "pong" });
  expect([heard, told]).toEqual([[...words, ...words], []]);
});

test("more acknowledgements than may be sent at once are paced", async () => {
  const [events, peer] = await open({ sendRate: { burst: 10, perSecond: 200 } });
  events.on("message", () => undefined);
  for (let n = 1; n <= 40; n += 1) peer.say(task(n, { ack: true }));
  for (let n = 1; n <= 40; n += 1) expect(await peer.said.next()).toEqual({ type: "ack", event_id: `${n}-0-000000aa` });
});

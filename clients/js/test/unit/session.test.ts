// Sessions against a scripted gateway: resume, duplicates, envelopes, token streams.

import { afterEach, beforeEach, expect, test } from "vitest";
import { WebSocket } from "ws";
import { connectSession, type Received, type Session, type SessionOptions } from "../../src/index.ts";
import { GatewayDouble, Inbox, messages } from "../support/gateway-double.ts";

type Down = { type: "token"; n: number } | { type: "done" };

let gateway: GatewayDouble;
let connections: Session<any>[] = [];

beforeEach(async () => {
  gateway = await GatewayDouble.start();
});

afterEach(async () => {
  for (const connection of connections) connection.close();
  connections = [];
  await gateway.stop();
});

function open<M = Down>(options: Partial<SessionOptions> = {}): Session<M> {
  const session = connectSession<M>({
    url: gateway.url, agent: "demo", session: "s-1", getToken: () => "t", WebSocket, backoff: { baseMs: 1 }, ...options,
  });
  connections.push(session);
  return session;
}

const token = (n: number): unknown => ({ event_id: `${n}-0-000000aa`, type: "token", n });

test("a dropped connection resumes after the last message; duplicates are dropped; the outcome is told", async () => {
  const session = open();
  const heard: unknown[] = [];
  const done = new Promise((resolve) => session.onType("done", resolve));
  session.onType("token", ({ n }) => heard.push(n));
  session.on("connected", ({ eventId, connectionId }) => heard.push(`connected ${connectionId} ${eventId}`));
  session.on("resumed", ({ count, lastEventId }) => heard.push(`resumed ${count} after ${lastEventId}`));

  const first = await gateway.peers.next();
  expect(first.lastEventId).toBe("");
  first.say({ type: "opened", connection_id: "c", event_id: "1-0-000000aa" }, token(2), token(3), token(3));
  first.sayRaw("no json");
  await messages(session, 3);
  first.drop();

  const second = await gateway.peers.next();
  expect(second.lastEventId).toBe("3-0-000000aa");
  second.say({ type: "resumed", count: 2, last_event_id: "3-0-000000aa" }, token(4), token(3), token(5), { type: "done" });
  await done;
  expect(heard).toEqual(["connected c 1-0-000000aa", 2, 3, "resumed 2 after 3-0-000000aa", 4, 5]);
  expect(session.lastEventId).toBe("5-0-000000aa");
});

test("a connection lost before anything came resumes from where it began", async () => {
  const session = open();
  const first = await gateway.peers.next();
  first.say({ type: "opened", connection_id: "c", event_id: "17-3-000000aa" });
  await session.once("connected");
  first.drop();
  const second = await gateway.peers.next();
  expect(second.lastEventId).toBe("17-3-000000aa");
  // The position is not yet this client's: the missed messages have not come yet.
  second.say({ type: "opened", connection_id: "d", event_id: "20-0-000000aa" });
  await session.once("connected");
  second.drop();
  expect((await gateway.peers.next()).lastEventId).toBe("17-3-000000aa");
});

test("a lost history is told, and the stream goes on from the position that it names", async () => {
  const session = open({ lastEventId: "5-0-000000aa" });
  const first = await gateway.peers.next();
  expect(first.lastEventId).toBe("5-0-000000aa");
  first.say({ type: "error", code: "history_lost", reason: "emptied", message: "Redis was emptied.", event_id: "1-0-000000aa" });
  expect(await session.once("historyLost")).toEqual({ reason: "emptied", message: "Redis was emptied.", eventId: "1-0-000000aa" });
  first.drop();
  expect((await gateway.peers.next()).lastEventId).toBe("1-0-000000aa");
});

test("with the envelope, text and bytes of any kind resume, and the worker's own words are the worker's", async () => {
  gateway.protocol = "wsproxy.id.v1";
  const session = open<unknown>();
  const heard: unknown[] = [];
  session.on("message", ({ data, eventId }) => heard.push([data, eventId]));
  const peer = await gateway.peers.next();
  expect(peer.offered).toEqual(["wsproxy.id.v1", "wsproxy.v1", "bearer.t"]);
  peer.sayRaw('\n{"type":"opened","connection_id":"c","event_id":"1-0-000000aa"}');
  peer.sayRaw("2-0-000000aa\nplain\ntext");
  peer.sayRaw(Buffer.concat([Buffer.from("3-0-000000aa\n"), Buffer.from([0, 255, 10])]));
  peer.sayRaw('4-0-000000aa\n{"event_id":"mine","type":"resumed","count":1}');
  peer.sayRaw("4-0-000000aa\nagain");
  peer.sayRaw("\nwithout history");
  const done = new Promise((resolve) => session.on("message", ({ data }) => data === "without history" && resolve(0)));
  await done;
  expect(heard).toEqual([
    ["plain\ntext", "2-0-000000aa"],
    [Uint8Array.of(0, 255, 10), "3-0-000000aa"],
    [{ event_id: "mine", type: "resumed", count: 1 }, "4-0-000000aa"],
    ["without history", undefined],
  ]);
  expect(session.lastEventId).toBe("4-0-000000aa");
});

test("messages that share a member event_id of the application's are all delivered", async () => {
  gateway.protocol = "wsproxy.id.v1";
  const session = open<{ n: number }>();
  const first = await gateway.peers.next();
  first.sayRaw('5-0-000000aa\n{"event_id":"evt_9","n":0}');
  // Published plain: it has no position.
  first.sayRaw('\n{"event_id":"evt_9","n":1}');
  first.sayRaw('5-1-000000aa\n{"event_id":"1732190000000000-7","n":2}');
  // Another life of the log has used this id again.
  first.sayRaw('5-1-000000bb\n{"event_id":"evt_9","n":3}');
  first.sayRaw('5-2-000000aa\n{"event_id":"evt_9","n":4}');
  first.sayRaw('5-2-000000aa\n{"event_id":"evt_9","n":4}');
  first.sayRaw('\n{"event_id":"6-0-000000aa","n":5}');
  const came = await messages(session, 6);
  expect(came.map(({ data }) => data.n)).toEqual([0, 1, 2, 3, 4, 5]);
  expect(came.map(({ eventId }) => eventId)).toEqual([
    "5-0-000000aa", undefined, "5-1-000000aa", "5-1-000000bb", "5-2-000000aa", undefined,
  ]);
  first.drop();
  expect((await gateway.peers.next()).lastEventId).toBe("5-2-000000aa");
});

test("the position goes on in another life of the log, whose ids may be lower", async () => {
  const session = open();
  const first = await gateway.peers.next();
  first.say(token(9), token(3), token(4), token(3));
  await messages(session, 3);
  first.drop();
  expect((await gateway.peers.next()).lastEventId).toBe("4-0-000000aa");
});

test("without the envelope only a member that is a position is one", async () => {
  const session = open<{ n: number }>();
  const first = await gateway.peers.next();
  const ids = ["5-0-000000aa", "evt_9", "evt_9", "9-9", "5-0-000000aa", 7, null, "0", "5-1-000000AA", ""];
  first.say(...ids.map((event_id, n) => ({ event_id, n })));
  const came = await messages(session, 9);
  expect(came.map(({ data }) => data.n)).toEqual([0, 1, 2, 3, 5, 6, 7, 8, 9]);
  expect(came.map(({ eventId }) => eventId).filter(Boolean)).toEqual(["5-0-000000aa"]);
  first.drop();
  expect((await gateway.peers.next()).lastEventId).toBe("5-0-000000aa");
});

test("snapshots stand at the position of the loss, all of them", async () => {
  gateway.protocol = "wsproxy.id.v1";
  const session = open<unknown>({ lastEventId: "7-0-000000aa" });
  const peer = await gateway.peers.next();
  const say = (message: unknown): void => peer.sayRaw(`9-0-000000aa\n${JSON.stringify(message)}`);
  say({ type: "opened", connection_id: "c", event_id: "9-0-000000aa" });
  say({ type: "error", code: "history_lost", reason: "trimmed", message: "", event_id: "9-0-000000aa" });
  for (const stream of ["a", "b"]) say({ type: "stream_snapshot", stream, state: "open", seq: 2, text: `of ${stream}` });
  peer.sayRaw("9-1-000000aa\nlive");
  await messages(session, 1);
  expect(session.streams.map(({ text }) => text)).toEqual(["of a", "of b"]);
  expect(session.lastEventId).toBe("9-1-000000aa");
});

test("what is sent while away arrives in order at the next connection", async () => {
  const session = open();
  const first = await gateway.peers.next();
  await session.opened();
  first.drop();
  await session.once("state");
  session.send({ n: 1 });
  session.send({ n: 2 });
  const second = await gateway.peers.next();
  expect([await second.said.next(), await second.said.next()]).toEqual([{ n: 1 }, { n: 2 }]);
});

test("a token for another session begins anew", async () => {
  let name = "one";
  const session = open({ getToken: () => ({ token: "t", session: name }) });
  const first = await gateway.peers.next();
  first.say({ type: "opened", connection_id: "c", event_id: "9-0-000000aa" }, { type: "stream_open", stream: "a" });
  await session.once("stream");
  name = "two";
  first.drop();
  const second = await gateway.peers.next();
  expect([second.url.pathname, second.lastEventId]).toEqual(["/demo/ws/two", ""]);
  expect(session.streams).toEqual([]);
});

test("gateway's notices are events, a worker's errors are messages", async () => {
  const session = open<unknown>();
  const heard: unknown[] = [];
  session.on("error", (problem) => heard.push(problem));
  session.on("busRecovered", (told) => heard.push(told));
  session.on("message", ({ data }) => heard.push(data));
  const peer = await gateway.peers.next();
  const mine = { type: "error", code: "model_overloaded", message: "later" };
  peer.say({ type: "error", code: "no_receiver", message: "no worker" }, { type: "bus_recovered", gap_ms: 5 }, mine);
  await session.once("message");
  expect(heard).toEqual([{ code: "no_receiver", message: "no worker" }, { gapMs: 5 }, mine]);
});

test.each(["wsproxy.v1", "wsproxy.id.v1"])("words of the library are the application's where the gateway does not say them (%s)", async (protocol) => {
  gateway.protocol = protocol;
  const session = open<{ type: string }>();
  const peer = await gateway.peers.next();
  const prefix = protocol === "wsproxy.id.v1" ? "\n" : "";
  const words = ["pong", "ping", "ack", "connected", "opened", "refreshed", "resumed", "close", "message", "error"];
  for (const type of words) peer.sayRaw(prefix + JSON.stringify({ type, peer: "x" }));
  expect((await messages(session, words.length)).map(({ data }) => data.type)).toEqual(words);
  // Published with history, even what looks just like the gateway's is not.
  const published = { type: "connected", connection_id: "c", count: 1 };
  if (prefix) peer.sayRaw(`5-0-000000aa\n${JSON.stringify(published)}`);
  else peer.say({ ...published, event_id: "5-0-000000aa" });
  expect((await messages(session, 1))[0]?.data).toMatchObject(published);
});

test("a handler that throws is told of, and the others hear the message", async () => {
  const session = open();
  const heard: unknown[] = [];
  session.on("message", () => {
    throw new Error("mine");
  });
  session.on("message", ({ eventId }) => heard.push(eventId));
  const peer = await gateway.peers.next();
  peer.say(token(1), token(2));
  const problems = new Inbox<string>();
  session.on("error", ({ code }) => problems.put(code));
  expect([await problems.next(), await problems.next()]).toEqual(["handler", "handler"]);
  expect(heard).toEqual(["1-0-000000aa", "2-0-000000aa"]);
});

test("a loop over the session goes over reconnects and ends with close()", async () => {
  const session = open();
  const seen: unknown[] = [];
  const loop = (async () => {
    for await (const { data } of session as AsyncIterable<Received<Down>>) {
      seen.push(data.type === "token" ? data.n : data.type);
      if (data.type === "done") session.close();
    }
  })();
  const first = await gateway.peers.next();
  first.say(token(1));
  await session.once("message");
  first.drop();
  (await gateway.peers.next()).say(token(1), token(2), { type: "done" });
  await loop;
  expect(seen).toEqual([1, 2, "done"]);
});

test("a token stream continues over a cut, and stop() goes up", async () => {
  const session = open();
  const opened = session.once("stream");
  const first = await gateway.peers.next();
  const append = (id: number, seq: number, text: string): unknown => ({ event_id: `${id}-0-000000aa`, type: "stream_append", stream: "a", seq, text });
  first.say({ event_id: "1-0-000000aa", type: "stream_open", stream: "a", meta: { model: "m" } }, append(2, 1, "One "));
  const stream = await opened;
  expect(stream).toBe(session.stream("a"));
  while (stream.seq < 1) await stream.once("update");
  stream.stop();
  expect(await first.said.next()).toEqual({ type: "stream_stop", stream: "a" });
  first.drop();

  const second = await gateway.peers.next();
  expect(second.lastEventId).toBe("2-0-000000aa");
  second.say(
    { type: "resumed", count: 2, last_event_id: "2-0-000000aa" },
    append(3, 2, "two "),
    append(4, 3, "three."),
    { event_id: "5-0-000000aa", type: "stream_end", stream: "a", outcome: "cancelled", seq: 3 },
  );
  await stream.finished();
  expect(stream).toMatchObject({ text: "One two three.", state: "cancelled", meta: { model: "m" }, incomplete: false });
});

test("a stream that is asked for before it exists waits, and ends its loop with the session", async () => {
  const session = open();
  await gateway.peers.next();
  const stream = session.stream("later");
  const loop = (async () => {
    for await (const _ of stream) throw new Error("Nothing came.");
  })();
  const finished = stream.finished();
  session.close();
  await loop;
  await expect(finished).rejects.toThrow(/closed/);
});

test("after close() and connect() a stream goes on", async () => {
  const session = open();
  await gateway.peers.next();
  const stream = session.stream("a");
  session.close();
  await expect(stream.finished()).rejects.toThrow(/closed/);
  session.connect();
  const peer = await gateway.peers.next();
  peer.say({ type: "stream_open", stream: "a" });
  while (stream.state === "unknown") await stream.once("update");
  const finished = stream.finished();
  peer.say({ type: "stream_end", stream: "a", outcome: "finish", seq: 0 });
  expect((await finished).state).toBe("finish");
});

test("streams that have ended are forgotten, those that go on are not", async () => {
  const session = open<unknown>();
  const peer = await gateway.peers.next();
  peer.say({ type: "stream_open", stream: "goes on" });
  for (let n = 0; n < 200; n += 1) {
    peer.say({ type: "stream_snapshot", stream: `s-${n}`, state: "finish", seq: 0, text: "" });
  }
  peer.say("last");
  await messages(session, 1);
  const ids = session.streams.map(({ id }) => id);
  expect([ids.length, ids[0], ids.at(-1)]).toEqual([64, "goes on", "s-199"]);
});

test("a loop that is too slow gets an error instead of a gap", async () => {
  const session = open<unknown>();
  session.on("error", () => undefined);
  const loop = session[Symbol.asyncIterator]();
  const peer = await gateway.peers.next();
  for (let n = 0; n < 10_001; n += 1) peer.say(n);
  await messages(session, 10_001);
  await expect(loop.next()).rejects.toThrow(/too slow/);
});

test("a name that is used again is another stream", async () => {
  const session = open<unknown>();
  const heard: string[] = [];
  session.onStream((stream) => stream.on("end", ({ text }) => heard.push(text)));
  const peer = await gateway.peers.next();
  for (const text of ["one", "two"]) {
    peer.say(
      { type: "stream_open", stream: "a" },
      { type: "stream_append", stream: "a", seq: 1, text },
      { type: "stream_end", stream: "a", outcome: "finish", seq: 1 },
    );
  }
  peer.say("last");
  await messages(session, 1);
  expect([heard, session.stream("a").text]).toEqual([["one", "two"], "two"]);
});

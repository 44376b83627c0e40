// Server-sent events: by choice, as the fallback, and what ends them.

import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { WebSocket } from "ws";
import { connectEvents, connectSession, type StateChange } from "../../src/index.ts";
import { GatewayDouble, Inbox, type Listener } from "../support/gateway-double.ts";

let gateway: GatewayDouble;
let connections: { close(): void }[] = [];

beforeEach(async () => {
  gateway = await GatewayDouble.start();
});

afterEach(async () => {
  for (const connection of connections) connection.close();
  connections = [];
  await gateway.stop();
});

function session(options: object = {}) {
  const made = connectSession({
    url: gateway.url, agent: "demo", session: "s-1", getToken: () => "secret", WebSocket, backoff: { baseMs: 1 }, ...options,
  });
  connections.push(made);
  const changes = new Inbox<StateChange>();
  made.on("state", (change) => changes.put(change));
  return { made, changes };
}

function answer({ response }: Listener): void {
  response.writeHead(200, { "Content-Type": "text/event-stream; charset=utf-8" });
}

test("messages, positions and resume; the token is in a header", async () => {
  const { made } = session({ transport: "sse" });
  const heard: unknown[] = [];
  const last = new Promise((resolve) => made.on("message", ({ data }) => (heard.push(data), data === "ü" && resolve(0))));
  const first = await gateway.listeners.next();
  expect(first.url.href).toBe("http://gateway/demo/ws/s-1?last_event_id=");
  expect(first.request.headers).toMatchObject({ accept: "text/event-stream", authorization: "Bearer secret" });
  answer(first);
  first.response.write('id: 1-0-000000aa\n\n:\n\nid: 2-0-000000aa\ndata: {"a":\ndata: 1}\n\n');
  await made.once("message");
  expect([made.state, made.transport, made.lastEventId]).toEqual(["open", "sse", "2-0-000000aa"]);
  expect(() => made.send({})).toThrow(/downstream/);
  first.response.end('event: close\ndata: {"code":1012,"reason":"restart"}\n\n');

  const second = await gateway.listeners.next();
  expect(second.url.searchParams.get("last_event_id")).toBe("2-0-000000aa");
  answer(second);
  // A character in two chunks.
  const bytes = Buffer.from('data: {"type":"resumed","count":2,"last_event_id":"2-0-000000aa"}\n\nid: 2-0-000000aa\ndata: twice\n\nid: 3-0-000000aa\ndata: ü\n\n');
  const at = bytes.indexOf(0xc3) + 1;
  second.response.write(bytes.subarray(0, at));
  await made.once("resumed");
  second.response.write(bytes.subarray(at));
  await last;
  expect(heard).toEqual([{ a: 1 }, "ü"]);
});

test("a position without a message is remembered but not shown, in this form and in that of earlier gateways", async () => {
  for (const block of ['event: position\nid: 7-0-000000aa\ndata: {"type":"position","event_id":"7-0-000000aa"}\n\n', "id: 7-0-000000aa\n\n"]) {
    const { made } = session({ transport: "sse" });
    const heard: unknown[] = [];
    made.on("message", ({ raw }) => heard.push(raw));
    const first = await gateway.listeners.next();
    answer(first);
    first.response.end(`retry: 900\n${block}:\n`);
    const second = await gateway.listeners.next();
    expect(second.url.searchParams.get("last_event_id")).toBe("7-0-000000aa");
    answer(second);
    second.response.write(":\ndata: 1\n\n");
    await made.once("message");
    expect(heard).toEqual(["1"]);
    made.close();
  }
});

test("the token may be in the URL, where a preflight is not wanted", async () => {
  session({ transport: "sse", sseTokenIn: "query" });
  const { url, request } = await gateway.listeners.next();
  expect([url.searchParams.get("token"), request.headers.authorization]).toEqual(["secret", undefined]);
});

test("a token of event streams opens these at once, again and again, and no WebSocket", async () => {
  const { made } = session({ getToken: () => "sse.secret" });
  for (let n = 0; n < 2; n += 1) {
    const listener = await gateway.listeners.next();
    expect(listener.request.headers.authorization).toBe("Bearer sse.secret");
    answer(listener);
    listener.response.write(":\n\n");
    await made.opened();
    expect(made.transport).toBe("sse");
    listener.response.destroy();
  }
  expect(gateway.peers.size).toBe(0);

  const other = session({ transport: "websocket", getToken: () => "sse.secret" });
  const error = await other.made.once("error");
  expect([error.code, error.message]).toEqual(["credentials", "The token opens event streams only."]);
  expect([gateway.peers.size, gateway.refused]).toEqual([0, 0]);
});

test("a close event ends it as the code advises", async () => {
  const { made } = session({ transport: "sse" });
  const listener = await gateway.listeners.next();
  answer(listener);
  listener.response.end('event: close\ndata: {"code":4004,"reason":"done"}\n\n');
  const closed = new Promise((resolve) => made.on("state", (change) => change.state === "closed" && resolve(change)));
  expect(await closed).toMatchObject({ code: 4004, reason: "done" });
});

test("refusals are understood: Retry-After is kept to, a refused origin is final", async () => {
  const { changes } = session({ transport: "sse" });
  await changes.next(); // connecting
  const { response } = await gateway.listeners.next();
  response.writeHead(503, { "Retry-After": "7" }).end('{"error":{"code":"draining","message":"m","retryable":true}}');
  const waiting = await changes.next();
  expect(waiting).toMatchObject({ state: "waiting", status: 503, reason: "draining" });
  expect(waiting.delayMs).toBeGreaterThanOrEqual(7000);

  const other = session({ transport: "sse" });
  await other.changes.next();
  (await gateway.listeners.next()).response.writeHead(403).end('{"error":{"code":"origin_not_allowed","message":"m","retryable":false}}');
  expect(await other.changes.next()).toMatchObject({ state: "closed", status: 403, reason: "origin_not_allowed" });
});

test("a refused token is asked for anew", async () => {
  const reasons: string[] = [];
  const events = connectEvents({
    url: `${gateway.url}/ws`, transport: "sse", backoff: { baseMs: 1 },
    getToken: ({ reason }) => {
      reasons.push(reason);
      return `t${reasons.length}`;
    },
  });
  connections.push(events);
  (await gateway.listeners.next()).response.writeHead(401).end('{"error":{"code":"invalid_token","message":"m","retryable":false}}');
  const { request, response } = await gateway.listeners.next();
  expect([reasons, request.headers.authorization]).toEqual([["initial", "rejected"], "Bearer t2"]);
  response.destroy();
});

test("where WebSockets fail, server-sent events take over after three", async () => {
  gateway.refuse = 400;
  const { made } = session();
  const listener = await gateway.listeners.next();
  expect(gateway.refused).toBe(3);
  answer(listener);
  listener.response.write(":\n\n");
  await made.opened();
  expect(made.transport).toBe("sse");
  // A short break is no reason to try what did not work.
  listener.response.destroy();
  const again = await gateway.listeners.next();
  expect(gateway.refused).toBe(3);
  // Refused as well: perhaps WebSockets work by now.
  gateway.refuse = 0;
  again.response.writeHead(426).end('{"error":{"code":"upgrade_required","message":"m","retryable":false}}');
  await gateway.peers.next();
});

test("back from an outage over server-sent events, what is sent finds a WebSocket, and nothing is lost or repeated on the way", async () => {
  gateway.refuse = 502;
  const { made, changes } = session();
  const heard: unknown[] = [];
  made.on("message", ({ data }) => heard.push(data));
  made.send("before");
  const listener = await gateway.listeners.next();
  gateway.refuse = 0;
  answer(listener);
  listener.response.write("id: 1-0-000000aa\n\nid: 2-0-000000aa\ndata: 2\n\n");
  await made.opened();
  expect(made.transport).toBe("sse");
  made.send("now");
  const peer = await gateway.peers.next();
  expect([await peer.said.next(), await peer.said.next()]).toEqual(["before", "now"]);
  expect([made.state, made.transport]).toEqual(["open", "websocket"]);
  peer.say({ event_id: "2-0-000000aa", n: 2 }, { event_id: "3-0-000000aa", n: 3 });
  await new Promise((resolve) => made.on("message", resolve));
  expect(heard.at(-1)).toEqual({ event_id: "3-0-000000aa", n: 3 });
  const told = [];
  while (changes.size > 0) told.push((await changes.next()).state);
  expect(told.slice(-2)).toEqual(["open", "open"]);
});

test("where no WebSocket gets through, send says so, and what waits is told", async () => {
  gateway.refuse = 400;
  const { made } = session();
  const problem = new Promise<string>((resolve) => made.on("error", ({ code }) => resolve(code)));
  const listener = await gateway.listeners.next();
  answer(listener);
  listener.response.write(":\n\n");
  await made.opened();
  made.send("kept");
  expect(await problem).toBe("downstream_only");
  expect(() => made.send("refused")).toThrow(/no WebSocket gets through/);
  expect([made.state, made.transport]).toEqual(["open", "sse"]);
});

test("who only listens can never send, and hears of it at once", () => {
  const { made } = session({ transport: "sse" });
  expect(() => made.send({})).toThrow(/downstream/);
});

test("a platform without WebSocket says so at once, unless only events are wanted", () => {
  const { WebSocket: own } = globalThis;
  vi.stubGlobal("WebSocket", undefined);
  try {
    const options = { url: gateway.url, getToken: () => "t" };
    for (const transport of [undefined, "auto", "websocket"] as const) {
      expect(() => connectEvents({ ...options, ...(transport ? { transport } : {}) })).toThrow(/no WebSocket/);
    }
    connections.push(connectEvents({ ...options, transport: "sse" }));
  } finally {
    vi.stubGlobal("WebSocket", own);
  }
});

test("a WebSocket that opens and breaks before anything came has failed as well; one that has carried something has not", async () => {
  const { made } = session();
  for (let n = 0; n < 5; n += 1) {
    const peer = await gateway.peers.next();
    peer.say("works");
    await made.once("message");
    peer.drop();
  }
  for (let n = 0; n < 3; n += 1) (await gateway.peers.next()).drop();
  answer(await gateway.listeners.next());
});

test("a refused credential is no reason to leave WebSockets", async () => {
  gateway.refuse = 403;
  const { changes } = session({ backoff: { baseMs: 1, maxMs: 2 } });
  for (let n = 0; n < 12; n += 1) await changes.next();
  expect([gateway.refused > 3, gateway.listeners.size]).toEqual([true, 0]);
});

test("a gateway without server-sent events ends those who want nothing else", async () => {
  const { changes } = session({ transport: "sse" });
  await changes.next();
  (await gateway.listeners.next()).response.writeHead(426).end('{"error":{"code":"upgrade_required","message":"m","retryable":false}}');
  expect(await changes.next()).toMatchObject({ state: "closed", status: 426, reason: "upgrade_required" });
});

test("what answers with a page instead of events is not taken for them", async () => {
  const { changes } = session({ transport: "sse" });
  await changes.next();
  (await gateway.listeners.next()).response.writeHead(200, { "Content-Type": "text/html" }).end("<html>");
  expect(await changes.next()).toMatchObject({ state: "waiting", status: 406 });
});

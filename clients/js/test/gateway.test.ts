// The client against the real gateway and a real Redis: what is promised, over cuts, restarts and losses.

import { afterAll, afterEach, beforeAll, expect, test, vi } from "vitest";
import { WebSocket } from "ws";
import {
  connectEvents, connectSession, type Connection, type EventMap, type Events, type EventsOptions, type Session, type SessionOptions,
  type StateChange,
} from "../src/index.ts";
import { Inbox, messages } from "./support/gateway-double.ts";
import { Cable, Gateway, jwt, Redis, stopAll, until } from "./support/machines.ts";

let redis: Redis;
let gateway: Gateway;
let cable: Cable;
let connections: Connection<any>[] = [];
let count = 0;

beforeAll(async () => {
  redis = await Redis.start();
  gateway = await Gateway.start(redis);
  cable = await Cable.to(gateway.port);
});

afterAll(async () => {
  await cable?.end();
  await gateway?.stop();
  await redis?.end();
  stopAll();
});

afterEach(() => {
  for (const connection of connections) connection.close();
  connections = [];
  cable.target = gateway.port;
});

/** A session of its own for each test. */
function open<M = any>(options: Partial<SessionOptions> = {}): [Session<M>, string] {
  const id = options.session ?? `s-${(count += 1)}`;
  const session = connectSession<M>({
    url: cable.url, agent: "demo", session: id, WebSocket, backoff: { baseMs: 20, maxMs: 200 }, getToken: () => gateway.token(id), ...options,
  });
  connections.push(session);
  return [session, id];
}

function listen<T extends EventMap>(options: Partial<EventsOptions> = {}): [Events<T>, string] {
  const user = `u-${(count += 1)}`;
  const events = connectEvents<T>({
    url: `${cable.url}/ws`, WebSocket, backoff: { baseMs: 20, maxMs: 200 }, getToken: () => jwt(user), ...options,
  });
  connections.push(events);
  return [events, user];
}

const publish = (id: string, message: unknown, via = gateway): Promise<any> => via.api(`sessions/${id}/messages?history=true`, message);
const numbers = (from: number, to: number): number[] => Array.from({ length: to - from }, (_, n) => from + n);

test("a session: down, up, and an end by the backend", async () => {
  const [session, id] = open();
  await session.opened();
  const down = messages(session, 1);
  await gateway.api(`sessions/${id}/messages`, { type: "hello", text: "wörld" });
  expect((await down)[0]?.data).toEqual({ type: "hello", text: "wörld" });

  const up = fetch(`${gateway.url}/api/v1/sessions/${id}/upstream`, { headers: { Authorization: `Bearer key-of-the-tests-0123456789` } });
  const reader = (await up).body?.getReader();
  session.send({ type: "prompt", text: "hi" });
  let heard = "";
  while (!heard.includes("\n\n")) heard += new TextDecoder().decode((await reader?.read())?.value);
  await reader?.cancel();
  expect(heard).toContain('data: {"type":"prompt","text":"hi"}');

  const closed = new Promise<StateChange>((resolve) => session.on("state", (change) => change.state === "closed" && resolve(change)));
  await gateway.api(`sessions/${id}/close`, { code: 4004, reason: "bye" });
  expect(await closed).toMatchObject({ code: 4004, reason: "bye" });
});

test("a wrong token is refused, and the next one opens", async () => {
  const reasons: string[] = [];
  const [session] = open({
    session: "wrong-once",
    getToken: async ({ reason }) => {
      reasons.push(reason);
      const token = await gateway.token("wrong-once");
      return reasons.length === 1 ? `${token}x` : token;
    },
  });
  await session.opened();
  expect(reasons).toEqual(["initial", "rejected"]);
});

test("six tabs of one session, whose tokens replace each other's, all come in, and again after a restart", async () => {
  const getToken = async (): Promise<string> => {
    const token = await gateway.token("tabs");
    // The answer travels to the browser.
    await new Promise((resolve) => setTimeout(resolve, 100));
    return token;
  };
  const tabs = numbers(0, 6).map(() => open({ session: "tabs", getToken, backoff: { baseMs: 200, maxMs: 2000 } })[0]);
  await until("all are open", () => tabs.every(({ state }) => state === "open"));
  await gateway.stop("SIGKILL");
  await until("all have noticed", () => tabs.every(({ state }) => state !== "open"));
  await gateway.restart();
  await until("all are open again", () => tabs.every(({ state }) => state === "open"));
});

test("invalid JSON upstream is told as a problem", async () => {
  const [session] = open();
  await session.opened();
  const problem = session.once("error");
  session.sendRaw("{no json");
  expect((await problem).code).toBe("invalid_json");
});

test.each(["websocket", "sse"] as const)("over %s a connection cut again and again misses nothing and repeats nothing", async (transport) => {
  const [session, id] = open({ transport });
  await session.opened();
  await until("it has a position", () => session.lastEventId);
  const total = 300;
  const heard: number[] = [];
  session.on("message", ({ data }) => heard.push(data.n));
  const lost: unknown[] = [];
  session.on("historyLost", (told) => lost.push(told));
  let resumes = 0;
  session.on("resumed", () => (resumes += 1));
  for (const n of numbers(0, total)) {
    await publish(id, { n });
    if (n % 50 === 25) cable.cut();
  }
  await until("everything arrived", () => heard.length >= total);
  expect([heard, lost]).toEqual([numbers(0, total), []]);
  expect(resumes).toBeGreaterThan(0);
  expect(session.transport).toBe(transport);
});

test("what was missed over another instance comes too, after an instance was killed", async () => {
  const other = await Gateway.start(redis);
  try {
    const [session, id] = open({ getToken: () => other.token("moved"), session: "moved" });
    await session.opened();
    const heard: number[] = [];
    session.on("message", ({ data }) => heard.push(data.n));
    for (const n of numbers(0, 20)) await publish(id, { n });
    await until("the first arrived", () => heard.length === 20);
    await gateway.stop("SIGKILL");
    for (const n of numbers(20, 40)) await publish(id, { n }, other);
    cable.target = other.port;
    await until("the rest arrived", () => heard.length >= 40);
    expect(heard).toEqual(numbers(0, 40));
  } finally {
    await gateway.restart();
    await other.stop();
  }
});

/** The messages from a session's client from now on, as a worker gets them: the member `n` of each. */
async function worker(id: string): Promise<{ numbers(): number[]; end(): void }> {
  const up = await redis.follow(`session:${id}:up`);
  return { numbers: () => [...up.heard.matchAll(/\{"n":(\d+)\}/g)].map(([, n]) => Number(n)), end: up.end };
}

test("what waited while offline reaches the worker whole and in order, though the gateway lets fewer come at once", async () => {
  let isOnline = false;
  const id = "was-offline";
  const [session] = open({
    session: id,
    getToken: () => {
      if (!isOnline) throw new Error("offline");
      return gateway.token(id);
    },
  });
  session.on("error", () => undefined);
  const codes: unknown[] = [];
  session.on("state", ({ code }) => code !== undefined && codes.push(code));
  const heard = await worker(id);
  for (const n of numbers(0, 256)) session.send({ n });
  await until("it has tried", () => session.state === "waiting");
  codes.length = 0;
  isOnline = true;
  await until("everything arrived", () => heard.numbers().length >= 256);
  expect(heard.numbers()).toEqual(numbers(0, 256));
  expect(codes.filter((code) => code !== 1006)).toEqual([]);
  heard.end();
});

test("a gateway that lets fewer come than the client believes gets all of it in the end", async () => {
  const own = await Gateway.start(redis, { WSPROXY_LIMITS__MESSAGES_PER_SECOND: "60", WSPROXY_LIMITS__MESSAGE_BURST: "60" });
  try {
    const [session, id] = open({ url: own.url, session: "slower", getToken: () => own.token("slower") });
    const heard = await worker(id);
    for (const n of numbers(0, 150)) session.send({ n });
    await until("everything arrived", () => new Set(heard.numbers()).size >= 150, 25_000);
    expect([...new Set(heard.numbers())]).toEqual(numbers(0, 150));
    heard.end();
  } finally {
    await own.stop();
  }
});

test("a session over a silent path is replaced when the page is shown; neither direction loses a message", async () => {
  const document = Object.assign(new EventTarget(), { visibilityState: "visible" });
  vi.stubGlobal("document", document);
  try {
    const [session, id] = open();
    await session.once("connected");
    const up = await worker(id);
    const down: number[] = [];
    session.on("message", ({ data }) => down.push(data.n));
    await publish(id, { n: 1 });
    await until("the path works", () => down.length === 1);
    cable.silence();
    session.send({ n: 7 });
    await publish(id, { n: 2 });
    document.dispatchEvent(new Event("visibilitychange"));
    await until("all of it arrived", () => down.length === 2 && up.numbers().length > 0);
    expect([down, up.numbers(), session.state]).toEqual([[1, 2], [7], "open"]);
    up.end();
  } finally {
    vi.unstubAllGlobals();
  }
});

test("a healthy quiet connection that is replaced delivers what was sent once, since it closed cleanly", async () => {
  const document = Object.assign(new EventTarget(), { visibilityState: "visible" });
  vi.stubGlobal("document", document);
  try {
    const [session, id] = open();
    await session.once("connected");
    const up = await worker(id);
    session.send({ n: 1 });
    const again = session.once("resumed");
    document.dispatchEvent(new Event("visibilitychange"));
    await again;
    session.send({ n: 2 });
    await until("the second arrived", () => up.numbers().includes(2));
    expect(up.numbers()).toEqual([1, 2]);
    up.end();
  } finally {
    vi.unstubAllGlobals();
  }
});

test("back from an outage over server-sent events, the client sends over a WebSocket soon", async () => {
  let isAway = false;
  const [session, id] = open({
    session: "outage",
    getToken: async () => {
      await redis.command("SET", "session:outage:auth", "token", "EX", "60");
      return "token";
    },
    fetch: async (...args) => {
      if (isAway) await gateway.restart();
      isAway = false;
      return fetch(...args);
    },
  });
  await session.opened();
  const heard = await worker(id);
  isAway = true;
  await gateway.stop("SIGKILL");
  await until("it noticed", () => session.state !== "open");
  await until("it is back", () => session.state === "open");
  expect(session.transport).toBe("sse");
  session.send({ n: 1 });
  await until("it was sent", () => heard.numbers().length > 0);
  expect([heard.numbers(), session.transport]).toEqual([[1], "websocket"]);
  heard.end();
});

test("bytes and text that is no JSON resume too", async () => {
  // Bytes go over WebSockets only, and a client that is away for some tries would come back over server-sent events.
  const [session, id] = open({ transport: "websocket" });
  // With a position: what is cut before it came has nothing to resume from.
  await session.once("connected");
  cable.plugged = false;
  cable.cut();
  await until("it is away", () => session.state !== "open");
  const down = messages(session, 2);
  await gateway.api(`sessions/${id}/messages?history=true`, Uint8Array.of(0, 255, 10, 1));
  await gateway.api(`sessions/${id}/messages?history=true`, Buffer.from("plain\ntext"));
  cable.plugged = true;
  expect((await down).map(({ data }) => data)).toEqual([Uint8Array.of(0, 255, 10, 1), "plain\ntext"]);
});

test("without the envelope the id is in the message", async () => {
  const [session, id] = open({ envelope: false });
  await session.once("connected");
  const first = messages(session, 1);
  await publish(id, { n: 1 });
  const [received] = await first;
  expect(received?.data).toEqual({ event_id: received?.eventId, n: 1 });
  cable.cut();
  const second = messages(session, 1);
  await publish(id, { n: 2 });
  expect((await second)[0]?.data.n).toBe(2);
});

test("a stream from its start for who comes late", async () => {
  const id = `s-${(count += 1)}`;
  for (const n of numbers(0, 5)) await publish(id, { n });
  const [session] = open({ session: id, lastEventId: "0" });
  expect((await messages(session, 5)).map(({ data }) => data.n)).toEqual(numbers(0, 5));
});

test("messages that share a member event_id of the application's come all, over a cut", async () => {
  const [session, id] = open();
  await session.once("connected");
  const heard: number[] = [];
  session.on("message", ({ data }) => heard.push(data.n));
  for (const n of numbers(0, 6)) {
    const how = n % 3 === 2 ? "" : "?history=true";
    await gateway.api(`sessions/${id}/messages${how}`, { event_id: "evt_9", n });
    await until("it arrived", () => heard.length === n + 1);
    if (n === 3) {
      cable.cut();
      await until("it is back", () => session.state === "open" && session.connectionId !== undefined);
    }
  }
  expect(heard).toEqual(numbers(0, 6));
});

test("a position that was never given out is told as lost, and the live stream goes on", async () => {
  const [session, id] = open({ lastEventId: "never-given-out" });
  expect((await session.once("historyLost")).reason).toBe("unknown");
  const live = messages(session, 1);
  await publish(id, { n: 1 });
  expect((await live)[0]?.data.n).toBe(1);
});

test("a token stream over cuts is one text, byte for byte", async () => {
  const [session, id] = open();
  await session.once("connected");
  const stream = session.stream("answer");
  const step = (body: object): Promise<unknown> => gateway.api(`sessions/${id}/streams/answer`, body);
  const words = numbers(0, 60).map((n) => `wört ${n} `);
  await step({ op: "open", meta: { model: "m" } });
  for (const [n, text] of words.entries()) {
    await step({ op: "append", text });
    if (n % 20 === 10) cable.cut();
  }
  await step({ op: "end", outcome: "finish" });
  await stream.finished();
  expect(stream).toMatchObject({ text: words.join(""), state: "finish", meta: { model: "m" }, incomplete: false });

  // A late client gets the same as a snapshot.
  const [late] = open({ session: id });
  const same = await late.once("stream");
  await same.finished();
  expect(same).toMatchObject({ text: words.join(""), state: "finish", incomplete: false });
});

test("stop() reaches the worker, and a worker that died is reported", async () => {
  const [session, id] = open();
  await session.opened();
  const up = await fetch(`${gateway.url}/api/v1/sessions/${id}/upstream`, { headers: { Authorization: "Bearer key-of-the-tests-0123456789" } });
  const reader = up.body?.getReader();
  const opened = session.once("stream");
  await gateway.api(`sessions/${id}/streams/a`, { op: "open", lease_ms: 1000 });
  const stream = await opened;
  stream.stop();
  let heard = "";
  while (!heard.includes("\n\n")) heard += new TextDecoder().decode((await reader?.read())?.value);
  await reader?.cancel();
  expect(heard).toContain('{"type":"stream_stop","stream":"a"}');
  await stream.finished();
  expect([stream.state, stream.error?.code]).toEqual(["error", "worker_lost"]);
});

test("a drained gateway is left, and found again", async () => {
  const [session, id] = open({ getToken: () => gateway.token("drained"), session: "drained" });
  await session.once("connected");
  const changes = new Inbox<StateChange>();
  session.on("state", (change) => changes.put(change));
  await gateway.stop("SIGTERM");
  expect(await changes.next()).toMatchObject({ state: "waiting", code: 1012 });
  await gateway.restart();
  const down = messages(session, 1);
  await publish(id, { n: 1 });
  expect((await down)[0]?.data.n).toBe(1);
});

test("a Redis that restarts with its data loses no message", async () => {
  const [session, id] = open();
  await session.once("connected");
  const heard: number[] = [];
  session.on("message", ({ data }) => heard.push(data.n));
  for (const n of numbers(0, 10)) await publish(id, { n });
  await redis.stop();
  await redis.restart();
  for (const n of numbers(10, 20)) await until("a publish", () => publish(id, { n }).then(() => true));
  await until("everything arrived", () => heard.length >= 20);
  expect(heard).toEqual(numbers(0, 20));
});

test("events: to all users, to one user, typed, and after a cut", async () => {
  const [events, user] = listen<{ task_status_update: { id: number }; note: string }>();
  const connected = await events.once("connected");
  expect(connected).toMatchObject({ userId: user, connectionId: events.connectionId });
  const two = messages(events, 2);
  await gateway.api("events/broadcast", { type: "note", data: "all" });
  await gateway.api(`events/users/${user}`, { type: "task_status_update", data: { id: 1 } });
  expect((await two).map(({ data }) => [data.type, data.data])).toEqual([["note", "all"], ["task_status_update", { id: 1 }]]);
  const ids = (await two).map(({ data }) => data.event_id);
  expect(ids.every(Boolean)).toBe(true);

  cable.plugged = false;
  cable.cut();
  await until("it is away", () => events.state !== "open");
  const missed = messages(events, 1);
  await gateway.api(`events/users/${user}`, { type: "task_status_update", data: { id: 2 } });
  cable.plugged = true;
  expect((await missed)[0]?.data.data).toEqual({ id: 2 });
});

test("events that want it are acknowledged, and what a handler failed on comes again", async () => {
  const own = await Gateway.start(redis, { WSPROXY_EVENTS__ACK_INTERVAL: "200ms" });
  try {
    const [events, user] = listen({ url: `${own.url}/ws` });
    let calls = 0;
    events.on("error", () => undefined);
    events.on("message", () => {
      calls += 1;
      if (calls === 1) throw new Error("not now");
    });
    await events.once("connected");
    const acks = await redis.follow("ws:acks");
    const { event_id } = await own.api(`events/users/${user}`, { type: "x", data: 1, ack: true });
    await until("it was acknowledged", () => acks.heard.includes('"acknowledged"'));
    expect(calls).toBe(2);
    expect(acks.heard).toContain(event_id);
    expect(acks.heard).not.toContain("unacknowledged");
    acks.end();
  } finally {
    await own.stop();
  }
});

test("events: the heartbeat keeps a quiet connection, and one that is not refreshed ends with its token", async () => {
  const own = await Gateway.start(redis, { HEARTBEAT_INTERVAL: "500", HEARTBEAT_TIMEOUT: "1000" });
  try {
    const reasons: string[] = [];
    const [events] = listen({
      url: `${own.url}/ws`, refreshBeforeMs: 1500,
      getToken: ({ reason }) => {
        reasons.push(reason);
        return jwt("u-refresh", reason === "initial" ? 3 : 6);
      },
    });
    await events.once("connected");
    const changes: string[] = [];
    events.on("state", ({ state, code }) => changes.push(`${state} ${code}`));
    const { expiresAt = 0 } = await events.once("refreshed");
    expect(expiresAt * 1000).toBeGreaterThan(Date.now() + 3000);
    // Beyond the first token's end.
    await events.once("refreshed");
    expect([changes, reasons]).toEqual([[], ["initial", "refresh", "refresh"]]);

    const seen: string[] = [];
    const [unrefreshed] = listen({
      url: `${own.url}/ws`, refreshBeforeMs: 0,
      getToken: ({ reason }) => {
        seen.push(reason);
        if (reason === "refresh") throw new Error("offline");
        return jwt("u-expired", 2);
      },
    });
    await unrefreshed.once("connected");
    const ended = new Promise<StateChange>((resolve) => unrefreshed.on("state", (change) => change.state === "waiting" && resolve(change)));
    expect((await ended).code).toBe(4401);
    await unrefreshed.once("connected");
    expect(seen.at(-1)).toBe("expired");
  } finally {
    await own.stop();
  }
});

test("events over server-sent events", async () => {
  const [events, user] = listen({ transport: "sse" });
  await events.once("connected");
  const heard: unknown[] = [];
  events.on("message", ({ data }) => heard.push(data.data));
  for (const n of numbers(0, 10)) {
    await gateway.api(`events/users/${user}`, { type: "n", data: n });
    if (n === 5) cable.cut();
  }
  await until("everything arrived", () => heard.length >= 10);
  expect(heard).toEqual(numbers(0, 10));
});

test("a user is disconnected by the backend", async () => {
  const [events, user] = listen();
  await events.once("connected");
  const ended = new Promise<StateChange>((resolve) => events.on("state", (change) => change.state !== "open" && resolve(change)));
  await gateway.api("events/disconnect", { user_id: user, code: 4004, reason: "signed out" });
  expect(await ended).toMatchObject({ state: "closed", code: 4004, reason: "signed out" });
});

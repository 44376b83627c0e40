// Reconnects, by a clock of the test's own.

import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { connectEvents, connectSession, GiveUp, type Events, type EventsOptions, type Session, type SessionOptions, type StateChange } from "../../src/index.ts";
import { FakeSocket } from "../support/fake-socket.ts";

let tokens = 0;
let open: { close(): void }[] = [];

beforeEach(() => {
  vi.useFakeTimers();
  FakeSocket.all = [];
  tokens = 0;
});

afterEach(() => {
  for (const connection of open) connection.close();
  open = [];
  vi.unstubAllGlobals();
  vi.useRealTimers();
});

const turn = (ms = 0): Promise<unknown> => vi.advanceTimersByTimeAsync(ms);

async function session(options: Partial<SessionOptions> = {}): Promise<Session> {
  const connection = connectSession({
    url: "https://gateway.test", agent: "demo", session: "s-1", WebSocket: FakeSocket, random: () => 0.5,
    getToken: () => `token${(tokens += 1)}`, transport: "websocket", ...options,
  });
  open.push(connection);
  await turn();
  return connection;
}

async function events(options: Partial<EventsOptions> = {}): Promise<Events> {
  const connection = connectEvents({
    url: "wss://gateway.test/ws", WebSocket: FakeSocket, random: () => 0.5, getToken: () => `token${(tokens += 1)}`,
    transport: "websocket", ...options,
  });
  open.push(connection);
  await turn();
  return connection;
}

const welcome = { type: "connected", connection_id: "c", user_id: "u", event_id: "1-0-000000aa", expires_at: null, heartbeat: { interval: 30, timeout: 60 } };

test("the credential is in the subprotocol and nowhere in the URL, and the position is always asked for", async () => {
  await session();
  expect(FakeSocket.last.url.href).toBe("wss://gateway.test/demo/ws/s-1?last_event_id=");
  expect(FakeSocket.last.protocols).toEqual(["wsproxy.id.v1", "wsproxy.v1", "bearer.token1"]);
  await events({ envelope: false });
  expect(FakeSocket.last.url.href).toBe("wss://gateway.test/ws?last_event_id=");
  expect(FakeSocket.last.protocols).toEqual(["wsproxy.v1", "bearer.token2"]);
});

test("ids in a path are escaped, a token may say where, and resume can be switched off", async () => {
  await session({ session: "a/b", resume: false });
  expect(FakeSocket.last.url.href).toBe("wss://gateway.test/demo/ws/a%2Fb");
  await session({ getToken: () => ({ token: "t", path: "/other/ws/x" }) });
  expect(FakeSocket.last.url.href).toBe("wss://gateway.test/other/ws/x?last_event_id=");
});

test("a handshake that fails without a close event, as in Node 22, is not waited for", async () => {
  const connection = await session();
  FakeSocket.last.fail();
  await turn(100);
  expect(connection.state).toBe("waiting");
  await turn(500);
  FakeSocket.last.fail();
  FakeSocket.last.end();
  expect([connection.state, FakeSocket.all.length]).toEqual(["waiting", 2]);
  await turn(100);
  expect(FakeSocket.all.length).toBe(2);
});

test("waits grow with jitter to the cap, and start again after a stable time", async () => {
  const connection = await session({ backoff: { baseMs: 100, maxMs: 1000, stableMs: 5000 } });
  const waits: number[] = [];
  connection.on("state", ({ state, delayMs = -1 }) => state === "waiting" && waits.push(delayMs));
  for (let round = 0; round < 6; round += 1) {
    FakeSocket.last.end();
    await turn(1000);
  }
  expect(waits).toEqual([50, 100, 200, 400, 500, 500]);

  FakeSocket.last.open();
  await turn(4999);
  FakeSocket.last.end();
  expect(waits.at(-1)).toBe(500);
  await turn(500);
  FakeSocket.last.open();
  await turn(5000);
  FakeSocket.last.end();
  expect(waits.at(-1)).toBe(50);
});

test("every try has a fresh token", async () => {
  await session({ backoff: { baseMs: 100 } });
  for (let round = 0; round < 3; round += 1) {
    FakeSocket.last.end();
    await turn(2000);
  }
  expect(FakeSocket.all.map(({ protocols }) => protocols[2])).toEqual(["bearer.token1", "bearer.token2", "bearer.token3", "bearer.token4"]);
});

test("a failing token function is a failed try, told as one", async () => {
  let fail = true;
  const connection = connectSession({
    url: "https://gateway.test/demo/ws/s-1", WebSocket: FakeSocket, random: () => 0.5,
    getToken: () => {
      if (fail) throw new Error("offline");
      return "t";
    },
  });
  open.push(connection);
  const problems: string[] = [];
  connection.on("error", ({ code }) => problems.push(code));
  await turn();
  expect([connection.state, problems, FakeSocket.all.length]).toEqual(["waiting", ["credentials"], 0]);
  fail = false;
  await turn(250);
  FakeSocket.last.open();
  expect(connection.state).toBe("open");
});

test("a try that takes too long has failed, and its late answer counts for nothing", async () => {
  const connection = await session({ connectTimeoutMs: 1000 });
  const first = FakeSocket.last;
  await turn(1000);
  expect([connection.state, first.closed?.code]).toEqual(["waiting", 1000]);
  first.open();
  expect(connection.state).toBe("waiting");
});

test("a token that comes too late opens nothing", async () => {
  let give: (token: string) => void = () => undefined;
  const signals: AbortSignal[] = [];
  await session({
    connectTimeoutMs: 1000,
    getToken: ({ signal }) => {
      signals.push(signal);
      return new Promise((resolve) => (give = resolve));
    },
  });
  await turn(1000);
  expect(signals[0]?.aborted).toBe(true);
  give("late");
  await turn();
  expect(FakeSocket.all).toEqual([]);
});

test("codes that end it end it, and connect() begins anew", async () => {
  const connection = await session();
  const changes: StateChange[] = [];
  connection.on("state", (change) => changes.push(change));
  FakeSocket.last.open().end(4004, "signed out");
  await turn(100_000);
  expect(changes.at(-1)).toMatchObject({ state: "closed", code: 4004, reason: "signed out" });
  expect(FakeSocket.all.length).toBe(1);
  expect(() => connection.send({})).toThrow(/closed/);
  connection.connect();
  await turn();
  FakeSocket.last.open();
  expect(connection.state).toBe("open");
});

test("what asks for patience waits longer", async () => {
  const connection = await session();
  const waits: number[] = [];
  connection.on("state", ({ delayMs }) => delayMs !== undefined && waits.push(delayMs));
  FakeSocket.last.open().end(1008, "too many messages");
  expect(waits).toEqual([5250]);
});

test("close() is final, says so, and may come while it connects", async () => {
  const connection = await session();
  FakeSocket.last.open();
  connection.close(4123, "bye");
  expect(FakeSocket.last.closed).toEqual({ code: 4123, reason: "bye" });
  const early = connectSession({ url: "https://gateway.test/a/ws/b", WebSocket: FakeSocket, getToken: () => "t" });
  early.close();
  await turn(100_000);
  expect([early.state, FakeSocket.all.length]).toEqual(["closed", 1]);
  await expect(early.opened()).rejects.toThrow(/closed/);
});

test("an abort signal closes", async () => {
  const abort = new AbortController();
  const connection = await session({ signal: abort.signal });
  FakeSocket.last.open();
  abort.abort();
  expect(connection.state).toBe("closed");
});

test("what is sent without a connection is kept, within a bound, and goes first", async () => {
  const connection = await session({ queueMax: 2 });
  connection.on("state", ({ state }) => state === "open" && connection.send("on open"));
  connection.send(1);
  connection.send(2);
  expect(() => connection.send(3)).toThrow(/wait for a connection/);
  FakeSocket.last.open();
  connection.send(4);
  expect(FakeSocket.last.sent).toEqual([1, 2, "on open", 4]);

  // A message that waits for a connection which is closed instead is dropped.
  FakeSocket.last.end();
  connection.send(5);
  connection.close();
  connection.connect();
  await turn();
  expect(FakeSocket.last.open().sent).toEqual(["on open"]);
});

test("a burst is paced below the gateway's limit, and keeps its order", async () => {
  const connection = await session({ queueMax: 1000 });
  for (let n = 0; n < 256; n += 1) connection.send(n);
  const { sent } = FakeSocket.last.open();
  expect(sent.length).toBe(100);
  // While it is open too.
  for (let n = 256; n < 300; n += 1) connection.send(n);
  await turn(1000);
  expect(sent.length).toBe(190);
  await turn(2000);
  expect(sent).toEqual(Array.from({ length: 300 }, (_, n) => n));
});

test("a full queue is told while it is open too", async () => {
  const connection = await session({ queueMax: 2, sendRate: { burst: 1 } });
  FakeSocket.last.open();
  for (const n of [1, 2, 3]) connection.send(n);
  expect(() => connection.send(4)).toThrow(/their turn/);
});

test("without a limit everything is sent at once", async () => {
  const connection = await session({ queueMax: 1000, sendRate: { perSecond: Infinity, burst: Infinity } });
  const { sent } = FakeSocket.last.open();
  for (let n = 0; n < 900; n += 1) connection.send(n);
  expect(sent.length).toBe(900);
});

test("what a broken connection may not have delivered is sent again, first and in order", async () => {
  const connection = await session();
  FakeSocket.last.open();
  connection.send("old");
  await turn(600);
  // A round trip later something came: it has arrived.
  FakeSocket.last.say({ n: 1 });
  connection.send("a");
  connection.send("b");
  FakeSocket.last.end();
  connection.send("c");
  await turn(1000);
  expect(FakeSocket.last.open().sent).toEqual(["a", "b", "c"]);
  // Messages from long before have arrived, though no answer came since.
  await turn(16_000);
  FakeSocket.last.end();
  await turn(30_000);
  expect(FakeSocket.last.open().sent).toEqual([]);
});

test("a close frame proves that what was sent a round trip before has been read", async () => {
  const connection = await session();
  FakeSocket.last.open();
  connection.send("read");
  await turn(600);
  connection.send("perhaps not");
  FakeSocket.last.end(1012, "instance restarting");
  await turn(1000);
  expect(FakeSocket.last.open().sent).toEqual(["perhaps not"]);
});

test("with resend: false only what never left is sent again", async () => {
  const connection = await session({ resend: false });
  FakeSocket.last.open();
  for (const word of ["gone", "stuck", "stuck too"]) connection.send(word);
  FakeSocket.last.bufferedAmount = 2 * 14 + '"stuck""stuck too"'.length;
  FakeSocket.last.end();
  await turn(1000);
  expect(FakeSocket.last.open().sent).toEqual(["stuck", "stuck too"]);
});

test("a gateway with a lower limit gets everything, more slowly", async () => {
  const connection = await session();
  for (let n = 0; n < 60; n += 1) connection.send(n);
  expect(FakeSocket.last.open().sent.length).toBe(60);
  FakeSocket.last.end(1008, "too many messages");
  await turn(6000);
  expect(FakeSocket.last.open().sent.length).toBe(50);
  await turn(1000);
  expect(FakeSocket.last.sent).toEqual(Array.from({ length: 60 }, (_, n) => n));
});

test("what is stuck in the WebSocket is not added to", async () => {
  const connection = await session();
  const socket = FakeSocket.last.open();
  socket.bufferedAmount = 100_000;
  connection.send(1);
  await turn(1000);
  expect(socket.sent).toEqual([]);
  socket.bufferedAmount = 0;
  await turn(50);
  expect(socket.sent).toEqual([1]);
});

test.each([true, false])("a connection that is left settles what was sent: read if it closes cleanly (%s)", async (isClean) => {
  const connection = await session();
  const first = FakeSocket.last.open();
  connection.send("prompt");
  connection.connect();
  connection.send("next");
  await turn();
  const second = FakeSocket.last.open();
  expect([first.closed?.code, second.sent]).toEqual([1000, []]);
  if (isClean) first.answerClose();
  else await turn(5000);
  expect(second.sent).toEqual(isClean ? ["next"] : ["prompt", "next"]);
  first.answerClose();
  await turn(10_000);
  expect(second.sent.length).toBe(isClean ? 1 : 2);
});

test.each([[1012, "instance restarting"], [1000, "done"]])("a gateway that closes at the same moment (%i) has not read what was sent", async (code, reason) => {
  const connection = await session();
  const first = FakeSocket.last.open();
  connection.send("prompt");
  connection.connect();
  await turn();
  const second = FakeSocket.last.open();
  first.end(code, reason, undefined, true);
  expect(second.sent).toEqual(["prompt"]);
});

test("the network's return and a look at the page end the wait at once", async () => {
  const page = new EventTarget();
  vi.stubGlobal("addEventListener", page.addEventListener.bind(page));
  vi.stubGlobal("removeEventListener", page.removeEventListener.bind(page));
  const document = Object.assign(new EventTarget(), { visibilityState: "visible" });
  vi.stubGlobal("document", document);
  const connection = await session({ backoff: { baseMs: 2_000 } });
  FakeSocket.last.end();
  page.dispatchEvent(new Event("online"));
  await turn();
  expect(FakeSocket.all.length).toBe(2);
  // Failures on one network say nothing of another.
  const waiting = connection.once("state");
  FakeSocket.last.end();
  expect((await waiting).delayMs).toBe(1000);
  document.dispatchEvent(new Event("visibilitychange"));
  await turn();
  expect(FakeSocket.all.length).toBe(3);

  // A session that has a position moves to the new network; one that has none may lose by it.
  FakeSocket.last.open();
  page.dispatchEvent(new Event("online"));
  await turn();
  expect(FakeSocket.all.length).toBe(3);
  FakeSocket.last.say({ type: "opened", connection_id: "c", event_id: "7-0-000000aa" });
  page.dispatchEvent(new Event("online"));
  await turn();
  expect(FakeSocket.all.length).toBe(4);
  expect(FakeSocket.last.url.searchParams.get("last_event_id")).toBe("7-0-000000aa");
  connection.close();
  page.dispatchEvent(new Event("online"));
  await turn(100_000);
  expect(FakeSocket.all.length).toBe(4);
});

/** A page that tests show and hide. */
function stubPage(): { show(): void; online(): void } {
  const page = new EventTarget();
  vi.stubGlobal("addEventListener", page.addEventListener.bind(page));
  vi.stubGlobal("removeEventListener", page.removeEventListener.bind(page));
  const document = Object.assign(new EventTarget(), { visibilityState: "visible" });
  vi.stubGlobal("document", document);
  return {
    show: () => void document.dispatchEvent(new Event("visibilitychange")),
    online: () => void page.dispatchEvent(new Event("online")),
  };
}

test("a session that stays silent when the page is shown is replaced, and loses no message", async () => {
  const page = stubPage();
  const connection = await session();
  const heard: unknown[] = [];
  connection.on("message", ({ data }) => heard.push(data));
  const first = FakeSocket.last.open();
  first.say({ type: "opened", connection_id: "c", event_id: "7-0-000000aa" });
  await turn(1000);
  // One that says something is left alone.
  page.show();
  await turn(1000);
  first.say({ n: 1 });
  await turn(10_000);
  expect(FakeSocket.all.length).toBe(1);
  page.show();
  await turn(3000);
  // The old one goes on until the new one is open.
  expect([FakeSocket.all.length, connection.state, first.closed]).toEqual([2, "open", undefined]);
  const second = FakeSocket.last;
  expect(second.url.searchParams.get("last_event_id")).toBe("7-0-000000aa");
  first.say({ n: 2 });
  second.open();
  expect(first.closed?.code).toBe(1000);
  second.say({ n: 3 });
  expect(heard).toEqual([{ n: 1 }, { n: 2 }, { n: 3 }]);
  // Looks are many; new connections are few.
  page.show();
  await turn(20_000);
  expect(FakeSocket.all.length).toBe(2);
  page.show();
  await turn(60_000);
  page.show();
  await turn(3000);
  expect(FakeSocket.all.length).toBe(3);
});

test("without a position a look at the page replaces nothing", async () => {
  const page = stubPage();
  await session();
  FakeSocket.last.open();
  page.show();
  await turn(60_000);
  expect(FakeSocket.all.length).toBe(1);
});

test("where no new connection opens either, a silent one is given up", async () => {
  const page = stubPage();
  const connection = await session();
  const first = FakeSocket.last.open();
  first.say({ type: "opened", connection_id: "c", event_id: "7-0-000000aa" });
  await turn(1000);
  page.show();
  await turn(3000);
  const states: unknown[] = [];
  connection.on("state", ({ state, reason }) => states.push([state, reason]));
  FakeSocket.last.end();
  expect(states).toEqual([["waiting", "nothing heard"]]);
  // One that says something meanwhile is kept.
  await turn(1000);
  const next = FakeSocket.last.open();
  await turn(60_000);
  page.show();
  await turn(3000);
  next.say({ n: 1 });
  FakeSocket.last.end();
  await turn(60_000);
  expect([connection.state, next.closed]).toEqual(["open", undefined]);
});

test("a machine that slept replaces its connection, with a position or without", async () => {
  const connection = await session();
  const first = FakeSocket.last.open();
  connection.send("under way");
  vi.setSystemTime(Date.now() + 3_600_000);
  await turn(5000);
  await turn(3000);
  expect(FakeSocket.all.length).toBe(2);
  const second = FakeSocket.last.open();
  expect(first.closed?.code).toBe(1000);
  await turn(5000);
  expect(second.sent).toEqual(["under way"]);
});

test("what was under way when the machine fell asleep is sent again, however late the connection breaks", async () => {
  const connection = await session();
  const first = FakeSocket.last.open();
  connection.send("arrived");
  await turn(600);
  first.say({ n: 1 });
  connection.send("under way");
  vi.setSystemTime(Date.now() + 600_000);
  // This has waited in the machine since before.
  first.say({ n: 2 });
  connection.send("into the void");
  await turn(2500);
  first.end();
  await turn(1000);
  const second = FakeSocket.last.open();
  expect(second.sent).toEqual(["under way", "into the void"]);
  // Here the connection lives on after the sleep, and says so.
  vi.setSystemTime(Date.now() + 600_000);
  await turn(2500);
  second.say({ n: 3 });
  second.end();
  await turn(1000);
  expect(FakeSocket.last.open().sent).toEqual([]);
});

test("with resend: false a sleep sends nothing again", async () => {
  const connection = await session({ resend: false });
  FakeSocket.last.open();
  connection.send("at most once");
  vi.setSystemTime(Date.now() + 600_000);
  FakeSocket.last.end();
  await turn(1000);
  expect(FakeSocket.last.open().sent).toEqual([]);
});

test("a pause that the gateway asked for is kept, also when the page is shown", async () => {
  const page = stubPage();
  const fetch = async (): Promise<Response> => new Response("{}", { status: 503, headers: { "Retry-After": "20" } });
  let tries = 0;
  const connection = await session({ transport: "sse", fetch: () => ((tries += 1), fetch()) });
  await turn();
  expect(connection.state).toBe("waiting");
  page.show();
  await turn(19_000);
  expect(tries).toBe(1);
  await turn(2000);
  expect(tries).toBe(2);
});

test("an events connection pings when the page is shown, and leaves without an answer", async () => {
  const page = new EventTarget();
  vi.stubGlobal("addEventListener", page.addEventListener.bind(page));
  vi.stubGlobal("removeEventListener", page.removeEventListener.bind(page));
  const connection = await events();
  const first = FakeSocket.last.open();
  first.say(welcome);
  page.dispatchEvent(new Event("online"));
  expect(first.sent).toEqual([{ type: "ping" }]);
  first.say({ type: "pong" });
  await turn(5000);
  expect(connection.state).toBe("open");
  page.dispatchEvent(new Event("online"));
  await turn(5000);
  expect(connection.state).toBe("waiting");
});

test("pings are answered, and a silent gateway is left", async () => {
  const connection = await events();
  FakeSocket.last.open();
  FakeSocket.last.say({ ...welcome, heartbeat: { interval: 10, timeout: 20 } });
  for (let round = 0; round < 2; round += 1) {
    await turn(10_000);
    FakeSocket.last.say({ type: "ping", timestamp: new Date().toISOString() });
  }
  expect(FakeSocket.last.sent).toEqual([{ type: "pong" }, { type: "pong" }]);
  expect(connection.state).toBe("open");
  await turn(24_999);
  expect(connection.state).toBe("open");
  await turn(2);
  expect(connection.state).toBe("waiting");
});

test("a token is kept over reconnects, and asked for again when it is to blame", async () => {
  const reasons: string[] = [];
  await events({
    backoff: { baseMs: 2000, maxMs: 2000 },
    getToken: ({ reason }) => {
      reasons.push(reason);
      return `token${reasons.length}`;
    },
  });
  FakeSocket.last.open().end(1012);
  await turn(1000);
  FakeSocket.last.open().end(4401, "credential expired");
  await turn(1000);
  expect(reasons).toEqual(["initial", "expired"]);
  // Refused with a reason: at once. Without one: not at every try.
  FakeSocket.last.end(1006, "", "Unexpected server response: 403");
  await turn(1000);
  expect(reasons).toEqual(["initial", "expired", "rejected"]);
  for (let round = 0; round < 40; round += 1) {
    FakeSocket.last.end();
    await turn(1000);
  }
  expect(reasons).toEqual(["initial", "expired", "rejected", "failed"]);
  expect(FakeSocket.last.protocols[2]).toBe("bearer.token4");
});

test("an expired token is replaced at once", async () => {
  await events();
  FakeSocket.last.open().end(4401);
  await turn(0);
  expect(FakeSocket.all.length).toBe(2);
  expect(FakeSocket.last.protocols[2]).toBe("bearer.token2");
});

test("a token is refreshed in place before it expires, and the new one is kept", async () => {
  const connection = await events({ silenceMs: 1e9 });
  const refreshed: unknown[] = [];
  connection.on("refreshed", (told) => refreshed.push(told));
  const socket = FakeSocket.last.open();
  const now = Math.floor(Date.now() / 1000);
  socket.say({ ...welcome, expires_at: now + 600 });
  await turn(535_000);
  expect(socket.sent).toEqual([]);
  await turn(6_000);
  expect(socket.sent).toEqual([{ type: "refresh", token: "token2" }]);
  socket.say({ type: "refreshed", expires_at: now + 1200 });
  expect(refreshed).toEqual([{ expiresAt: now + 1200 }]);
  socket.end();
  await turn(1000);
  expect(FakeSocket.last.protocols[2]).toBe("bearer.token2");
  FakeSocket.last.open().say({ ...welcome, expires_at: now + 1200 });
  await turn(600_000);
  expect(FakeSocket.last.sent).toEqual([{ type: "refresh", token: "token3" }]);
});

test("GiveUp ends it for good: when connecting, when a token expires, and when one is refreshed", async () => {
  let isSignedOut = false;
  const getToken = (): string => {
    if (isSignedOut) throw new GiveUp("signed out");
    return "t";
  };
  const one = await events({ silenceMs: 1e9, getToken });
  FakeSocket.last.open().say({ ...welcome, expires_at: Date.now() / 1000 + 100 });
  const two = await events({ getToken });
  FakeSocket.last.open();
  isSignedOut = true;
  const ends: unknown[] = [];
  for (const connection of [one, two]) connection.on("state", ({ state, reason }) => ends.push([state, reason]));
  FakeSocket.last.end(4401);
  await turn(100_000);
  expect(ends.filter((end) => (end as string[])[0] === "closed")).toEqual([["closed", "signed out"], ["closed", "signed out"]]);
  const three = await session({ getToken: () => Promise.reject(new GiveUp()) });
  await turn();
  await expect(three.opened()).rejects.toThrow(/gave up/);
});

test("without a connection for the time that is given, it ends for good", async () => {
  const connection = await session({ giveUpAfterMs: 60_000, backoff: { baseMs: 100, maxMs: 100 } });
  const states: unknown[] = [];
  connection.on("state", ({ state, reason }) => states.push(state === "closed" ? reason : state));
  const fail = async (ms: number): Promise<void> => {
    for (let rest = ms; rest > 0; rest -= 1000) {
      FakeSocket.last.end();
      await turn(1000);
    }
  };
  await fail(59_000);
  expect(states).not.toContain("There was no connection for 60000 ms.");
  FakeSocket.last.open();
  await turn(100_000);
  await fail(59_000);
  expect(connection.state).not.toBe("closed");
  await fail(3_000);
  expect(states.at(-1)).toBe("There was no connection for 60000 ms.");
});

test("a refused refresh is tried again with another token", async () => {
  const connection = await events({ silenceMs: 1e9 });
  const problems: string[] = [];
  connection.on("error", ({ code }) => problems.push(code));
  const socket = FakeSocket.last.open();
  socket.say({ ...welcome, expires_at: Date.now() / 1000 + 100 });
  await turn(50_000);
  socket.say({ type: "error", code: "invalid_token", message: "no" });
  await turn(10_000);
  expect(socket.sent).toEqual([{ type: "refresh", token: "token2" }, { type: "refresh", token: "token3" }]);
  expect(problems).toEqual(["invalid_token"]);
});

test("a token that is about to expire opens nothing", async () => {
  await events({ silenceMs: 1e9, refreshBeforeMs: 0 });
  FakeSocket.last.open().say({ ...welcome, expires_at: Date.now() / 1000 + 60 });
  await turn(55_000);
  FakeSocket.last.end();
  await turn(500);
  expect(FakeSocket.last.protocols[2]).toBe("bearer.token2");
});

test("a refresh ends with its connection", async () => {
  let give: (token: string) => void = () => undefined;
  let asked = 0;
  await events({
    silenceMs: 1e9, backoff: { baseMs: 100_000, maxMs: 100_000 }, refreshBeforeMs: 1000_000,
    getToken: () => {
      asked += 1;
      return asked === 1 ? "first" : new Promise((resolve) => (give = resolve));
    },
  });
  const first = FakeSocket.last.open();
  first.say({ ...welcome, expires_at: Date.now() / 1000 + 3600 });
  await turn(2_600_000);
  expect(asked).toBe(2);
  first.end();
  await turn(50_000);
  const second = FakeSocket.last.open();
  expect(second).not.toBe(first);
  give("late");
  await turn();
  expect([first.sent, second.sent]).toEqual([[], []]);

  // Nor is one asked for while there is no connection.
  second.say({ ...welcome, expires_at: Date.now() / 1000 + 60 });
  second.end();
  await turn(40_000);
  expect([asked, FakeSocket.all.length]).toEqual([2, 2]);
});

test("a token that is about to expire is not asked for in a loop", async () => {
  let asked = 0;
  const connection = await events({ silenceMs: 1e9, getToken: () => `token${(asked += 1)}` });
  const socket = FakeSocket.last.open();
  const now = Date.now() / 1000;
  socket.say({ ...welcome, timestamp: new Date().toISOString(), expires_at: now + 0.2 });
  for (let n = 0; n < 60; n += 1) {
    await turn(500);
    if (socket.sent.length > 0) socket.say({ type: "refreshed", expires_at: Date.now() / 1000 + 0.2 });
  }
  expect(connection.state).toBe("open");
  expect(asked).toBeLessThanOrEqual(8);
});

test("a clock that is hours off neither floods with refreshes nor misses the expiry", async () => {
  await events({ silenceMs: 1e9 });
  const socket = FakeSocket.last.open();
  const theirs = Date.now() - 5 * 3600_000;
  socket.say({ ...welcome, expires_at: theirs / 1000 + 600 });
  await turn(60_000);
  expect(socket.sent).toEqual([]);
  // Told its time, the client knows.
  socket.say({ ...welcome, timestamp: new Date(theirs + 60_000).toISOString(), expires_at: theirs / 1000 + 600 });
  await turn(479_000);
  expect(socket.sent).toEqual([]);
  await turn(2_000);
  expect(socket.sent).toEqual([{ type: "refresh", token: "token2" }]);
});

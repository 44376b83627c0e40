// An agent against a scripted gateway, by a clock of the test's own.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { Agent, type AgentEnded, type AgentOptions, AgentRefused, AgentReplaced, type CallContext, type CallSeen } from "../../src/agents/index.ts";
import { GiveUp, type StateChange } from "../../src/index.ts";
import { FakeSocket } from "../support/fake-socket.ts";

const V2 = "wsproxy.agent.v2";
const welcome = { type: "connected", userId: "u-1", timestamp: 1, serverId: "s", connectionId: "c-1", heartbeat: { interval: 20_000, timeout: 90_000 } };
let open: Agent[] = [];

beforeEach(() => {
  vi.useFakeTimers();
  FakeSocket.all = [];
});

afterEach(() => {
  for (const agent of open) agent.close();
  open = [];
  vi.unstubAllGlobals();
  vi.useRealTimers();
});

const turn = (ms = 0): Promise<unknown> => vi.advanceTimersByTimeAsync(ms);

/** An agent that runs; its end, and how its states changed. */
async function start(options: Partial<AgentOptions> = {}): Promise<{ agent: Agent; end: Promise<AgentEnded | undefined>; changes: StateChange[] }> {
  const agent = new Agent("https://gateway.test", { userId: "u-1", secret: "wsa_secret", WebSocket: FakeSocket, random: () => 0.5, ...options });
  open.push(agent);
  const changes: StateChange[] = [];
  agent.on("state", (change) => changes.push(change));
  const end = agent.run().then(() => undefined, (error: AgentEnded) => error);
  await turn();
  return { agent, end, changes };
}

/** One that is connected. */
async function connected(options: Partial<AgentOptions> = {}): ReturnType<typeof start> {
  const started = await start(options);
  FakeSocket.last.open(V2).say(welcome);
  return started;
}

const call = (requestId: string, tool = "echo", more: object = {}): object => ({ type: "tool_call", requestId, tool, params: { n: 1 }, ...more });
const sent = (type: string, socket = FakeSocket.last): any[] => socket.sent.filter((message) => (message as { type: string }).type === type);

test("the secret is in the subprotocol and nowhere in the URL", async () => {
  await start({ secret: "a b" });
  expect(FakeSocket.last.url.href).toBe("wss://gateway.test/?userId=u-1");
  expect(FakeSocket.last.protocols).toEqual([V2, "wsproxy.v1", "bearer64.YSBi"]);
  for (const version of ["ä", "x".repeat(65), "a\nb"]) {
    expect(() => new Agent("https://gateway.test", { userId: "u", secret: "x", version, WebSocket: FakeSocket })).toThrow("64 visible");
  }
  expect(() => new Agent("https://gateway.test/?secret=x", { userId: "u", secret: "x", WebSocket: FakeSocket })).toThrow("in logs");
});

test("it is open when the gateway says so, and introduces itself", async () => {
  const { agent } = await start({ version: "1.2", platform: "linux" });
  FakeSocket.last.open(V2);
  expect(agent.state).toBe("connecting");
  FakeSocket.last.say(welcome);
  expect([agent.state, agent.connectionId]).toEqual(["open", "c-1"]);
  expect(sent("hello")).toEqual([{ type: "hello", version: "1.2", platform: "linux", capabilities: ["cancel", "progress"] }]);
});

test("a gateway of the first protocol gets nothing that it does not know", async () => {
  const { agent } = await start();
  agent.tool("echo", (params, { progress }) => (progress(1), params));
  FakeSocket.last.open("wsproxy.v1").say({ type: "connected", userId: "u-1", timestamp: 1, serverId: "s" });
  FakeSocket.last.say(call("q-1"));
  await turn(30_000);
  expect(FakeSocket.last.sent.map((message) => (message as { type: string }).type)).toEqual(["tool_response", "heartbeat"]);
});

test("a tool's result and a tool's error are answers", async () => {
  const { agent } = await connected();
  const seen: CallSeen[] = [];
  agent.on("call", (each) => seen.push(each));
  agent.tool("echo", (params) => params).tool("nothing", () => undefined).tool("fails", async () => {
    throw new Error("No such file.");
  });
  agent.tool("odd", () => 1n);
  for (const [id, tool] of [["q-1", "echo"], ["q-2", "nothing"], ["q-3", "fails"], ["q-4", "absent"], ["q-5", "odd"]] as const) {
    FakeSocket.last.say(call(id, tool));
  }
  await turn();
  const responses = sent("tool_response").sort((a, b) => (a.requestId < b.requestId ? -1 : 1));
  expect(responses.map(({ success, result, error }) => [success, result, error])).toEqual([
    [true, { n: 1 }, null],
    [true, null, null],
    [false, null, "No such file."],
    [false, null, 'There is no tool "absent" on this agent.'],
    [false, null, expect.stringContaining("BigInt")],
  ]);
  expect(responses.every(({ type, executionTime }) => type === "tool_response" && executionTime >= 0)).toBe(true);
  expect(seen.map(({ requestId, outcome }) => `${requestId} ${outcome}`).sort()).toEqual([
    "q-1 result", "q-2 result", "q-3 error", "q-4 error", "q-5 error",
  ]);
});

test("a tool learns the deadline, the trace and the id of its call", async () => {
  const { agent } = await connected();
  const seen: CallContext[] = [];
  agent.tool("echo", (_, context) => seen.push(context));
  FakeSocket.last.say(call("q-1", "echo", { deadlineMs: 5000, traceparent: "00-a-b-01" }));
  await turn();
  expect(seen[0]).toMatchObject({ requestId: "q-1", tool: "echo", deadline: Date.now() + 5000, traceparent: "00-a-b-01" });
});

test("no more calls run than the bound allows, and those beyond the queue are refused", async () => {
  const { agent } = await connected({ concurrency: 2, queueMax: 3 });
  const release: (() => void)[] = [];
  agent.tool("echo", () => new Promise<void>((resolve) => release.push(resolve)));
  for (let n = 0; n < 6; n += 1) FakeSocket.last.say(call(`q-${n}`));
  await turn();
  expect(release.length).toBe(2);
  expect(sent("tool_response").map(({ requestId, error }) => [requestId, error])).toEqual([["q-5", "Too many calls wait on this agent."]]);
  for (let n = 0; n < 5; n += 1) {
    release[n]?.();
    await turn();
  }
  expect(sent("tool_response").map(({ requestId }) => requestId)).toEqual(["q-5", "q-0", "q-1", "q-2", "q-3", "q-4"]);
});

test("a cancelled call aborts its signal and is not answered", async () => {
  const { agent } = await connected({ concurrency: 1 });
  const seen: CallSeen[] = [];
  agent.on("call", (each) => seen.push(each));
  const signals: AbortSignal[] = [];
  agent.tool("echo", (_, { signal }) => new Promise((_resolve, reject) => {
    signals.push(signal);
    signal.addEventListener("abort", () => reject(signal.reason));
  }));
  FakeSocket.last.say(call("q-1"));
  FakeSocket.last.say(call("q-2"));
  await turn();
  for (const requestId of ["q-2", "q-1", "q-7"]) FakeSocket.last.say({ type: "tool_cancel", requestId, reason: "cancelled" });
  await turn();
  expect(signals.map(({ aborted, reason }) => [aborted, reason.message])).toEqual([[true, "cancelled"]]);
  expect(sent("tool_response")).toEqual([]);
  expect(seen.map(({ requestId, outcome }) => [requestId, outcome])).toEqual([["q-2", "cancelled"], ["q-1", "cancelled"]]);
});

test("the end of the connection aborts its calls, whose results do not go out over the next one", async () => {
  const { agent } = await connected({ concurrency: 1 });
  let release = (): void => undefined;
  let signal: AbortSignal | undefined;
  agent.tool("echo", (_, context) => new Promise<void>((resolve) => {
    [release, signal] = [resolve, context.signal];
  }));
  FakeSocket.last.say(call("q-1"));
  await turn();
  FakeSocket.last.end();
  expect(signal?.aborted).toBe(true);
  await turn(1000);
  FakeSocket.last.open(V2).say(welcome);
  // The tool ignores its signal, and keeps its place for that.
  FakeSocket.last.say(call("q-2"));
  await turn();
  expect(sent("tool_response")).toEqual([]);
  release();
  await turn();
  release();
  await turn();
  expect(sent("tool_response").map(({ requestId }) => requestId)).toEqual(["q-2"]);
});

test("a call that comes again after a lost connection gets the answer of its first run", async () => {
  const { agent } = await connected();
  let runs = 0;
  let release = (): void => undefined;
  agent.tool("echo", () => new Promise((resolve) => {
    const run = (runs += 1);
    release = () => resolve(run);
  }));
  const again = async (): Promise<void> => {
    FakeSocket.last.end();
    await turn(1000);
    FakeSocket.last.open(V2).say(welcome);
    FakeSocket.last.say(call("q-1"));
    await turn();
  };
  FakeSocket.last.say(call("q-1"));
  await turn();
  await again();
  expect([runs, sent("tool_response").length]).toEqual([1, 0]);
  release();
  await turn();
  expect(sent("tool_response")).toMatchObject([{ requestId: "q-1", result: 1 }]);
  await again();
  expect(sent("tool_response")).toMatchObject([{ requestId: "q-1", result: 1 }]);
  // Another call of the same id.
  FakeSocket.last.say(call("q-1", "echo", { params: { n: 2 } }));
  await turn();
  expect(runs).toBe(2);
});

test("a tool that stopped when the connection was lost runs again when its call comes again", async () => {
  const { agent } = await connected();
  let runs = 0;
  agent.tool("echo", (_, { signal }) => {
    runs += 1;
    if (runs > 1) return "done";
    return new Promise((_resolve, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
  });
  FakeSocket.last.say(call("q-1"));
  await turn();
  FakeSocket.last.end();
  await turn(1000);
  FakeSocket.last.open(V2).say(welcome);
  FakeSocket.last.say(call("q-1"));
  await turn();
  expect(sent("tool_response")).toMatchObject([{ requestId: "q-1", result: "done" }]);
});

test("messages go out no faster than the gateway lets one connection send", async () => {
  const { agent } = await connected({ sendRate: { perSecond: 10, burst: 20 }, concurrency: 64 });
  agent.tool("echo", (_, { progress }) => progress(1));
  for (let n = 0; n < 60; n += 1) FakeSocket.last.say(call(`q-${n}`));
  await turn();
  expect(FakeSocket.last.sent.length).toBe(20);
  await turn(1000);
  expect(FakeSocket.last.sent.length).toBeLessThanOrEqual(30);
  await turn(20_000);
  expect(sent("tool_response").length).toBe(60);
  // Refusals count too.
  for (let n = 0; n < 60; n += 1) FakeSocket.last.say(call(`q-${n}`, "absent"));
  await turn();
  expect(sent("tool_response").length).toBeLessThanOrEqual(80);
  await turn(5000);
  expect(sent("tool_response").length).toBe(120);
});

test("progress goes out twenty times a second, and the newest always, before the result", async () => {
  const { agent } = await connected();
  agent.tool("echo", async (_, { progress }) => {
    for (let n = 1; n <= 100; n += 1) {
      progress(n, 100, `step ${n}`);
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
    progress(101);
  });
  FakeSocket.last.say(call("q-1"));
  await turn(1100);
  const told = sent("tool_progress");
  expect(told.length).toBeGreaterThan(15);
  expect(told.length).toBeLessThanOrEqual(22);
  expect(told[0]).toEqual({ type: "tool_progress", requestId: "q-1", progress: 1, total: 100, message: "step 1" });
  expect(told.at(-1)).toEqual({ type: "tool_progress", requestId: "q-1", progress: 101 });
  expect((FakeSocket.last.sent.at(-1) as { type: string }).type).toBe("tool_response");
  await turn(1000);
  expect(sent("tool_progress").length).toBe(told.length);
});

test("what is no progress is left out, since the gateway would close the connection for it", async () => {
  const { agent } = await connected();
  agent.tool("echo", async (_, { progress }) => {
    const tell = progress as (...values: unknown[]) => void;
    for (const values of [[NaN], ["50 %"], [], [Infinity], [1, "10", {}], [2, NaN, null]]) {
      tell(...values);
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
  });
  FakeSocket.last.say(call("q-1"));
  await turn(1000);
  expect(sent("tool_progress")).toEqual([1, 2].map((progress) => ({ type: "tool_progress", requestId: "q-1", progress })));
});

test("progress that is told after the result is left out", async () => {
  const { agent } = await connected();
  let late = (): void => undefined;
  agent.tool("echo", (_, { progress }) => {
    late = () => progress(1);
    setTimeout(late, 1000);
  });
  FakeSocket.last.say(call("q-1"));
  await turn(2000);
  late();
  expect(sent("tool_progress")).toEqual([]);
});

test("while the gateway reads nothing, progress is left out and results wait in their calls' places", async () => {
  const { agent } = await connected({ concurrency: 2 });
  agent.tool("echo", (_, { progress }) => progress(1));
  FakeSocket.last.bufferedAmount = 5 * 1024 * 1024;
  for (let n = 0; n < 4; n += 1) FakeSocket.last.say(call(`q-${n}`));
  await turn(10_000);
  expect([sent("tool_response").length, sent("tool_progress").length]).toEqual([0, 0]);
  FakeSocket.last.bufferedAmount = 0;
  await turn(200);
  expect(sent("tool_response").length).toBe(4);
});

test("a result beyond the gateway's bound is an error of the call, not the end of the connection", async () => {
  const { agent } = await connected({ messageBytesMax: 1000 });
  agent.tool("echo", () => "ä".repeat(500)).tool("fits", () => "ä".repeat(400)).tool("fails", () => {
    throw new Error("x".repeat(100_000));
  });
  for (const tool of ["echo", "fits", "fails"]) FakeSocket.last.say(call(tool, tool));
  await turn();
  const by = Object.fromEntries(sent("tool_response").map((each) => [each.requestId, each]));
  expect(by["echo"]).toMatchObject({ success: false, error: expect.stringMatching(/^The result is too large: 1\d\d\d bytes, and 1000 are allowed\.$/) });
  expect(by["fits"].success).toBe(true);
  expect(by["fails"].error.length).toBe(16 * 1024);
});

test("a result of more levels than the gateway reads is an error of the call", async () => {
  const { agent } = await connected();
  const nested = (levels: number): unknown => (levels === 0 ? '[["\\"[' : [nested(levels - 1)]);
  agent.tool("echo", ({ levels }: { levels: number }) => nested(levels));
  for (const levels of [127, 128]) FakeSocket.last.say(call(`${levels}`, "echo", { params: { levels } }));
  await turn();
  expect(sent("tool_response").map(({ success, error }) => [success, error])).toEqual([
    [true, null],
    [false, "The result is nested too deeply: 128 levels are allowed."],
  ]);
});

test("every message of the gateway's vectors is understood", async () => {
  const { cases } = JSON.parse(readFileSync(fileURLToPath(new URL("../../../../spec/agents/gateway_messages.json", import.meta.url)), "utf8")) as {
    cases: { kind: string; version: number; text: string }[];
  };
  for (const version of [1, 2]) {
    const of = (kind: string): string[] => cases.filter((each) => each.kind === kind && each.version === version).map(({ text }) => text);
    const { agent } = await start({ concurrency: 1 });
    const problems: string[] = [];
    agent.on("error", ({ code }) => problems.push(code));
    const contexts: CallContext[] = [];
    agent.tool("read_file", (params, context) => {
      contexts.push(context);
      expect(params).toEqual({ path: "/x" });
      return new Promise((resolve) => context.signal.addEventListener("abort", resolve));
    });
    FakeSocket.last.open(version === 2 ? V2 : "wsproxy.v1");
    for (const text of [...of("connected"), ...of("heartbeat_ack"), ...of("tool_call"), ...of("error")]) FakeSocket.last.sayRaw(text);
    await turn();
    expect([agent.state, contexts[0]?.requestId, problems]).toEqual(["open", "q-1", version === 1 ? ["unknown_type"] : []]);
    if (version === 1) continue;
    expect(contexts[0]?.deadline).toBe(Date.now() + 29950);
    expect(agent.connectionId).toBe("0190f5a0-0000-7000-8000-000000000001");
    FakeSocket.last.sayRaw(of("tool_cancel")[0] as string);
    await turn();
    expect(contexts[0]?.signal.reason).toMatchObject({ message: "timeout" });
  }
});

test("heartbeats go out at the gateway's interval, and silence after one ends the connection", async () => {
  const { changes } = await connected();
  for (let n = 1; n <= 3; n += 1) {
    await turn(20_000);
    expect(sent("heartbeat").length).toBe(n);
    FakeSocket.last.say({ type: "heartbeat_ack", timestamp: 1 });
  }
  await turn(20_000);
  await turn(10_000);
  expect(changes.at(-1)).toMatchObject({ state: "waiting", reason: "nothing heard" });
  expect(FakeSocket.last.closed).toBeDefined();
});

test("silence ends the connection too where heartbeats are more frequent than the time to answer one", async () => {
  const { changes } = await start();
  FakeSocket.last.open(V2).say({ ...welcome, heartbeat: { interval: 1_000, timeout: 90_000 } });
  await turn(10_999);
  expect(changes.at(-1)?.state).toBe("open");
  await turn(1);
  expect(changes.at(-1)).toMatchObject({ state: "waiting", reason: "nothing heard" });
});

test("it comes back with full jitter, and starts again after a stable time", async () => {
  const { changes } = await connected({ backoff: { baseMs: 100, maxMs: 1000, stableMs: 5000 } });
  for (let round = 0; round < 6; round += 1) {
    FakeSocket.last.end(1012);
    await turn(1000);
  }
  expect(changes.filter(({ state }) => state === "waiting").map(({ delayMs }) => delayMs)).toEqual([50, 100, 200, 400, 500, 500]);
  FakeSocket.last.open(V2).say(welcome);
  await turn(5000);
  FakeSocket.last.end();
  expect(changes.at(-1)).toMatchObject({ state: "waiting", delayMs: 50 });
});

test.each([
  [4001, "replaced", AgentReplaced, "Another agent of u-1 has connected, and the newer one stays."],
  [4401, "revoked", AgentRefused, "The gateway does not accept the secret of u-1: revoked."],
  [4004, "ended by the backend", Error, "The connection of u-1 has ended: 4004 ended by the backend"],
  [4500, "", Error, "The connection of u-1 has ended: 4500"],
])("close code %s ends it for good", async (code, reason, Class, message) => {
  const { agent, end } = await connected();
  FakeSocket.last.end(code, reason);
  const error = await end;
  expect(error).toBeInstanceOf(Class);
  expect(error).toMatchObject({ message, code, reason });
  await turn(1_000_000);
  expect([agent.state, FakeSocket.all.length]).toEqual(["closed", 1]);
});

test.each([
  [1006, 250], [1011, 250], [1012, 250], [4002, 250],
  // The gateway did not like what it got, or wants patience.
  [1000, 5250], [1008, 5250], [1009, 5250], [1013, 5250],
])("close code %s does not, and the pause is %s ms", async (code, delayMs) => {
  const { changes } = await connected();
  FakeSocket.last.end(code);
  expect(changes.at(-1)).toMatchObject({ state: "waiting", delayMs });
  await turn(delayMs);
  expect(FakeSocket.all.length).toBe(2);
});

test.each([
  [401, "AgentRefused"],
  [403, "AgentRefused"],
  [409, "AgentReplaced"],
])("a handshake refused with %s ends it, where the platform shows the status", async (status, name) => {
  const { end } = await start();
  FakeSocket.last.end(1006, "", `Unexpected server response: ${status}`);
  expect(await end).toMatchObject({ name, status });
});

test.each([404, 429, 502, 503, 504])("a handshake refused with %s is tried again", async (status) => {
  await start();
  FakeSocket.last.end(1006, "", `Unexpected server response: ${status}`);
  await turn(10_000);
  expect(FakeSocket.all.length).toBe(2);
});

test("a refused handshake without a status, as in browsers, is tried again until the application's time is over", async () => {
  const { end, changes } = await start({ giveUpAfterMs: 60_000 });
  for (let n = 0; n < 30; n += 1) {
    FakeSocket.last.end();
    await turn(5_000);
  }
  expect(await end).toMatchObject({ name: "AgentEnded", message: "There was no connection for 60000 ms." });
  expect(changes.some(({ attempt }) => attempt > 3)).toBe(true);
});

test("the application's time counts from the loss of the connection", async () => {
  const { changes } = await connected({ giveUpAfterMs: 60_000 });
  for (let n = 0; n < 10; n += 1) {
    await turn(20_000);
    FakeSocket.last.say({ type: "heartbeat_ack", timestamp: 1 });
  }
  FakeSocket.last.end();
  expect(changes.at(-1)?.state).toBe("waiting");
});

test("a network that is back ends the wait, and a heartbeat tests a connection that is open", async () => {
  const page = new EventTarget();
  for (const name of ["addEventListener", "removeEventListener"] as const) vi.stubGlobal(name, page[name].bind(page));
  const { changes } = await connected();
  page.dispatchEvent(new Event("online"));
  expect(sent("heartbeat").length).toBe(1);
  for (let n = 0; n < 8; n += 1) {
    FakeSocket.last.end();
    await turn(30_000);
  }
  FakeSocket.last.end();
  const { length } = FakeSocket.all;
  page.dispatchEvent(new Event("online"));
  await turn();
  expect(FakeSocket.all.length).toBe(length + 1);
  FakeSocket.last.end();
  expect(changes.at(-1)).toMatchObject({ state: "waiting", delayMs: 250 });
});

test("a handshake that fails without a close event, as in Node 22, is not waited for", async () => {
  const { changes } = await start();
  FakeSocket.last.fail();
  await turn(100);
  expect(changes.at(-1)).toMatchObject({ state: "waiting", code: 1006 });
});

test("a secret from a function is asked for anew; the one that was refused is not sent again", async () => {
  const secrets = ["old", "new", "new"];
  const asked: string[] = [];
  const { end } = await start({ secret: () => (asked.push("?"), secrets.shift() ?? "new") });
  FakeSocket.last.end(1006, "", "Unexpected server response: 403");
  await turn(1000);
  expect(FakeSocket.last.protocols.at(-1)).toBe("bearer.new");
  FakeSocket.last.open(V2).say(welcome);
  FakeSocket.last.end(4401, "revoked");
  await turn(1000);
  expect(await end).toMatchObject({ name: "AgentRefused", reason: "revoked" });
  expect([asked.length, FakeSocket.all.length]).toEqual([3, 2]);
});

test("a function without a secret is asked again, until it gives up", async () => {
  let tries = 0;
  const { agent, end } = await start({
    secret: () => {
      tries += 1;
      throw tries < 3 ? new Error("The file is locked.") : new GiveUp("signed out");
    },
  });
  const problems: string[] = [];
  agent.on("error", ({ code }) => problems.push(code));
  await turn(10_000);
  expect(await end).toMatchObject({ name: "AgentEnded", message: expect.stringContaining("signed out") });
  expect([tries, problems]).toEqual([3, ["secret"]]);
});

test("close ends the run, and run begins another one", async () => {
  const { agent, end } = await connected();
  agent.close("done");
  expect(await end).toBeUndefined();
  expect(FakeSocket.last.closed).toEqual({ code: 1000, reason: "done" });
  const again = agent.run();
  await turn();
  expect(FakeSocket.all.length).toBe(2);
  agent.close();
  await again;
});

test("stop lets calls end, refuses further ones, and waits no longer than it is told", async () => {
  const { agent, end } = await connected();
  agent.tool("slow", (_, { signal }) => new Promise((resolve) => signal.addEventListener("abort", resolve)));
  agent.tool("echo", () => new Promise((resolve) => setTimeout(() => resolve("done"), 1000)));
  FakeSocket.last.say(call("q-1"));
  const stopped = agent.stop();
  FakeSocket.last.say(call("q-2"));
  await turn(999);
  expect([agent.state, sent("tool_response").map(({ error }) => error)]).toEqual(["open", ["The agent is ending."]]);
  await turn(1);
  await stopped;
  expect([agent.state, sent("tool_response").at(-1).result, await end]).toEqual(["closed", "done", undefined]);

  void agent.run();
  await turn();
  FakeSocket.last.open(V2).say(welcome);
  FakeSocket.last.say(call("q-3", "slow"));
  await turn();
  void agent.stop(2000);
  await turn(1999);
  expect(agent.state).toBe("open");
  await turn(1);
  expect(agent.state).toBe("closed");
});

test("an aborted signal ends it", async () => {
  const abort = new AbortController();
  const { end } = await connected({ signal: abort.signal });
  abort.abort();
  expect(await end).toBeUndefined();
});

test("messages that are no calls, or of an earlier connection, are ignored", async () => {
  const { agent } = await connected();
  let runs = 0;
  agent.tool("echo", () => (runs += 1));
  const first = FakeSocket.last;
  for (const raw of ["[]", "no json", "7", '{"type":"news"}', '{"type":"tool_call"}', '{"type":"tool_call","requestId":7,"tool":"echo"}']) first.sayRaw(raw);
  first.sayRaw(new ArrayBuffer(3));
  first.end();
  await turn(1000);
  first.say(call("q-1"));
  FakeSocket.last.open(V2).say(welcome);
  await turn();
  expect([runs, agent.state]).toEqual([0, "open"]);
});

// Agents and callers against the real gateway, Redis and SQLite: every call has one outcome, over cuts, restarts and replacements.

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, expect, test } from "vitest";
import { WebSocket } from "ws";
import { Agent, type AgentEnded, type AgentOptions, Agents, type CallContext, type CallOptions, type Progress } from "../src/agents/index.ts";
import { API_KEY, Cable, Gateway, Redis, stopAll, until } from "./support/machines.ts";

const folder = mkdtempSync(join(tmpdir(), "wsproxy-agents-"));
const settings = {
  WSPROXY_ENDPOINTS__AGENTS: "true",
  WSPROXY_DATABASE__PATH: join(folder, "wsproxy.db"),
  WSPROXY_AGENTS__OFFLINE_WAIT: "2s",
};
let redis: Redis;
let gateway: Gateway;
let other: Gateway;
let cable: Cable;
let running: Agent[] = [];
let count = 0;

beforeAll(async () => {
  redis = await Redis.start();
  gateway = await Gateway.start(redis, settings);
  // A second instance with the same database, so that the same secret opens both.
  other = await Gateway.start(redis, settings);
  cable = await Cable.to(gateway.port);
  // The database is opened in the background.
  for (const { url } of [gateway, other]) await until("the gateway is healthy", async () => (await fetch(`${url}/health`)).ok);
});

afterAll(async () => {
  await cable?.end();
  await gateway?.stop();
  await other?.stop();
  await redis?.end();
  stopAll();
  rmSync(folder, { recursive: true, force: true });
});

afterEach(() => {
  for (const agent of running) agent.close();
  running = [];
  cable.target = gateway.port;
});

interface Running {
  agent: Agent;
  user: string;
  secret: string;
  /** The error with which the run ended, nothing after `close`. */
  end: Promise<AgentEnded | undefined>;
}

/** A connected agent of a user of its own. */
async function start(options: Partial<AgentOptions> = {}, via: { url: string } = gateway): Promise<Running> {
  const user = options.userId ?? `u-${(count += 1)}`;
  const secret = (options.secret as string | undefined) ?? (await gateway.api(`agents/${user}/secrets`)).secret;
  const agent = new Agent(via.url, { WebSocket, backoff: { baseMs: 20, maxMs: 200 }, ...options, userId: user, secret });
  running.push(agent);
  agent.tool("echo", (params) => params);
  const opened = new Promise<void>((resolve) => agent.on("state", ({ state }) => state === "open" && resolve()));
  const end = agent.run().then(() => undefined, (error: AgentEnded) => error);
  await Promise.race([opened, end.then((error) => Promise.reject(error ?? new Error("It was closed.")))]);
  return { agent, user, secret, end };
}

const agentsOf = (gateway: Gateway): Agents => new Agents(gateway.url, { apiKey: API_KEY });
const failure = (call: Promise<unknown>): Promise<any> => call.then((value) => ({ value }), (error: unknown) => error);
const call = (user: string, tool: string, params?: unknown, options?: CallOptions): Promise<any> => agentsOf(gateway).call(user, tool, params, options);

/** A tool that runs until its signal is aborted; what it saw. */
function hang(agent: Agent): { contexts: CallContext[]; reasons: string[] } {
  const seen = { contexts: [] as CallContext[], reasons: [] as string[] };
  agent.tool("hang", (_, context) => new Promise((_resolve, reject) => {
    seen.contexts.push(context);
    context.signal.addEventListener("abort", () => {
      seen.reasons.push((context.signal.reason as Error).message);
      reject(context.signal.reason);
    });
  }));
  return seen;
}

test("a call gives the tool's result, from the agent's instance and from another one", async () => {
  const { user } = await start();
  const params = { text: "wörld \u0000 \ud83d\ude00", number: 12345678901234, list: [null, true, [], {}] };
  expect(await call(user, "echo", params)).toEqual(params);
  expect(await agentsOf(other).call(user, "echo", params)).toEqual(params);
  expect(await call(user, "echo")).toEqual({});
});

test("a tool's error and an unknown tool are errors of the tool", async () => {
  const { agent, user } = await start();
  agent.tool("fails", async () => { throw new Error("No such file."); });
  for (const agents of [agentsOf(gateway), agentsOf(other)]) {
    expect(await failure(agents.call(user, "fails"))).toMatchObject({ name: "ToolError", message: "No such file.", requestId: expect.any(String) });
    expect(await failure(agents.call(user, "absent"))).toMatchObject({ name: "ToolError", message: 'There is no tool "absent" on this agent.' });
  }
});

test("progress comes in order and before the result", async () => {
  const { agent, user } = await start();
  agent.tool("work", async (_, { progress }) => {
    for (let n = 1; n <= 5; n += 1) {
      progress(n, 5, `step ${n}`);
      await new Promise((resolve) => setTimeout(resolve, 80));
    }
    return "done";
  });
  for (const agents of [agentsOf(gateway), agentsOf(other)]) {
    const told: Progress[] = [];
    expect(await agents.call(user, "work", {}, { onProgress: (progress) => told.push(progress) })).toBe("done");
    expect(told.at(-1)).toEqual({ progress: 5, total: 5, message: "step 5" });
    expect(told.map(({ progress }) => progress)).toEqual([...told.map(({ progress }) => progress)].sort());
    expect(told.length).toBeGreaterThan(2);
  }
});

test("an agent learns its deadline and the caller's trace, and a call without an answer times out", async () => {
  const { agent, user } = await start();
  const { contexts, reasons } = hang(agent);
  const traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
  const since = Date.now();
  expect(await failure(call(user, "hang", {}, { timeoutMs: 500, traceparent }))).toMatchObject({ name: "CallTimeout", status: 504 });
  expect(Date.now() - since).toBeLessThan(2_000);
  expect(contexts[0]?.traceparent).toMatch(/^00-0af7651916cd43dd8448eb211c80319c-[\da-f]{16}-01$/);
  expect((contexts[0]?.deadline ?? 0) - since).toBeGreaterThan(300);
  await until("the tool is told", () => reasons.length === 1);
});

test.each(["here", "elsewhere"])("an aborted signal cancels the call on the agent, %s", async (where) => {
  const { agent, user } = await start();
  const { contexts, reasons } = hang(agent);
  const abort = new AbortController();
  const result = failure(agentsOf(where === "here" ? gateway : other).call(user, "hang", {}, { signal: abort.signal }));
  await until("the tool runs", () => contexts.length === 1);
  abort.abort();
  expect(await result).toMatchObject({ name: "CallCancelled" });
  await until("the tool is told", () => reasons.length === 1);
  expect(await call(user, "echo", { n: 1 })).toEqual({ n: 1 });
});

test("cancel ends a call by its key", async () => {
  const { agent, user } = await start();
  const { contexts, reasons } = hang(agent);
  const result = failure(call(user, "hang", {}, { idempotencyKey: "key-1" }));
  await until("the tool runs", () => contexts.length === 1);
  expect(contexts[0]?.requestId).toBe("key-1");
  await agentsOf(other).cancel(user, "key-1");
  expect(await result).toMatchObject({ name: "CallCancelled", status: 409, requestId: "key-1" });
  await until("the tool is told", () => reasons.length === 1);
});

test("without an agent a call is AgentOffline, and an agent that comes within the wait is called", async () => {
  const { agent, user, secret } = await start();
  expect([await agentsOf(other).isConnected(user), await agentsOf(other).isConnected("absent")]).toEqual([true, false]);
  expect(await failure(call("absent", "echo", {}, { timeoutMs: 1_000 }))).toMatchObject({ name: "AgentOffline", retryable: true });
  agent.close();
  // A call that reaches the gateway before the end of the connection would end with it.
  await until("the gateway knows", async () => !(await agentsOf(gateway).isConnected(user)));
  const late = call(user, "echo", { n: 1 });
  await new Promise((resolve) => setTimeout(resolve, 300));
  await start({ userId: user, secret });
  expect(await late).toEqual({ n: 1 });
});

test("an agent that dies in a call is AgentGone at once", async () => {
  const { agent, user } = await start({}, cable);
  const { contexts, reasons } = hang(agent);
  const result = failure(call(user, "hang"));
  await until("the tool runs", () => contexts.length === 1);
  const since = Date.now();
  cable.cut();
  expect(await result).toMatchObject({ name: "AgentGone", status: 502, retryable: false });
  expect(Date.now() - since).toBeLessThan(1_000);
  await until("the tool is told", () => reasons[0] === "The connection has ended.");
});

test("with a key such a call is sent again, and a tool that went on does not run twice", async () => {
  const { agent, user } = await start({}, cable);
  let runs = 0;
  let finish = (): void => undefined;
  agent.tool("slow", () => new Promise((resolve) => {
    const run = (runs += 1);
    finish = () => resolve(`run ${run}`);
  }));
  const result = call(user, "slow", { n: 1 }, { idempotencyKey: "key-2" });
  await until("the tool runs", () => runs === 1);
  const back = new Promise<void>((resolve) => agent.on("state", ({ state }) => state === "open" && resolve()));
  cable.cut();
  await back;
  finish();
  expect(await result).toBe("run 1");
  expect(runs).toBe(1);
});

test.each(["here", "elsewhere"])("a second agent replaces the first, which ends, %s", async (where) => {
  const first = await start();
  const second = await start({ userId: first.user, secret: first.secret }, where === "here" ? gateway : other);
  second.agent.tool("echo", () => "from the second");
  expect(await first.end).toMatchObject({ name: "AgentReplaced", code: 4001 });
  expect(await call(first.user, "echo")).toBe("from the second");
  await new Promise((resolve) => setTimeout(resolve, 500));
  expect([first.agent.state, second.agent.state]).toEqual(["closed", "open"]);
});

test("a wrong secret is refused with its reason, and no other try follows", async () => {
  const { user } = await start();
  const tries: string[] = [];
  const agent = new Agent(gateway.url, { userId: user, secret: "wsa_wrong", WebSocket, backoff: { baseMs: 10 } });
  running.push(agent);
  agent.on("state", ({ state }) => tries.push(state));
  expect(await failure(agent.run())).toMatchObject({ name: "AgentRefused", status: 403, reason: "invalid_credentials" });
  expect(tries).toEqual(["connecting", "closed"]);
});

test("a user that is removed loses the connection for good", async () => {
  const { user, end } = await start();
  const response = await fetch(`${gateway.url}/api/v1/agents/${user}`, { method: "DELETE", headers: { Authorization: `Bearer ${API_KEY}` } });
  expect(response.ok).toBe(true);
  expect(await end).toMatchObject({ name: "AgentRefused", code: 4401 });
});

test("an agent that is disconnected by the backend ends", async () => {
  const { user, end } = await start();
  await gateway.api(`agents/${user}/disconnect`, { reason: "maintenance" });
  expect(await end).toMatchObject({ name: "AgentEnded", code: 4004 });
});

test("an agent comes back when its instance was killed and started again", async () => {
  const own = await Gateway.start(redis, settings);
  const { agent, user } = await start({}, own);
  await own.stop("SIGKILL");
  await until("it has noticed", () => agent.state !== "open");
  await own.restart();
  await until("it is back", () => agent.state === "open");
  expect(await call(user, "echo", { n: 1 })).toEqual({ n: 1 });
  await own.stop();
});

test("a connection that goes silent is replaced by the agent itself, which does not take that for another agent", async () => {
  const own = await Gateway.start(redis, { ...settings, WSPROXY_HEARTBEAT__INTERVAL: "1s", WSPROXY_HEARTBEAT__TIMEOUT: "90s" });
  const path = await Cable.to(own.port);
  const { agent, user, end } = await start({}, path);
  const first = agent.connectionId;
  path.silence();
  await until("it has another connection", () => agent.state === "open" && agent.connectionId !== first);
  expect(await agentsOf(own).call(user, "echo", { n: 1 })).toEqual({ n: 1 });
  const ended = await Promise.race([end.then(() => true), new Promise((resolve) => setTimeout(() => resolve(false), 1_000))]);
  expect(ended).toBe(false);
  await path.end();
  await own.stop();
});

test("calls go on after Redis was killed and started again", async () => {
  const { agent, user } = await start();
  await redis.stop();
  await redis.restart();
  await until("a call is answered from another instance", () => agentsOf(other).call(user, "echo", { n: 1 }, { timeoutMs: 2_000 }));
  await until("a call is answered from its own", () => agentsOf(gateway).call(user, "echo", { n: 1 }, { timeoutMs: 2_000 }));
  expect(agent.state).toBe("open");
});

test("five hundred calls at once are all answered over one connection", async () => {
  const { agent, user } = await start();
  const id = agent.connectionId;
  const results = await Promise.all(Array.from({ length: 500 }, (_, n) => agentsOf(n % 2 ? gateway : other).call(user, "echo", { n })));
  expect(results).toEqual(Array.from({ length: 500 }, (_, n) => ({ n })));
  expect(agent.connectionId).toBe(id);
}, 60_000);

test("a result that is too large is an error of its call alone", async () => {
  const { agent, user } = await start();
  agent.tool("large", ({ size }: { size: number }) => "x".repeat(size));
  expect((await call(user, "large", { size: 1_000_000 })).length).toBe(1_000_000);
  expect(await failure(call(user, "large", { size: 2_000_000 }))).toMatchObject({ name: "ToolError", message: expect.stringContaining("too large") });
  expect(await call(user, "echo", { n: 1 })).toEqual({ n: 1 });
});

test("a key that was used is a duplicate, with another body a conflict", async () => {
  const { user } = await start();
  expect(await call(user, "echo", { n: 1 }, { idempotencyKey: "key-3" })).toEqual({ n: 1 });
  expect(await failure(call(user, "echo", { n: 1 }, { idempotencyKey: "key-3" }))).toMatchObject({ name: "CallDuplicate", status: 409 });
  expect(await failure(call(user, "echo", { n: 2 }, { idempotencyKey: "key-3" }))).toMatchObject({ code: "conflict", status: 409 });
});

test("the secret is in no log", async () => {
  const { secret } = await start();
  await failure(start({ userId: "u-1", secret: `${secret}x` }));
  for (const each of [gateway, other]) expect(each.output).not.toContain(secret);
});

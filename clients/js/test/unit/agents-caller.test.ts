// Calls of tools over HTTP, against a scripted gateway.

import type { ServerResponse } from "node:http";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { Agents, type CallOptions } from "../../src/agents/index.ts";
import { GatewayDouble, type Listener } from "../support/gateway-double.ts";
import { freePort } from "../support/machines.ts";

let gateway: GatewayDouble;
let agents: Agents;

beforeEach(async () => {
  gateway = await GatewayDouble.start();
  agents = new Agents(gateway.url, { apiKey: "key", random: () => 0 });
});

afterEach(() => gateway.stop());

const read = (options: CallOptions = {}): Promise<any> => agents.call("u@1", "read_file", { path: "/x" }, options);
/** The error with which `call` rejects; observed at once, so that no rejection is unhandled. */
const failure = (call: Promise<unknown>): Promise<any> => call.then(() => undefined, (error: unknown) => error);

async function body({ request }: Listener): Promise<any> {
  let text = "";
  for await (const chunk of request) text += String(chunk);
  return JSON.parse(text);
}

function answer(response: ServerResponse, status: number, body: unknown, headers: Record<string, string> = {}): void {
  response.writeHead(status, { "Content-Type": "application/json", ...headers }).end(typeof body === "string" ? body : JSON.stringify(body));
}

const done = (result: unknown): object => ({ request_id: "q-1", outcome: "response", success: true, result, error: null, execution_time_ms: 1 });
const failed = (code: string, retryable: boolean): object => ({ error: { code, message: `It is ${code}.`, retryable }, request_id: "q-1", outcome: code });

test("a call is one POST with the key, and gives the result", async () => {
  const result = read({ timeoutMs: 20_000, idempotencyKey: "k-1", traceparent: "00-a-b-01" });
  const listener = await gateway.listeners.next();
  const { method, url, headers } = listener.request;
  expect([method, url]).toEqual(["POST", "/api/v1/agents/u%401/calls"]);
  expect(headers).toMatchObject({ authorization: "Bearer key", "idempotency-key": "k-1", traceparent: "00-a-b-01", accept: "application/json" });
  const { timeout_ms, ...rest } = await body(listener);
  expect(rest).toEqual({ tool: "read_file", params: { path: "/x" } });
  expect(timeout_ms).toBeGreaterThan(15_000);
  expect(timeout_ms).toBeLessThanOrEqual(20_000);
  answer(listener.response, 200, done([1, null]));
  expect(await result).toEqual([1, null]);
});

test("an address may have a path", async () => {
  const call = new Agents(`${gateway.url}/gateway`, { apiKey: "key" }).call("u-1", "t");
  const listener = await gateway.listeners.next();
  expect(listener.url.pathname).toBe("/gateway/api/v1/agents/u-1/calls");
  expect((await body(listener)).params).toEqual({});
  answer(listener.response, 200, done(null));
  expect(await call).toBe(null);
});

test.each([
  [200, { ...done(null), success: false, error: "No such file." }, { name: "ToolError", code: "tool_error", message: "No such file." }],
  [502, failed("agent_gone", false), { name: "AgentGone", message: "It is agent_gone." }],
  [504, failed("timeout", false), { name: "CallTimeout" }],
  [409, failed("cancelled", false), { name: "CallCancelled" }],
  [409, failed("duplicate", false), { name: "CallDuplicate", code: "duplicate" }],
  [403, { error: { code: "forbidden", message: "m", retryable: false } }, { name: "CallError", code: "forbidden", status: 403 }],
  [503, failed("outcome_unknown", false), { name: "CallError", code: "outcome_unknown", retryable: false }],
  [502, "<html>", { name: "CallError", code: "outcome_unknown", status: 502 }],
  [200, "<html>", { name: "CallError", code: "outcome_unknown", status: 200 }],
])("an answer with %s %j is an error of its class", async (status, body, error) => {
  const call = failure(read());
  answer((await gateway.listeners.next()).response, status, body);
  expect(await call).toMatchObject(error);
  expect(gateway.listeners.size).toBe(0);
});

test("what the gateway calls retryable is sent again, with the time that is left", async () => {
  const call = read({ timeoutMs: 20_000 });
  let left = 20_001;
  for (const [status, code] of [[503, "agent_offline"], [429, "busy"], [502, "agent_gone"]] as const) {
    const listener = await gateway.listeners.next();
    const { timeout_ms } = await body(listener);
    expect(timeout_ms).toBeLessThan(left);
    left = timeout_ms + 1;
    answer(listener.response, status, failed(code, true));
  }
  answer((await gateway.listeners.next()).response, 200, done("at last"));
  expect(await call).toBe("at last");
});

test("where Retry-After is longer than the time that is left, the call ends at once", async () => {
  const call = failure(read({ timeoutMs: 5_000 }));
  answer((await gateway.listeners.next()).response, 503, failed("agent_offline", true), { "Retry-After": "10" });
  expect(await call).toMatchObject({ name: "AgentOffline", retryable: true, requestId: "q-1" });
});

test("Retry-After is waited for", async () => {
  const call = read({ timeoutMs: 5_000 });
  answer((await gateway.listeners.next()).response, 429, failed("busy", true), { "Retry-After": "1" });
  const since = Date.now();
  answer((await gateway.listeners.next()).response, 200, done(1));
  await call;
  expect(Date.now() - since).toBeGreaterThan(900);
});

test("progress is told in order, then the result", async () => {
  const told: unknown[] = [];
  const call = read({ onProgress: (progress) => told.push(progress) });
  const { request, response } = await gateway.listeners.next();
  expect(request.headers.accept).toBe("text/event-stream");
  response.writeHead(200, { "Content-Type": "text/event-stream" });
  response.write(': keep-alive\n\nevent: progress\ndata: {"progress":3,"total":10,"message":"half"}\n\nevent: prog');
  await vi.waitFor(() => expect(told.length).toBe(1));
  response.write(`ress\ndata: {"progress":4}\n\nevent: result\ndata: ${JSON.stringify(done("text"))}\n\n`);
  expect(await call).toBe("text");
  expect(told).toEqual([{ progress: 3, total: 10, message: "half" }, { progress: 4, total: undefined, message: undefined }]);
});

test("a failure may come as the last event, and before the first one as JSON", async () => {
  const first = failure(read({ onProgress: () => undefined }));
  (await gateway.listeners.next()).response
    .writeHead(200, { "Content-Type": "text/event-stream" })
    .end(`event: result\ndata: ${JSON.stringify(failed("agent_gone", false))}\n\n`);
  expect(await first).toMatchObject({ name: "AgentGone" });
  const second = failure(read({ onProgress: () => undefined }));
  answer((await gateway.listeners.next()).response, 504, failed("timeout", false));
  expect(await second).toMatchObject({ name: "CallTimeout" });
});

test("a long call asks for an event stream, since proxies end answers that are silent", async () => {
  const call = read({ timeoutMs: 120_000 });
  const { request, response } = await gateway.listeners.next();
  expect(request.headers.accept).toBe("text/event-stream");
  answer(response, 200, done(1));
  await call;
});

test("an answer that breaks off may have been done: it is sent again with a key only", async () => {
  const without = failure(read());
  (await gateway.listeners.next()).response.destroy();
  expect(await without).toMatchObject({ code: "outcome_unknown", retryable: false });
  const stream = failure(read({ onProgress: () => undefined }));
  (await gateway.listeners.next()).response.writeHead(200, { "Content-Type": "text/event-stream" }).end("event: progress\ndata: {}\n\n");
  expect(await stream).toMatchObject({ code: "outcome_unknown", message: expect.stringContaining("without a result") });
  const withKey = read({ idempotencyKey: "k-1" });
  (await gateway.listeners.next()).response.destroy();
  const { request, response } = await gateway.listeners.next();
  expect(request.headers["idempotency-key"]).toBe("k-1");
  answer(response, 502, "<html>");
  answer((await gateway.listeners.next()).response, 200, done(2));
  expect(await withKey).toBe(2);
});

test("a gateway that is not there is tried until the time is over", async () => {
  const since = Date.now();
  const absent = new Agents(`http://127.0.0.1:${await freePort()}`, { apiKey: "key" });
  expect(await failure(absent.call("u-1", "t", {}, { timeoutMs: 1_000 }))).toMatchObject({ code: "unreachable", retryable: true });
  expect(Date.now() - since).toBeGreaterThan(100);
});

test("an aborted signal hangs up, which cancels the call, and rejects at once", async () => {
  const abort = new AbortController();
  const call = failure(read({ signal: abort.signal, onProgress: () => undefined }));
  const { response } = await gateway.listeners.next();
  const hungUp = new Promise((resolve) => response.on("close", resolve));
  abort.abort();
  expect(await call).toMatchObject({ name: "CallCancelled", code: "cancelled" });
  await hungUp;
  expect(await failure(read({ signal: abort.signal }))).toMatchObject({ name: "CallCancelled" });
  expect(gateway.listeners.size).toBe(0);
});

test("a signal ends the pause between two tries", async () => {
  const abort = new AbortController();
  const call = failure(read({ signal: abort.signal }));
  answer((await gateway.listeners.next()).response, 503, failed("busy", true), { "Retry-After": "10" });
  await new Promise((resolve) => setTimeout(resolve, 50));
  abort.abort();
  expect(await call).toMatchObject({ name: "CallCancelled" });
});

test("a gateway that never answers is given up soon after the deadline", async () => {
  const call = failure(read({ timeoutMs: 100 }));
  await gateway.listeners.next();
  const since = Date.now();
  expect(await call).toMatchObject({ name: "CallTimeout" });
  expect(Date.now() - since).toBeLessThan(8_000);
});

test("an exception of onProgress cancels the call and is its error", async () => {
  const call = failure(read({ onProgress: () => { throw new Error("That will do."); } }));
  const { response } = await gateway.listeners.next();
  const hungUp = new Promise((resolve) => response.on("close", resolve));
  response.writeHead(200, { "Content-Type": "text/event-stream" });
  response.write('event: progress\ndata: {"progress":1}\n\n');
  expect(await call).toMatchObject({ name: "Error", message: "That will do." });
  await hungUp;
});

test("ids that would change the path are refused before anything is sent", async () => {
  for (const user of ["", ".", "..", "a/b", "a b", "x".repeat(129)]) {
    expect(await failure(agents.call(user, "t"))).toMatchObject({ code: "bad_id" });
    expect(await failure(agents.isConnected(user))).toMatchObject({ code: "bad_id" });
  }
  expect(await failure(agents.call("u-1", "t", {}, { idempotencyKey: "ä" }))).toMatchObject({ code: "bad_id" });
  expect(gateway.listeners.size).toBe(0);
});

test("cancel and isConnected know the gateway's 404 from that of a program in between", async () => {
  const unknown = { error: { code: "not_found", message: "m", retryable: false } };
  const connected = [agents.isConnected("u-1"), agents.isConnected("u-1"), failure(agents.isConnected("u-1"))];
  for (const [status, body] of [[200, {}], [404, unknown], [404, "<html>"]] as const) {
    const { request, response } = await gateway.listeners.next();
    expect([request.method, request.url, request.headers.authorization]).toEqual(["GET", "/api/v1/agents/u-1", "Bearer key"]);
    answer(response, status, body);
  }
  expect(await Promise.all(connected)).toMatchObject([true, false, { code: "outcome_unknown", status: 404 }]);
  const cancelled = agents.cancel("u-1", "k-1");
  const { request, response } = await gateway.listeners.next();
  expect([request.method, request.url]).toEqual(["DELETE", "/api/v1/agents/u-1/calls/k-1"]);
  answer(response, 202, {});
  await cancelled;
});

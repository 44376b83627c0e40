// The rule of what is final, row by row: spec/finality.json, which every client of this project keeps.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { ADVICE_OF_POLICY, advise, isRateLimited } from "../../src/advice.ts";
import { connectSession, GiveUp, type Session, type SessionOptions, type StateChange } from "../../src/index.ts";
import { FakeSocket } from "../support/fake-socket.ts";

type Advice = "retry" | "slow" | "credentials" | "final";
interface Table {
  retry_after_seconds_max: number;
  handshakes: { name: string; status: number; content_type?: string; body: string; advice: Advice }[];
  closes: { name: string; code: number; reason: string; advice: Advice; by: "gateway" | "worker" | "other" }[];
  other_codes: { name: string; from: number; to: number; advice: Advice }[];
  tokens: { name: string; outcome: string; advice: "open" | "retry" | "final" }[];
}
const table = JSON.parse(readFileSync(fileURLToPath(new URL("../../../../spec/finality.json", import.meta.url)), "utf8")) as Table;

let open: Session[] = [];
beforeEach(() => {
  vi.useFakeTimers();
  FakeSocket.all = [];
});
afterEach(() => {
  for (const session of open) session.close();
  open = [];
  vi.useRealTimers();
});

const turn = (ms = 0): Promise<unknown> => vi.advanceTimersByTimeAsync(ms);

/** A session, the reasons for which it asked for credentials, and how its states changed. */
async function session(options: Partial<SessionOptions>): Promise<{ reasons: string[]; changes: StateChange[] }> {
  const reasons: string[] = [];
  const made = connectSession({
    url: "https://gateway.test/a/ws/b", WebSocket: FakeSocket, random: () => 0.5, getToken: ({ reason }) => (reasons.push(reason), "t"), ...options,
  });
  open.push(made);
  const changes: StateChange[] = [];
  made.on("state", (change) => changes.push(change));
  await turn();
  return { reasons, changes };
}

/** The client's action, in the words of the table. */
async function done({ reasons, changes }: { reasons: string[]; changes: StateChange[] }): Promise<Advice> {
  const change = changes.find(({ state }) => state === "waiting" || state === "closed");
  if (change?.state === "closed") {
    await turn(1_000_000);
    expect(changes.at(-1)).toBe(change);
    return "final";
  }
  if (change?.delayMs === 0) {
    await turn(0);
    expect(["rejected", "expired"]).toContain(reasons[1]);
    return "credentials";
  }
  return (change?.delayMs ?? 0) > 1000 ? "slow" : "retry";
}

test.each(table.handshakes)("refused handshake: $name ($status)", async ({ status, content_type, body, advice }) => {
  const headers = { "Content-Type": content_type ?? "application/json" };
  const answer = (): Response => new Response(status === 204 ? null : body, { status, headers });
  const fetch = (): Promise<Response> => (status === 0 ? Promise.reject(new TypeError("failed")) : Promise.resolve(answer()));
  expect(await done(await session({ transport: "sse", fetch }))).toBe(advice);
});

test.each([400, 401, 403, 404, 408, 426, 429, 500, 502, 503, 504, 522])("only the status is seen: %i", async (status) => {
  const made = await session({ transport: "websocket" });
  FakeSocket.last.end(1006, "", `Unexpected server response: ${status}`);
  const expected = [401, 403].includes(status) ? "credentials" : [429, 503].includes(status) ? "slow" : "retry";
  expect(await done(made)).toBe(expected);
});

test("nothing is seen: another try with a fresh token", async () => {
  const made = await session({ transport: "websocket" });
  FakeSocket.last.end();
  expect(await done(made)).toBe("retry");
  await turn(1000);
  expect(made.reasons).toEqual(["initial", "failed"]);
});

test.each(table.closes)("closed: $name ($code)", async ({ code, reason, advice }) => {
  const made = await session({ transport: "websocket" });
  FakeSocket.last.open().end(code, reason);
  expect(await done(made)).toBe(advice);
});

test.each(table.other_codes)("closed with another code: $name", ({ from, to, advice }) => {
  const known = new Set(table.closes.map(({ code }) => code));
  for (let code = from; code <= to; code++) {
    if (!known.has(code)) expect([code, advise({ code, reason: "", opened: true })]).toEqual([code, advice]);
  }
});

test("reasons that mean something are the gateway's", () => {
  const policy = table.closes.filter(({ code, by, advice }) => code === 1008 && by === "gateway" && advice !== "final");
  expect(ADVICE_OF_POLICY).toEqual(Object.fromEntries(policy.map(({ reason, advice }) => [reason, advice])));
  const limited = table.closes.filter(({ code, reason }) => isRateLimited(code, reason)).map(({ name }) => name);
  expect(limited).toEqual(["rate_limited"]);
});

test.each(table.tokens)("tokens: $name", async ({ outcome, advice }) => {
  const outcomes: Record<string, () => unknown> = {
    token: () => "t",
    gives_up: () => Promise.reject(new GiveUp("signed out")),
    throws: () => Promise.reject({ any: "thing" }),
    silent: () => new Promise(() => undefined),
  };
  const given = outcome === "no_token" ? [undefined, null, "", {}, { token: "" }, 7].map((value) => () => value) : [outcomes[outcome]];
  for (const getToken of given as SessionOptions["getToken"][]) {
    const made = await session({ transport: "websocket", getToken });
    if (outcome === "silent") await turn(15_000);
    if (advice === "open") expect(FakeSocket.all.length).toBe(1);
    else expect(await done(made)).toBe(advice);
  }
});

test("Retry-After is the least time to wait, up to a bound", async () => {
  const seconds = table.retry_after_seconds_max;
  for (const [status, asked, least] of [[504, "7", 7], [503, "7", 7], [503, "86400", seconds]] as const) {
    const made = await session({ transport: "sse", fetch: async () => new Response("", { status, headers: { "Retry-After": asked } }) });
    const { delayMs = 0 } = made.changes.find(({ state }) => state === "waiting") ?? {};
    expect(delayMs).toBeGreaterThanOrEqual(least * 1000);
    expect(delayMs).toBeLessThan(least * 1000 + 30_000);
  }
});

test("a token that is refused again and again is not asked for without a pause", async () => {
  const body = '{"error":{"code":"invalid_token","message":"m","retryable":false}}';
  const made = await session({ transport: "sse", fetch: async () => new Response(body, { status: 403 }) });
  await turn(60_000);
  expect(made.reasons.length).toBeGreaterThan(3);
  expect(made.reasons.length).toBeLessThan(12);
  expect(made.changes.at(-1)?.state).not.toBe("closed");
});

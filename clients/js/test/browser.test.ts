// The built package in Chromium, against the real gateway; and what a browser can do without it.

import { createServer, type Server } from "node:http";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { type AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { type Browser, chromium, type Page } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";
import { Agents } from "../src/agents/index.ts";
import { API_KEY, Cable, Gateway, jwt, Redis, stopAll, until } from "./support/machines.ts";

const root = fileURLToPath(new URL("..", import.meta.url));
const folder = mkdtempSync(join(tmpdir(), "wsproxy-browser-"));
let redis: Redis;
let gateway: Gateway;
let cable: Cable;
let site: Server;
let origin: string;
let browser: Browser;

beforeAll(async () => {
  redis = await Redis.start();
  gateway = await Gateway.start(redis, { WSPROXY_ENDPOINTS__AGENTS: "true", WSPROXY_DATABASE__PATH: join(folder, "wsproxy.db") });
  cable = await Cable.to(gateway.port);
  site = serve();
  await new Promise<void>((resolve) => site.listen(0, "127.0.0.1", resolve));
  origin = `http://127.0.0.1:${(site.address() as AddressInfo).port}`;
  // Root cannot use Chromium's sandbox; in containers tests run as root.
  const args = process.getuid?.() === 0 ? ["--no-sandbox"] : [];
  browser = await chromium.launch({ executablePath: process.env["CHROMIUM"] ?? "/usr/bin/chromium", args });
});

afterAll(async () => {
  await browser?.close();
  site?.closeAllConnections();
  await cable?.end();
  await gateway?.stop();
  await redis?.end();
  stopAll();
  rmSync(folder, { recursive: true, force: true });
});

/** A site with the package and with tokens; the gateway is another origin, and reached over the cable. */
function serve(): Server {
  return createServer(async (request, response) => {
    const path = request.url ?? "/";
    if (path === "/") {
      response.writeHead(200, { "Content-Type": "text/html" });
      response.end('<!doctype html><title>t</title><pre id="out"></pre><script type="module">import * as client from "/dist/index.js"; window.client = client;</script>');
    } else if (path === "/favicon.ico") {
      response.writeHead(204).end();
    } else if (path.startsWith("/dist/")) {
      response.writeHead(200, { "Content-Type": path.endsWith(".js") ? "text/javascript" : "application/json" });
      response.end(readFileSync(`${root}${path}`));
    } else if (path.startsWith("/tokens/")) {
      response.end(await gateway.token(path.slice("/tokens/".length)));
    } else {
      response.writeHead(404).end();
    }
  });
}

async function visit(): Promise<{ page: Page; sockets: string[]; complaints: string[] }> {
  const page = await (await browser.newContext()).newPage();
  const sockets: string[] = [];
  const complaints: string[] = [];
  page.on("websocket", (socket) => sockets.push(socket.url()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("console", (message) => {
    // A cut connection is logged by the browser itself.
    if (message.type() === "error" && !/WebSocket connection|ERR_|Failed to load resource/.test(message.text())) complaints.push(message.text());
  });
  await page.goto(origin);
  await page.waitForFunction("window.client");
  return { page, sockets, complaints };
}

const publish = (id: string, message: unknown): Promise<unknown> => gateway.api(`sessions/${id}/messages?history=true`, message);

test("a session in a browser goes over cuts without gap or duplicate, and shows its token nowhere", async () => {
  const { page, sockets, complaints } = await visit();
  await page.evaluate(`
    window.heard = [];
    window.session = client.connectSession({
      url: "${cable.url}", agent: "demo", session: "b-1", backoff: { baseMs: 20, maxMs: 200 },
      getToken: async ({ signal }) => (await fetch("/tokens/b-1", { signal })).text(),
    });
    session.on("message", ({ data }) => heard.push(data.n));
    window.connected = session.once("connected").then(() => true);
  `);
  await page.evaluate("connected");
  for (let n = 0; n < 100; n += 1) {
    await publish("b-1", { n });
    if (n % 30 === 15) cable.cut();
  }
  await page.waitForFunction("heard.length >= 100");
  expect(await page.evaluate("heard")).toEqual(Array.from({ length: 100 }, (_, n) => n));
  expect(sockets.length).toBeGreaterThan(1);
  expect(sockets.every((url) => !/token|bearer/.test(url))).toBe(true);
  expect(complaints).toEqual([]);
  await page.context().close();
});

test("a token stream on a page is one text over cuts, and over a reload", async () => {
  const { page, complaints } = await visit();
  const show = `
    window.session = client.connectSession({
      url: "${cable.url}", agent: "demo", session: "b-2", backoff: { baseMs: 20, maxMs: 200 },
      getToken: async () => (await fetch("/tokens/b-2")).text(),
    });
    session.onStream(async (stream) => {
      for await (const text of stream) out.textContent = text;
      out.dataset.state = stream.state;
    });
  `;
  await page.evaluate(show);
  await page.evaluate("session.opened()");
  const words = Array.from({ length: 50 }, (_, n) => `ünd ${n} `);
  const step = (body: object): Promise<unknown> => gateway.api("sessions/b-2/streams/answer", body);
  await step({ op: "open" });
  for (const [n, text] of words.entries()) {
    await step({ op: "append", text });
    if (n === 10 || n === 40) cable.cut();
    if (n === 25) {
      await page.reload();
      await page.waitForFunction("window.client");
      await page.evaluate(show);
    }
  }
  await step({ op: "end", outcome: "finish" });
  await page.waitForSelector('#out[data-state="finish"]');
  expect(await page.locator("#out").evaluate((node) => node.textContent)).toBe(words.join(""));
  expect(complaints).toEqual([]);
  await page.context().close();
});

test("a session over server-sent events, from another origin", async () => {
  const { page, complaints } = await visit();
  await page.evaluate(`
    window.heard = [];
    window.session = client.connectSession({
      url: "${cable.url}", agent: "demo", session: "b-4", transport: "sse", backoff: { baseMs: 20, maxMs: 200 },
      getToken: async () => (await fetch("/tokens/b-4")).text(),
    });
    session.on("message", ({ data }) => heard.push(data.n));
  `);
  await page.waitForFunction("session.lastEventId");
  for (let n = 0; n < 60; n += 1) {
    await publish("b-4", { n });
    if (n % 30 === 15) cable.cut();
  }
  await page.waitForFunction("heard.length >= 60");
  expect(await page.evaluate("heard")).toEqual(Array.from({ length: 60 }, (_, n) => n));
  expect(complaints).toEqual([]);
  await page.context().close();
});

test("the network's return ends the wait", async () => {
  const { page, sockets } = await visit();
  await page.evaluate(`
    window.session = client.connectSession({
      url: "${cable.url}", agent: "demo", session: "b-3", backoff: { baseMs: 600000, maxMs: 600000 }, random: () => 1,
      getToken: async () => (await fetch("/tokens/b-3")).text(),
    });
  `);
  await page.evaluate("session.opened()");
  // Cut first: a page that is offline may not hear of the end of its WebSocket.
  cable.cut();
  await page.waitForFunction('session.state === "waiting"');
  await page.context().setOffline(true);
  await page.context().setOffline(false);
  await page.waitForFunction('session.state === "open"');
  expect(sockets.length).toBe(2);
  await page.context().close();
});

test("a session that only looks open is replaced when the page is shown, and sent messages arrive once", async () => {
  const { page, complaints } = await visit();
  let closed = 0;
  page.on("websocket", (socket) => socket.on("close", () => (closed += 1)));
  await page.evaluate(`
    window.heard = [];
    window.session = client.connectSession({
      url: "${cable.url}", agent: "demo", session: "b-6", getToken: async () => (await fetch("/tokens/b-6")).text(),
    });
    session.on("message", ({ data }) => heard.push(data.n));
    window.connected = session.once("connected").then(() => true);
  `);
  await page.evaluate("connected");
  const up = await redis.follow("session:b-6:up");
  const numbers = (): string[] => [...up.heard.matchAll(/\{"n":(\d+)\}/g)].map(([, n]) => String(n));
  const look = "document.dispatchEvent(new Event('visibilitychange'))";
  // The path is good: the old connection closes cleanly.
  await page.evaluate(`session.send({ n: 1 }); window.resumed = session.once("resumed").then(() => true); ${look};`);
  await page.evaluate("resumed");
  await until("it arrived", () => numbers().length === 1);
  // Before that the client does not know that it has arrived.
  await until("the old connection has closed", () => closed === 1);
  // The path is dead, and the next look is a minute later.
  cable.silence();
  await publish("b-6", { n: 7 });
  await page.evaluate(`session.send({ n: 2 }); const now = Date.now; Date.now = () => now() + 61_000; ${look}; 0`);
  await page.waitForFunction("heard.length === 1");
  await until("it arrived", () => numbers().length === 2);
  expect([numbers(), await page.evaluate("heard"), complaints]).toEqual([["1", "2"], [7], []]);
  up.end();
  await page.context().close();
});

test("events in a browser, over WebSocket and over server-sent events", async () => {
  const { page, complaints } = await visit();
  for (const transport of ["websocket", "sse"]) {
    const user = `b-${transport}`;
    await page.evaluate(`
      window.heard = [];
      window.events = client.connectEvents({
        url: "${cable.url}/ws", transport: "${transport}", backoff: { baseMs: 20, maxMs: 200 }, getToken: () => "${jwt(user)}",
      });
      window.connected = events.once("connected");
      events.onType("n", ({ data }) => heard.push(data));
    `);
    expect(await page.evaluate("connected")).toMatchObject({ userId: user });
    for (let n = 0; n < 30; n += 1) {
      await gateway.api(`events/users/${user}`, { type: "n", data: n });
      if (n === 15) cable.cut();
    }
    await page.waitForFunction("heard.length >= 30");
    expect(await page.evaluate("[heard, events.transport]")).toEqual([Array.from({ length: 30 }, (_, n) => n), transport]);
    await page.evaluate("events.close()");
  }
  expect(complaints).toEqual([]);
  await page.context().close();
});

test("a bare EventSource resumes as well", async () => {
  const { page } = await visit();
  const token = await gateway.token("b-5", true);
  await page.evaluate(`
    window.heard = [];
    window.source = new EventSource("${cable.url}/demo/ws/b-5?token=${token}");
    source.onmessage = ({ data }) => heard.push(JSON.parse(data));
  `);
  await page.waitForFunction("source.readyState === EventSource.OPEN");
  for (let n = 0; n < 60; n += 1) {
    await publish("b-5", { n });
    if (n === 20) cable.cut();
  }
  await until("everything arrived", async () => {
    const heard = (await page.evaluate("heard")) as { n?: number }[];
    return heard.filter(({ n }) => n !== undefined).length >= 60;
  });
  const heard = (await page.evaluate("heard")) as { n?: number }[];
  expect(heard.map(({ n }) => n).filter((n) => n !== undefined)).toEqual(Array.from({ length: 60 }, (_, n) => n));
  await page.context().close();
});

test("a page is an agent: it answers calls over cuts, and its secret is in no URL", async () => {
  const { page, sockets, complaints } = await visit();
  // The database is opened in the background.
  await until("the gateway is healthy", async () => (await fetch(`${gateway.url}/health`)).ok);
  const { secret } = await gateway.api("agents/page-1/secrets");
  await page.evaluate(`
    window.begun = import("/dist/agents/index.js").then(({ Agent }) => {
      window.agent = new Agent("${cable.url}", { userId: "page-1", secret: "${secret}", backoff: { baseMs: 20, maxMs: 200 } });
      agent.tool("title", (params, { progress }) => (progress(1, 2, "reading"), { title: document.title, ...params }));
      window.lost = 0;
      agent.on("state", ({ state }) => { if (state === "waiting") lost += 1; });
      agent.run().catch((error) => (window.ended = error.name));
    });
  `);
  const agents = new Agents(gateway.url, { apiKey: API_KEY });
  for (let n = 0; n < 4; n += 1) {
    await until("the page is connected", () => page.evaluate("window.agent?.state === 'open'"));
    const told: unknown[] = [];
    expect(await agents.call("page-1", "title", { n }, { onProgress: (progress) => told.push(progress) })).toEqual({ title: "t", n });
    expect(told).toEqual([{ progress: 1, total: 2, message: "reading" }]);
    cable.cut();
    // Counted, since the page may be back sooner than a look at its state.
    await until("the page has noticed", () => page.evaluate(`lost === ${n + 1}`));
  }
  expect(sockets.length).toBeGreaterThan(3);
  expect(sockets.every((url) => !/wsa_|bearer|secret/.test(url))).toBe(true);
  expect(complaints).toEqual([]);
  await until("the page is back", () => page.evaluate("agent.state === 'open'"));
  await gateway.api("agents/page-1/disconnect");
  await until("it has ended", () => page.evaluate("window.ended === 'AgentEnded'"));
  await page.context().close();
});

test("a page whose secret is refused sees no reason, and tries again until its time is over", async () => {
  const { page } = await visit();
  await page.evaluate(`
    import("/dist/agents/index.js").then(({ Agent }) => {
      window.seen = [];
      window.agent = new Agent("${cable.url}", { userId: "page-2", secret: "wsa_wrong", backoff: { baseMs: 50, maxMs: 100 }, giveUpAfterMs: 1000 });
      agent.on("state", ({ state, status }) => seen.push([state, status ?? "no status"].join()));
      agent.run().catch((error) => (window.ended = [error.name, error.message].join()));
    });
  `);
  await until("it has given up", () => page.evaluate("window.ended"));
  expect(await page.evaluate("ended")).toBe("AgentEnded,There was no connection for 1000 ms.");
  expect(new Set((await page.evaluate("seen")) as string[])).toEqual(new Set(["connecting,no status", "waiting,no status", "closed,no status"]));
  await page.context().close();
});

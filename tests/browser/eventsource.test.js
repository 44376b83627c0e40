// `new EventSource(url)` in a real browser, on a page of another origin: it comes back on its own after the gateway
// has restarted, and has missed nothing.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { createServer as createHttpServer } from "node:http";
import { createConnection } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { chromium } from "playwright-core";

import { binary, freePort, until as waitFor } from "./machines.js";

const KEY = "key-of-the-tests-0123456789";
const children = [];
let browser, pages, folder, redisPort, output = "";

const until = (what, condition) => waitFor(what, condition, { details: () => output });

function start(command, args, env = {}) {
  const { PATH, HOME } = process.env;
  const child = spawn(command, args, { env: { PATH, HOME, ...env }, cwd: folder });
  for (const stream of [child.stdout, child.stderr]) stream.on("data", (data) => { output += data; });
  children.push(child);
  return child;
}

async function stop(child) {
  if (child.exitCode === null && child.signalCode === null) child.kill("SIGTERM");
  await until("the end of a process", () => child.exitCode !== null || child.signalCode !== null);
}

async function gateway(port, origin) {
  const child = start(binary, ["serve"], {
    PORT: String(port), REDIS_URL: `redis://127.0.0.1:${redisPort}`, WSPROXY_API__KEYS: KEY,
    WSPROXY_SESSIONS__HISTORY: "true", WSPROXY_SERVER__DRAIN_DELAY: "0s", WSPROXY_SERVER__DRAIN_SPREAD: "0s", WSPROXY_SERVER__ALLOWED_ORIGINS: origin,
    WSPROXY_SSE__RETRY: "200ms",
  });
  await until("a gateway", async () => (await fetch(`http://127.0.0.1:${port}/ready`)).ok);
  return child;
}

before(async () => {
  folder = mkdtempSync(join(tmpdir(), "wsproxy-browser-"));
  redisPort = await freePort();
  start("redis-server", ["--port", String(redisPort), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
  await until("redis-server", () => new Promise((resolve, reject) => {
    const socket = createConnection(redisPort, "127.0.0.1", () => { socket.destroy(); resolve(true); });
    socket.once("error", reject);
  }));
  pages = createHttpServer((_, response) => response.setHeader("content-type", "text/html").end("<title>A page</title>"));
  await new Promise((resolve) => pages.listen(0, "127.0.0.1", resolve));
  const args = process.getuid?.() === 0 ? ["--no-sandbox"] : [];
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args });
});

after(async () => {
  await browser?.close();
  pages?.close();
  for (const child of children.reverse()) await stop(child);
  if (folder) rmSync(folder, { recursive: true, force: true });
});

test("an EventSource comes back after a restart and has missed nothing", async () => {
  const origin = `http://127.0.0.1:${pages.address().port}`;
  const [port, otherPort] = [await freePort(), await freePort()];
  let first = await gateway(port, origin);
  await gateway(otherPort, origin);
  const api = async (path, body) => {
    const headers = { authorization: `Bearer ${KEY}` };
    const answer = await fetch(`http://127.0.0.1:${otherPort}/api/v1/sessions/s-1/${path}`, { method: "POST", headers, body });
    assert.ok(answer.ok, await answer.clone().text());
    return answer.json();
  };
  const publish = async (n) => (await api("messages?history=true", JSON.stringify({ n }))).event_id;
  const { token } = await api("token", JSON.stringify({ event_stream: true }));

  const page = await browser.newPage();
  await page.goto(origin);
  await page.evaluate((url) => {
    globalThis.seen = [];
    globalThis.opened = 0;
    const source = new EventSource(url);
    source.onopen = () => { globalThis.opened += 1; };
    source.onmessage = ({ data, lastEventId }) => globalThis.seen.push({ ...JSON.parse(data), lastEventId });
    source.addEventListener("close", ({ data }) => globalThis.seen.push({ close: JSON.parse(data).code }));
  }, `http://127.0.0.1:${port}/demo/ws/s-1?token=${token}`);
  const seen = () => page.evaluate(() => globalThis.seen);
  const opened = () => page.evaluate(() => globalThis.opened);

  await until("the stream is open", async () => (await opened()) === 1);
  const ids = [];
  for (let n = 0; n < 3; n += 1) ids.push(await publish(n));
  await until("three events", async () => (await seen()).length === 3);
  await stop(first);
  await until("the close event", async () => (await seen()).at(-1).close === 1012);
  for (let n = 3; n < 6; n += 1) ids.push(await publish(n));
  first = await gateway(port, origin);
  await until("the stream is open again", async () => (await opened()) === 2);
  ids.push(await publish(6));
  await until("the last event", async () => (await seen()).at(-1).n === 6);

  const events = await seen();
  assert.deepEqual(events.filter((event) => "n" in event).map((event) => event.n), [0, 1, 2, 3, 4, 5, 6]);
  assert.deepEqual(events.filter((event) => "n" in event).map((event) => event.lastEventId), ids);
  assert.equal(events.find((event) => event.type === "resumed").count, 3);
  await page.close();
});

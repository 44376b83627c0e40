// The development page in a real browser: what a person would do, judged by the frames that the browser saw.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdirSync } from "node:fs";
import { after, before, test } from "node:test";
import { chromium } from "playwright-core";

import { binary, freePort, root, until as waitFor } from "./machines.js";

let gateway, output = "", browser, origin;

const until = (what, condition) => waitFor(what, condition, { details: () => output });

before(async () => {
  const port = await freePort();
  origin = `http://127.0.0.1:${port}`;
  const { PATH, HOME } = process.env;
  gateway = spawn(binary, ["dev", "--port", String(port)], { env: { PATH, HOME, PORT: String(port) } });
  for (const stream of [gateway.stdout, gateway.stderr]) stream.on("data", (data) => { output += data; });
  await until("the gateway", async () => (await fetch(`${origin}/ready`)).ok);
  // Root cannot use Chromium's sandbox; in containers tests run as root.
  const args = process.getuid?.() === 0 ? ["--no-sandbox"] : [];
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args });
});

after(async () => {
  await browser?.close();
  if (gateway && gateway.exitCode === null) {
    gateway.kill("SIGTERM");
    await until("the end of the gateway", () => gateway.exitCode !== null || gateway.signalCode !== null);
  }
});

// A page, with everything that its WebSockets carried and everything it complained of.
async function visit() {
  const page = await browser.newPage({ viewport: { width: 1200, height: 900 } });
  const seen = { sockets: [], tokens: [], done: 0, sent: [], complaints: [] };
  page.on("pageerror", (error) => seen.complaints.push(String(error)));
  page.on("console", (message) => {
    // A cut connection is logged by the browser itself.
    if (message.type() === "error" && !message.text().includes("WebSocket connection")) seen.complaints.push(message.text());
  });
  page.on("websocket", (socket) => {
    seen.sockets.push(socket);
    socket.on("framesent", ({ payload }) => seen.sent.push(payload));
    socket.on("framereceived", ({ payload }) => {
      const message = JSON.parse(payload);
      if (message.type === "token") seen.tokens.push(message.text);
      if (message.type === "done") seen.done += 1;
    });
  });
  const requests = [];
  page.on("request", (request) => requests.push(request.url()));
  const response = await page.goto(origin);
  return { page, seen, requests, response };
}

const state = (page, name) => page.waitForSelector(`#status[data-state="${name}"]`);
const events = (page) => page.locator("#events li").allInnerTexts();
const metric = async (page, name) =>
  Number((await page.locator(`[data-metric="${name}"] b`).evaluate((node) => node.firstChild.textContent)).replaceAll(",", ""));

async function open(page) {
  await page.getByRole("button", { name: "Open session" }).click();
  await state(page, "open");
}

async function ask(page, text) {
  await page.getByLabel("Message to the worker").fill(text);
  await page.getByRole("button", { name: "Send" }).click();
}

test("the page loads nothing from elsewhere and allows nothing from elsewhere", async () => {
  const { page, seen, requests, response } = await visit();
  await until("metrics are shown", async () => (await page.locator("[data-metric=wsproxy_active_connections] b").innerText()) !== "–");
  const policy = response.headers()["content-security-policy"];
  assert.match(policy, /default-src '(self|none)'/);
  assert.doesNotMatch(policy, /unsafe|\*|https?:/);
  assert.deepEqual(requests.filter((url) => !url.startsWith(origin)), []);
  assert.deepEqual(seen.complaints, []);
  await page.close();
});

test("a person types and watches the whole answer stream in", async () => {
  const { page, seen } = await visit();
  await open(page);
  await ask(page, "Tell me about the gateway");
  await page.waitForSelector('.turn.worker[data-streaming="true"]');
  const early = (await page.locator(".turn.worker").innerText()).length;
  await page.waitForSelector('.turn.worker[data-streaming="false"]');
  assert.deepEqual(seen.sent.map(JSON.parse), [{ type: "prompt", text: "Tell me about the gateway" }]);
  assert.equal(await page.locator(".turn.worker").evaluate((node) => node.textContent), seen.tokens.join(""));
  assert.ok(seen.tokens.length > 10 && early < seen.tokens.join("").length, "the answer came token by token");
  assert.equal(seen.sockets.length, 1);
  assert.ok(!seen.sockets[0].url().includes("token"), "a browser's token stays out of the URL");

  await until("metrics moved", async () => (await metric(page, "wsproxy_messages_sent_total")) >= seen.tokens.length);
  assert.ok((await metric(page, "wsproxy_messages_received_total")) >= 1);
  assert.ok((await metric(page, "wsproxy_active_connections")) >= 1);
  mkdirSync(`${root}/target`, { recursive: true });
  await page.screenshot({ path: `${root}/target/dev-page.png`, fullPage: true });

  await page.getByRole("button", { name: "Close" }).click();
  await state(page, "closed");
  assert.ok((await events(page)).some((line) => line.includes("close 1000")), String(await events(page)));
  assert.deepEqual(seen.complaints, []);
  await page.close();
});

test("a cut connection comes back with a fresh token and the stream goes on", async () => {
  const { page, seen } = await visit();
  await open(page);
  await ask(page, "Keep talking while I am away");
  await until("a few tokens", () => seen.tokens.length >= 5);
  const beforeCut = seen.tokens.length;
  await page.getByRole("button", { name: "Cut connection" }).click();
  await until("a second connection", () => seen.sockets.length >= 2);
  await state(page, "open");
  const path = (socket) => new URL(socket.url()).pathname;
  assert.equal(path(seen.sockets[0]), path(seen.sockets[1]), "it is the same session");
  await until("the end of the answer", () => seen.done === 1);
  assert.ok(seen.tokens.length > beforeCut, "the stream went on after the cut");
  const log = await events(page);
  assert.ok(log.some((line) => line.includes("close 1006")), String(log));
  assert.ok(log.some((line) => line.includes("with a fresh token")), String(log));
  assert.ok(log.some((line) => line.includes("resumed")), String(log));
  assert.equal(await page.locator(".gap").count(), 0, "nothing is missing");
  const marked = await page.locator(".turn.worker").evaluate((node) => node.textContent);
  const shown = marked.replace("⟳", "");
  const question = "Keep talking while I am away";
  assert.ok(shown.startsWith(`You said “${question}”. I am the demo worker`), shown);
  assert.ok(shown.endsWith("somebody else's worry."), shown);
  assert.equal(shown, seen.tokens.join(""), "every word once");

  await ask(page, "And once more");
  await until("a further answer", () => seen.done === 2);
  await page.screenshot({ path: `${root}/target/dev-page-cut.png`, fullPage: true });
  assert.deepEqual(seen.complaints, []);
  await page.close();
});

test("two pages do not see each other's sessions, and shell lines name one's own", async () => {
  const [one, two] = [await visit(), await visit()];
  await open(one.page);
  await open(two.page);
  await ask(one.page, "Only for me");
  await until("the answer", () => one.seen.done === 1);
  assert.equal(two.seen.tokens.length, 0);
  const id = await one.page.locator("#session-id").innerText();
  assert.notEqual(id, await two.page.locator("#session-id").innerText());
  const lines = await one.page.locator("#shell code").allInnerTexts();
  assert.ok(lines.some((line) => line.includes(`/demo/ws/${id}`)), String(lines));
  await one.page.close();
  await two.page.close();
});

test("the page works by keyboard alone", async () => {
  const { page, seen } = await visit();
  await page.locator("#open").focus();
  await page.keyboard.press("Enter");
  await state(page, "open");
  await page.keyboard.type("Hello"); // Opening has moved the focus to the prompt.
  await page.keyboard.press("Enter");
  await until("a token", () => seen.tokens.length > 0);
  await page.close();
});

// The development page in a real browser: what a person would do, judged by the frames that the browser saw.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdirSync } from "node:fs";
import { after, before, test } from "node:test";
import { chromium } from "playwright-core";

import { binary, freePort, Machine, root, until as waitFor } from "./machines.js";

const pictures = `${root}/target/pictures`;
let gateway, browser, origin;

const until = (what, condition, ms) => waitFor(what, condition, { ms, details: () => gateway.output });

async function startGateway(port) {
  gateway = new Machine(binary, ["dev", "--port", String(port)], { ready: async () => (await fetch(`${origin}/ready`)).ok });
  await gateway.start();
}

before(async () => {
  const port = await freePort();
  origin = `http://127.0.0.1:${port}`;
  await startGateway(port);
  mkdirSync(pictures, { recursive: true });
  // Root cannot use Chromium's sandbox; in containers tests run as root.
  const args = process.getuid?.() === 0 ? ["--no-sandbox"] : [];
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args });
});

after(async () => {
  await browser?.close();
  await gateway?.stop();
});

// A page, with everything that its WebSockets carried and everything it complained of.
async function visit({ width = 1200, height = 900, colorScheme = "light" } = {}) {
  const page = await browser.newPage({ viewport: { width, height }, colorScheme });
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
  // All that moves without a user's action.
  await page.addInitScript(() => {
    window.shifts = [];
    new PerformanceObserver((list) => {
      for (const { value, hadRecentInput, sources } of list.getEntries()) {
        // The cursor behind a growing text has no node of its own, and a line of words in the strip for the state may become two.
        const what = sources.filter(({ node }) => node && !node.parentElement?.closest("#story")).map(({ node }) => node.id || node.className || node.nodeName).join(" ");
        // The lines of the metrics give way to longer numbers, by a pixel that no person sees.
        if (what && !hadRecentInput && value >= 0.0001) window.shifts.push(`${value.toFixed(4)} ${what}`);
      }
    }).observe({ type: "layout-shift", buffered: true });
  });
  const response = await page.goto(origin);
  await state(page, "open");
  return { page, seen, requests, response };
}

const state = (page, name) => page.waitForSelector(`#status[data-state="${name}"]`);
const story = (page) => page.locator("#story").evaluate(({ dataset, textContent }) => ({ kind: dataset.kind, text: textContent }));
const told = (page, kind, pattern) => until(`the page says ${pattern}`, async () => {
  const now = await story(page);
  if (now.kind === kind && pattern.test(now.text)) return now.text;
  throw new Error(JSON.stringify(now));
});
const events = (page) => page.locator("#events li").allInnerTexts();
const done = (page) => page.locator(".steps [data-done]").evaluateAll((all) => all.map(({ dataset }) => dataset.step));
const answers = (page) => page.locator(".turn.worker").evaluateAll((all) => all.map((each) => each.textContent));
const metric = async (page, name) =>
  Number((await page.locator(`[data-metric="${name}"] b`).evaluate((node) => node.firstChild.textContent)).replaceAll(",", ""));
const press = (page, name) => page.getByRole("button", { name, exact: true }).click();

async function ask(page, text) {
  await page.getByLabel("Message to the worker").fill(text);
  await press(page, "Send");
}

// A line that the page offers, run as it is copied, in a shell that a person has.
function run(line) {
  const { PATH, HOME } = process.env;
  const child = spawn("bash", ["-c", line], { env: { PATH, HOME }, detached: true, stdio: ["ignore", "pipe", "pipe"] });
  const running = { output: "", child, end: () => { try { process.kill(-child.pid, "SIGKILL"); } catch { /* It has ended. */ } } };
  for (const stream of [child.stdout, child.stderr]) stream.on("data", (data) => { running.output += data; });
  running.over = new Promise((resolve) => child.once("exit", resolve));
  return running;
}

const lines = (page, list) => page.locator(`${list} code`).evaluateAll((all) => all.map((each) => each.textContent));

test("the page loads nothing from elsewhere and allows nothing from elsewhere", async () => {
  const { page, seen, requests, response } = await visit();
  await until("metrics are shown", async () => (await page.locator("[data-metric=wsproxy_active_connections] b").innerText()) !== "–");
  const policy = response.headers()["content-security-policy"];
  assert.match(policy, /default-src '(self|none)'/);
  assert.doesNotMatch(policy, /unsafe|\*|https?:/);
  assert.deepEqual(requests.filter((url) => !url.startsWith(origin)), []);
  const refused = await page.evaluate(() => new Promise((resolve) => {
    addEventListener("securitypolicyviolation", ({ effectiveDirective }) => resolve(effectiveDirective));
    document.body.append(Object.assign(document.createElement("script"), { textContent: "window.injected = true" }));
  }));
  assert.match(refused, /^script-src/);
  assert.equal(await page.evaluate("window.injected"), undefined);
  assert.deepEqual(seen.complaints.filter((line) => !line.includes("Content Security Policy")), []);
  await page.close();
});

test("a session opens by itself, and the answer streams in", async () => {
  const { page, seen } = await visit();
  await told(page, "open", /^Connected\./);
  assert.equal(await page.locator("#own code").filter({ hasText: "……" }).count(), 0, "commands have their values");
  await ask(page, "Tell me about the gateway");
  await page.waitForSelector('.turn.worker[data-streaming="true"]');
  const early = (await answers(page))[0].length;
  await page.waitForSelector('.turn.worker[data-streaming="false"]');
  await told(page, "open", /complete/);
  assert.deepEqual(seen.sent.map(JSON.parse), [{ type: "prompt", text: "Tell me about the gateway" }]);
  assert.deepEqual(await answers(page), [seen.tokens.join("")]);
  assert.ok(seen.tokens.length > 10 && early < seen.tokens.join("").length, "the answer came token by token");
  assert.equal(seen.sockets.length, 1);
  assert.ok(!seen.sockets[0].url().includes("token"), "a browser's token stays out of the URL");

  await until("metrics moved", async () => (await metric(page, "wsproxy_messages_sent_total")) >= seen.tokens.length);
  assert.ok((await metric(page, "wsproxy_messages_received_total")) >= 1);
  assert.ok((await metric(page, "wsproxy_active_connections")) >= 1);

  await press(page, "Close");
  await state(page, "closed");
  assert.ok((await events(page)).some((line) => line.includes("close 1000")), String(await events(page)));
  await press(page, "Connect");
  await state(page, "open");
  assert.deepEqual(seen.complaints, []);
  await page.close();
});

test("five seconds away: the page says what was missed, and nothing is missing", async () => {
  const { page, seen } = await visit();
  await ask(page, "Keep talking while I am away");
  await until("a few tokens", () => seen.tokens.length >= 5);
  const left = Date.now();
  await press(page, "Stay away for 5 s");
  await state(page, "away");
  await told(page, "away", /no connection.*goes on talking. Back in [1-5] s/);
  const before = (await answers(page))[0];
  await page.screenshot({ path: `${pictures}/away.png`, fullPage: true });
  await state(page, "open");
  const away = Date.now() - left;
  assert.ok(away >= 5000, `${away} ms`);
  const text = await told(page, "resumed", /arrived, in order and once/);
  const most = Date.now() - left;
  const [, seconds, words, arrived] = text.match(/^Back after ([\d.]+) s\. (\d+) words were missed, and all (\d+) have arrived/);
  assert.ok(Number(seconds) >= 5 && Number(seconds) <= most / 1000 + 0.05, `${seconds} s of ${most} ms`);
  assert.equal(words, arrived);
  // One each 100 ms, or less often where the machine is busy.
  assert.ok(Number(words) >= 10 && Number(words) <= most / 100, `${words} words in ${most} ms`);
  const missed = await page.locator(".missed").evaluate((node) => node.textContent);
  assert.equal(missed.split(/(?<= )/).length, Number(words), "they are marked");
  assert.ok((await answers(page))[0].startsWith(before + missed), "behind what was there already");
  assert.deepEqual(await done(page), ["ask", "away", "read"]);
  await page.screenshot({ path: `${pictures}/resumed.png`, fullPage: true });

  await until("the end of the answer", () => seen.done === 1);
  const [shown] = await answers(page);
  assert.ok(shown.startsWith("You said “Keep talking while I am away”. I am the demo worker"), shown);
  assert.ok(shown.endsWith("the gateway's worry."), shown);
  assert.equal(shown, seen.tokens.join(""), "every word once");
  const path = (socket) => new URL(socket.url()).pathname;
  assert.deepEqual(seen.sockets.map(path), Array(2).fill(path(seen.sockets[0])), "it is the same session");
  const log = await events(page);
  for (const part of ["close 1006", "with a fresh token", "resumed", `${words} missed words`]) {
    assert.ok(log.some((line) => line.includes(part)), `${part}: ${log}`);
  }
  assert.equal(await page.locator(".gap").count(), 0);
  assert.deepEqual(await page.evaluate("window.shifts"), [], "nothing jumps");
  assert.deepEqual(seen.complaints, []);
  await page.close();
});

test("a cut comes back at once; a further question ends the answer before", async () => {
  const { page, seen } = await visit();
  await press(page, "Cut");
  await told(page, "resumed", /Nothing was said meanwhile/);
  await ask(page, "First");
  await until("a few tokens", () => seen.tokens.length >= 5);
  await press(page, "Cut");
  await told(page, "resumed", /./);
  await ask(page, "Second");
  await until("both answers", () => seen.done === 2);
  const [first, second] = await answers(page);
  assert.ok(first.startsWith("You said “First”") && first.length < second.length, first);
  assert.ok(second.startsWith("You said “Second”") && second.endsWith("worry."), second);
  assert.equal(first + second, seen.tokens.join(""));
  assert.deepEqual(seen.complaints, []);
  await page.close();
});

test("one's own worker answers, by commands as they are copied", async () => {
  const { page, seen } = await visit();
  await page.getByText("My own worker answers").click();
  await told(page, "open", /Start your worker/);
  await ask(page, "Anybody there?");
  await told(page, "error", /No worker listens yet/);
  const [worker, hear, speak, end] = await lines(page, "#own");
  assert.ok(worker.includes(await page.locator("#session-id").innerText()), "the session that is shown is its own");
  const mine = run(worker);
  await until("it listens", () => mine.output.includes("Your worker listens"));
  await ask(page, "Is 'this' \"mine\"?");
  await until("a few tokens", () => seen.tokens.length >= 4);
  await press(page, "Stay away for 5 s");
  await until("the end of the answer", () => seen.done === 1);
  await told(page, "resumed", /words were missed, and all/);
  assert.deepEqual(await answers(page), ["I am your own worker, and I heard: Is 'this' \"mine\"? "]);
  assert.ok((await done(page)).includes("own"));
  mine.end();
  await mine.over;

  const listener = run(hear);
  const speaker = run(speak);
  assert.equal(await speaker.over, 0, speaker.output);
  await until("it is shown", async () => (await answers(page)).includes("Hello from my shell."));
  await until("a follower", async () => {
    await ask(page, "Do you hear me?");
    return listener.output.includes("Do you hear me?");
  });
  listener.end();
  const ending = run(end);
  assert.equal(await ending.over, 0, ending.output);
  await told(page, "error", /4004, that was all/);
  await page.screenshot({ path: `${pictures}/own.png`, fullPage: true });
  await press(page, "Connect");
  await state(page, "open");
  await page.getByText("The demo worker answers", { exact: true }).click();
  await told(page, "open", /^Connected\. Ask/);
  assert.deepEqual(seen.complaints, []);
  await page.close();
});

test("two pages do not see each other's sessions, and shell lines work for one's own", async () => {
  const [one, two] = [await visit(), await visit()];
  await one.page.getByText("The same client from a shell").click();
  const [token, connect, , listen, cut, metrics] = await lines(one.page, "#shell");
  const listener = run(listen);
  await until("it listens", () => listener.output.includes("opened") || listener.output.includes(":"));
  await ask(one.page, "Only for me");
  await until("the event stream has it too", () => listener.output.includes('"type":"token"'));
  await until("the answer", () => one.seen.done === 1);
  listener.end();
  assert.equal(two.seen.tokens.length, 0);
  const id = await one.page.locator("#session-id").innerText();
  assert.notEqual(id, await two.page.locator("#session-id").innerText());
  const issued = run(`${token}; echo "$T"`);
  await issued.over;
  assert.match(issued.output, /^[\w-]{43}\n$/);
  assert.ok(connect.includes(`/demo/ws/${id}`), connect);
  const shown = run(metrics);
  await shown.over;
  assert.match(shown.output, /^wsproxy_active_connections/m);
  const cutting = run(cut);
  await cutting.over;
  assert.match(cutting.output, /"cut":[1-9]/);
  await until("it comes back", () => one.seen.sockets.length === 2);
  await one.page.close();
  await two.page.close();
});

test("the page works by keyboard alone", async () => {
  const { page, seen } = await visit();
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter"); // The first stop leads to the prompt, which holds a question.
  await page.keyboard.press("Enter");
  await until("a token", () => seen.tokens.length > 0);
  await page.getByRole("button", { name: "Stay away for 5 s" }).focus();
  await page.keyboard.press("Space");
  await state(page, "away");
  await page.close();
});

test("a gateway that is gone, and comes back without its history, is told in words", async () => {
  const { page, seen } = await visit();
  const port = new URL(origin).port;
  await ask(page, "Where are you?");
  await until("a few tokens", () => seen.tokens.length >= 5);
  await gateway.kill();
  await told(page, "error", /does not answer. Is “wsproxy dev” still running/);
  await page.screenshot({ path: `${pictures}/error.png`, fullPage: true });
  await startGateway(port);
  await told(page, "lost", /^Back after .* no longer kept \(\w+\)/);
  assert.equal(await page.locator(".gap").count(), 1, "the answer shows where words are missing");
  await page.screenshot({ path: `${pictures}/lost.png`, fullPage: true });
  const [worker] = await lines(page, "#own");
  const { api_key: key } = await (await fetch(`${origin}/dev/key`)).json();
  await until("the commands have the new key", async () => (await lines(page, "#own"))[0].includes(key));
  assert.ok(worker.includes("Bearer "));
  await page.close();
});

test("every width and colour scheme shows all of it", async () => {
  for (const [name, width, height] of [["phone", 390, 844], ["desktop", 1280, 900]]) {
    for (const colorScheme of ["light", "dark"]) {
      const { page, seen } = await visit({ width, height, colorScheme });
      await ask(page, "What happens when I lose my connection?");
      await until("a few tokens", () => seen.tokens.length >= 12);
      await press(page, "Cut");
      await told(page, "resumed", /./);
      await until("some more", () => seen.tokens.length >= 30);
      const [wide, inner] = await page.evaluate("[document.documentElement.scrollWidth, innerWidth]");
      assert.ok(wide <= inner, `${name}: ${wide} of ${inner} px`);
      assert.deepEqual(await page.evaluate("window.shifts"), [], `${name}: nothing jumps`);
      await page.screenshot({ path: `${pictures}/${name}-${colorScheme}.png`, fullPage: true });
      await page.close();
    }
  }
});

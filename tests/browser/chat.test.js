// The chat example in a real browser: whatever is cut, killed or restarted in mid-answer, its page shows the whole text.

import assert from "node:assert/strict";
import { mkdirSync } from "node:fs";
import { after, before, test } from "node:test";
import { join } from "node:path";
import { setTimeout as pause } from "node:timers/promises";
import { chromium } from "playwright-core";
import { binary, Cable, freePort, Machine, Redis, root, until } from "./machines.js";

const example = join(root, "examples/fastapi-chat");
const pictures = join(root, "target/pictures");
const PROMPTS = ["Where does the river go?", "Straße & <b>水</b> “😀”", "Why \\n not?"];
let redis, gateway, cable, workers, origin, browser;

before(async () => {
  redis = await Redis.start();
  const [port, gatewayPort] = [await freePort(), await freePort()];
  gateway = new Machine(binary, ["serve"], {
    env: {
      PORT: String(gatewayPort), REDIS_URL: redis.url,
      WSPROXY_SESSIONS__HISTORY: "true", WSPROXY_SESSIONS__NO_RECEIVER: "queue", WSPROXY_SERVER__DRAIN_DELAY: "0s",
    },
    ready: async () => (await fetch(`http://127.0.0.1:${gatewayPort}/ready`)).ok,
  });
  await gateway.start();
  cable = await Cable.to(gatewayPort);
  origin = `http://127.0.0.1:${port}`;
  const app = ["-m", "uvicorn", "app:app", "--app-dir", example, "--workers", "2", "--port", String(port), "--log-level", "warning"];
  workers = new Machine(join(example, ".venv/bin/python"), app, {
    env: {
      REDIS_URL: redis.url, GATEWAY_URL: `http://127.0.0.1:${cable.port}`, PYTHONDONTWRITEBYTECODE: "1",
      CHAT_SECRET: "a-secret-of-the-tests", CHAT_TOKENS: "160", CHAT_TOKENS_PER_SECOND: "25", CHAT_CLAIM_SECONDS: "1.5", CHAT_LEASE_SECONDS: "6",
    },
    ready: async () => (await fetch(origin)).ok,
  });
  await workers.start();
  // Root cannot use Chromium's sandbox; in containers tests run as root.
  const args = process.getuid?.() === 0 ? ["--no-sandbox"] : [];
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args });
});

after(async () => {
  await browser?.close();
  await workers?.stop();
  await gateway?.stop();
  await cable?.end();
  await redis?.end();
});

const whole = async (prompt) => (await fetch(`${origin}/answer?prompt=${encodeURIComponent(prompt)}`)).text();

// A tab, with what it complained of and how often it was loaded.
async function visit(path = "/", context) {
  const page = await (context ?? await browser.newContext()).newPage();
  const seen = { complaints: [], loads: 0, sockets: 0, refusals: [] };
  page.on("pageerror", (error) => seen.complaints.push(String(error)));
  page.on("load", () => { seen.loads += 1; });
  page.on("response", (answer) => { if (!answer.ok()) seen.refusals.push(`${answer.status()} ${answer.url()}`); });
  page.on("websocket", () => { seen.sockets += 1; });
  await page.goto(origin + path);
  return { page, seen };
}

async function ask(page, prompt) {
  await page.fill("#prompt", prompt);
  await page.keyboard.press("Enter");
}

const texts = (page) => page.locator("#answers pre").evaluateAll((all) => all.map((each) => each.textContent));
const states = (page) => page.locator("#answers pre").evaluateAll((all) => all.map((each) => each.dataset.state));
const status = (page) => page.locator("#status").evaluate(({ textContent, dataset }) => ({ ...dataset, text: textContent }));
const session = (page) => page.evaluate("location.hash.slice(1)");
const owner = async (page) => redis.ask("GET", `chat:${await session(page)}:owner`);

// All are being answered, and none is at its end.
async function inMidStream({ page, seen }, count = PROMPTS.length) {
  await until("the answers have begun", async () => {
    const all = await texts(page);
    return all.length === count && all.every((text) => text.length > 100);
  }, { details: async () => JSON.stringify([await texts(page), seen]) + gateway.output.slice(-4000) + workers.output.slice(-4000) });
  assert.deepEqual([...new Set(await states(page))].filter((state) => state !== "open" && state !== undefined), []);
}

async function whileAnswering(what, { path, prompts = PROMPTS } = {}) {
  const tab = await visit(path);
  for (const prompt of prompts) await ask(tab.page, prompt);
  await inMidStream(tab, prompts.length);
  await what(tab);
  await isWhole(tab, prompts);
  return tab;
}

// The page shows the model's text, byte for byte, and the page checks that itself.
async function isWhole({ page, seen }, prompts = PROMPTS) {
  const details = async () => JSON.stringify([await states(page), await texts(page), seen]) + gateway.output + workers.output;
  await until("the answers are finished", async () => {
    const all = await states(page);
    return all.length === prompts.length && all.every((state) => state === "finish");
  }, { ms: 40_000, details });
  const shown = (await texts(page)).map((text) => Buffer.from(text));
  const expected = await Promise.all(prompts.map(async (prompt) => Buffer.from(await whole(prompt))));
  assert.deepEqual(shown.sort(Buffer.compare).map(String), expected.sort(Buffer.compare).map(String));
  assert.equal(seen.loads, 1, "it was not loaded again");
  assert.deepEqual(seen.complaints, []);
}

async function saysNothingWasLost({ page, seen }, returned) {
  const { lost, returns, text } = await status(page);
  assert.equal(lost, "0");
  assert.match(text, /nothing was lost/);
  // Where it may, but need not, have come back, this is undefined.
  if (returned === undefined) return;
  assert.equal(Number(returns) >= 1, returned, text);
  assert.equal(seen.sockets > 1, returned);
}

test("an answer comes token by token, and is whole", async () => {
  const tab = await whileAnswering(() => {});
  await saysNothingWasLost(tab, false);
  await tab.page.context().close();
});

test("answers are sentences", async () => {
  for (const prompt of PROMPTS) {
    const text = await whole(prompt);
    assert.ok(text.startsWith(`You asked: “${prompt}” Here is what I can say.`), text);
    assert.ok(text.endsWith(".\n\nThat is all."), text);
    const sentences = text.slice(text.indexOf("Here is")).split(/(?<=\.)\s+/);
    assert.ok(sentences.length > 8, text);
    for (const each of sentences) assert.match(each, /^\p{Lu}[^.]{8,}\.$/u);
  }
});

test("both pages show every state, at every width and in both colour schemes", async () => {
  mkdirSync(pictures, { recursive: true });
  for (const [name, width, height] of [["phone", 390, 844], ["desktop", 1280, 900]]) {
    for (const colorScheme of ["light", "dark"]) {
      const { page, seen } = await visit("/", await browser.newContext({ viewport: { width, height }, colorScheme }));
      const picture = (what) => page.screenshot({ path: join(pictures, `chat-${name}-${colorScheme}-${what}.png`) });
      await until("connected", async () => (await status(page)).state === "open");
      await ask(page, "Where does the river go?");
      assert.equal(await page.locator("h3").innerText(), "Where does the river go?", "the question is there at once");
      await inMidStream({ page, seen }, 1);
      cable.cut();
      await until("it says so", async () => /^Not connected, trying again/.test((await status(page)).text));
      await picture("away");
      cable.plug();
      await until("it is back", async () => /^Connected; came back once, nothing was lost/.test((await status(page)).text));
      // The first answer may have ended while the page was away.
      await ask(page, "And where does it come from?");
      await until("the second answer has begun", async () => (await texts(page))[1]?.length > 100);
      await page.getByRole("button", { name: "Stop" }).last().click();
      await until("it has stopped", async () => (await states(page))[1] === "cancelled");
      const [wide, inner] = await page.evaluate("[document.documentElement.scrollWidth, innerWidth]");
      assert.ok(wide <= inner, `${name}: ${wide} of ${inner} px`);
      await picture("stopped");
      await page.goto(`${origin}/sse.html`);
      await ask(page, "And how?");
      await until("an answer", async () => (await texts(page))[0]?.length > 100);
      await picture("sse");
      await page.context().close();
    }
  }
});

test("the connection is cut in mid-stream, again and again", async () => {
  const tab = await whileAnswering(async ({ page }) => {
    for (const ms of [1500, 50]) {
      cable.cut();
      await pause(ms);
      cable.plug();
      await until("it is back", async () => (await status(page)).state === "open");
    }
  });
  await saysNothingWasLost(tab, true);
  await tab.page.context().close();
});

test("the network goes silent, as under a laptop's closed lid", async () => {
  const tab = await whileAnswering(async () => {
    cable.silence();
    await pause(4000);
    cable.plug();
  });
  await saysNothingWasLost(tab, true);
  await tab.page.context().close();
});

test("the worker that answers is killed; the other one goes on", async () => {
  const tab = await whileAnswering(async ({ page }) => {
    const dead = await owner(page);
    process.kill(Number(dead.split("-")[0]), "SIGKILL");
    await until("another worker", async () => { const now = await owner(page); return now && now !== dead; });
  });
  await saysNothingWasLost(tab);
  await tab.page.context().close();
});

test("all workers are killed for longer than the lease; a new one begins anew, and nothing that was shown goes away", async () => {
  const tab = await whileAnswering(async ({ page }) => {
    const before = await texts(page);
    await workers.kill();
    const ids = await page.locator("#answers pre").evaluateAll((all) => all.map(({ id }) => id.slice("a-".length)));
    const stream = `{session:${await session(page)}:down}:stream:${ids[0]}`;
    await until("the gateway ends it", async () => (await redis.ask("HGET", stream, "state")) === "error");
    await workers.start();
    const now = await texts(page);
    assert.ok(before.every((text, at) => now[at].startsWith(text)));
  });
  await saysNothingWasLost(tab);
  await tab.page.context().close();
});

test("the gateway is killed and started again", async () => {
  const tab = await whileAnswering(async () => {
    await gateway.stop("SIGKILL");
    await pause(1000);
    await gateway.start();
  });
  await saysNothingWasLost(tab, true);
  await tab.page.context().close();
});

test("Redis is killed and started again with its data", async () => {
  const tab = await whileAnswering(async () => {
    await redis.stop("SIGKILL");
    await pause(1000);
    await redis.start();
  });
  await saysNothingWasLost(tab);
  await tab.page.context().close();
});

test("everything dies in one answer", async () => {
  const tab = await whileAnswering(async ({ page }) => {
    process.kill(Number((await owner(page)).split("-")[0]), "SIGKILL");
    await Promise.all([redis.stop("SIGKILL"), gateway.stop("SIGKILL")]);
    cable.cut();
    await redis.start();
    await gateway.start();
    cable.plug();
  });
  await saysNothingWasLost(tab, true);
  await tab.page.context().close();
});

test("stop ends an answer where it is, and the next one is whole", async () => {
  const { page, seen } = await visit();
  await ask(page, "Stop me");
  await inMidStream({ page, seen }, 1);
  await page.getByRole("button", { name: "Stop" }).click();
  await until("it has stopped", async () => (await states(page))[0] === "cancelled");
  const [text] = await texts(page);
  const all = await whole("Stop me");
  assert.ok(all.startsWith(text) && text.length < all.length);
  await ask(page, "Go on");
  await until("the next answer", async () => (await states(page))[1] === "finish");
  assert.deepEqual(await texts(page), [text, await whole("Go on")]);
  assert.deepEqual(seen.complaints, []);
  await page.context().close();
});

test("a second tab that is opened in mid-stream shows the same", async () => {
  let late;
  const tab = await whileAnswering(async ({ page }) => {
    late = await visit(`/#${await session(page)}`, page.context());
    await inMidStream(late);
    await gateway.stop("SIGKILL");
    await gateway.start();
  });
  await isWhole(late);
  for (const each of [tab, late]) await saysNothingWasLost(each, true);
  await tab.page.context().close();
});

test("another user who has the address gets a session of their own", async () => {
  const tab = await whileAnswering(async ({ page }) => {
    const address = await session(page);
    const stranger = await visit(`/#${address}`);
    await until("a session of their own", async () => {
      const { state } = await status(stranger.page);
      return state === "open" && await session(stranger.page) !== address;
    });
    assert.deepEqual(await texts(stranger.page), []);
    assert.deepEqual(stranger.seen.refusals.map((each) => each.split(" ")[0]), ["403"]);
    await stranger.page.context().close();
  }, { prompts: PROMPTS.slice(0, 1) });
  await tab.page.context().close();
});

test("a plain EventSource goes on after the gateway was killed, and after a cut", async () => {
  const tab = await whileAnswering(async () => {
    await gateway.stop("SIGKILL");
    await pause(500);
    await gateway.start();
    await pause(1500);
    cable.cut();
    cable.plug();
  }, { path: "/sse.html" });
  assert.equal(await tab.page.locator("#notices").innerText(), "");
  assert.equal(tab.seen.sockets, 0);
  await tab.page.context().close();
});

test("a plain EventSource that was refused while Redis was away goes on, and a prompt sent meanwhile is answered", async () => {
  const tab = await visit("/sse.html");
  const { page, seen } = tab;
  const [first, second] = PROMPTS;
  await ask(page, first);
  await inMidStream(tab, 1);
  await redis.stop("SIGKILL");
  cable.cut();
  cable.plug();
  await ask(page, second);
  const isRefused = (where) => seen.refusals.some((each) => each.startsWith("503 ") && each.includes(where));
  const details = () => JSON.stringify(seen) + gateway.output.slice(-4000) + workers.output.slice(-4000);
  await until("the prompt is refused", () => isRefused("/prompts"), { details });
  await until("the event stream is refused", () => isRefused(`:${cable.port}/`), { details });
  await redis.start();
  await isWhole(tab, [first, second]);
  assert.equal(await page.locator("#notices").innerText(), "");
  await page.context().close();
});

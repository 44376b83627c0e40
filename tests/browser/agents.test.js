// The example of users' agents in a real browser: a page calls a tool on a user's machine, and shows its progress, its result and its audit row.

import assert from "node:assert/strict";
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { after, before, test } from "node:test";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";
import { binary, freePort, Machine, Redis, root, until } from "./machines.js";

const example = join(root, "examples/fastapi-agents");
const python = join(example, ".venv/bin/python");
const pictures = join(root, "target/pictures");
const folder = mkdtempSync(join(tmpdir(), "wsproxy-agents-"));
const files = join(folder, "files");
const KEY = "an-api-key-of-the-tests-0123456789";
// Long enough that its reading can be watched and stopped on a busy machine too: it takes some five seconds.
const LONG = Array.from({ length: 2000 }, (_, n) => `${n}: The river goes down to the sea – and “水” with it.\n`).join("");
let redis, gateway, app, agent, origin, gatewayUrl, secret, browser;

before(async () => {
  mkdirSync(join(files, "notes"), { recursive: true });
  writeFileSync(join(files, "long.txt"), LONG);
  writeFileSync(join(files, "notes/short <b>.txt"), "Only <b>one</b> line – straße 水.\n");
  writeFileSync(join(files, ".hidden"), "not offered");
  writeFileSync(join(folder, "outside.txt"), "not the agent's");
  symlinkSync(join(folder, "outside.txt"), join(files, "link.txt"));
  redis = await Redis.start();
  const [port, gatewayPort] = [await freePort(), await freePort()];
  const database = join(folder, "wsproxy.db");
  gatewayUrl = `http://127.0.0.1:${gatewayPort}`;
  gateway = new Machine(binary, ["serve"], {
    env: {
      PORT: String(gatewayPort), REDIS_URL: redis.url, WSPROXY_API__KEYS: KEY, WSPROXY_ENDPOINTS__AGENTS: "true",
      WSPROXY_DATABASE__PATH: database, WSPROXY_SERVER__DRAIN_DELAY: "0s",
    },
    // Healthy, and not only ready: the database is opened in the background.
    ready: async () => (await fetch(`${gatewayUrl}/health`)).ok,
  });
  await gateway.start();
  secret = await issue();
  origin = `http://127.0.0.1:${port}`;
  const server = ["-m", "uvicorn", "app:app", "--app-dir", example, "--port", String(port), "--log-level", "warning"];
  app = new Machine(python, server, {
    env: { GATEWAY_URL: gatewayUrl, API_KEY: KEY, DATABASE: database, PYTHONDONTWRITEBYTECODE: "1" },
    ready: async () => (await fetch(origin)).ok,
  });
  await app.start();
  agent = newAgent();
  // Root cannot use Chromium's sandbox; in containers tests run as root.
  const args = process.getuid?.() === 0 ? ["--no-sandbox"] : [];
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args });
});

after(async () => {
  await browser?.close();
  await agent?.stop();
  await app?.stop();
  await gateway?.stop();
  await redis?.end();
  rmSync(folder, { recursive: true, force: true });
});

/** A fresh secret of the example's user. */
async function issue() {
  const answer = await fetch(`${gatewayUrl}/api/v1/agents/demo/secrets`, {
    method: "POST", headers: { authorization: `Bearer ${KEY}`, "content-type": "application/json" }, body: "{}",
  });
  assert.ok(answer.ok, await answer.clone().text());
  return (await answer.json()).secret;
}

function newAgent() {
  return new Machine(python, [join(example, "agent.py")], {
    env: { GATEWAY_URL: gatewayUrl, AGENT_SECRET: secret, AGENT_FOLDER: files, AGENT_PAUSE: "0.2", PYTHONDONTWRITEBYTECODE: "1", PYTHONUNBUFFERED: "1" },
    ready: async () => (await fetch(`${origin}/files`)).ok,
  });
}

async function visit(options) {
  if (!agent.child || agent.isOver) await agent.start();
  const page = await (await browser.newContext(options)).newPage();
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(String(error)));
  await page.goto(origin);
  await until("the files are listed", () => page.getByRole("button", { name: "long.txt" }).isVisible(), {
    details: async () => `${await page.locator("body").innerText()}\n${agent.output}${app.output}${gateway.output.slice(-4000)}`,
  });
  return { page, complaints };
}

const choose = (page, name) => page.getByRole("button", { name }).click();
const step = (page) => page.locator("#step").evaluate(({ textContent, dataset }) => ({ state: dataset.state, text: textContent }));
const value = (page) => page.locator("#progress").evaluate((element) => element.value / element.max);

async function inMidCall(page) {
  await until("progress", async () => {
    const now = await value(page);
    return now > 0.1 && now < 0.7;
  }, { details: async () => JSON.stringify([await step(page), await value(page)]) + gateway.output.slice(-4000) + agent.output });
}

/** The row of the audit log as the page shows it. */
async function row(page) {
  await page.locator("#audit").waitFor();
  const cells = await page.locator("#row").evaluate((list) => [...list.children].map((cell) => cell.textContent));
  return Object.fromEntries(cells.flatMap((name, at) => (at % 2 === 0 ? [[name, cells[at + 1]]] : [])));
}

async function ends({ page, complaints }) {
  assert.deepEqual(complaints, []);
  await page.context().close();
}

test("a file is read with progress, and the call is in the audit log", async () => {
  const tab = await visit();
  const { page } = tab;
  assert.deepEqual(await page.locator("#files button").allInnerTexts(), ["long.txt", "notes/short <b>.txt"]);
  await choose(page, "long.txt");
  const seen = [];
  await until("it is read", async () => {
    seen.push(await value(page));
    return (await step(page)).state === "done";
  }, { ms: 60_000, details: async () => JSON.stringify(await step(page)) + gateway.output.slice(-4000) + agent.output });
  assert.deepEqual(seen, [...seen].sort((a, b) => a - b), "progress only grows");
  assert.ok(new Set(seen).size > 5, `few steps: ${seen}`);
  assert.equal(await page.locator("#text").evaluate((element) => element.textContent), LONG);
  const shown = await row(page);
  assert.match(shown["request id"], /^[0-9a-f]{32}$/);
  assert.deepEqual([shown["tool name"], JSON.parse(shown.params), shown.outcome, shown.error], ["read_file", { path: "long.txt" }, "response", undefined]);
  assert.ok(Number(shown["execution time ms"]) > 500, JSON.stringify(shown));
  await ends(tab);
});

test("text and names of files are shown as they are", async () => {
  const tab = await visit();
  await choose(tab.page, "notes/short <b>.txt");
  await until("it is read", async () => (await step(tab.page)).state === "done");
  assert.equal(await tab.page.locator("#text").evaluate((element) => element.textContent), "Only <b>one</b> line – straße 水.\n");
  await ends(tab);
});

test("stop cancels the call on the user's machine, and the audit log says so", async () => {
  const tab = await visit();
  await choose(tab.page, "long.txt");
  await inMidCall(tab.page);
  await tab.page.getByRole("button", { name: "Stop" }).click();
  assert.deepEqual(await step(tab.page), { state: "stopped", text: "Stopped: your agent was told." });
  assert.equal((await row(tab.page)).outcome, "cancelled");
  await ends(tab);
});

test("another file takes the place of the one that is read", async () => {
  const tab = await visit();
  await choose(tab.page, "long.txt");
  await inMidCall(tab.page);
  await choose(tab.page, "notes/short <b>.txt");
  await until("it is read", async () => (await step(tab.page)).state === "done");
  assert.equal(await tab.page.locator("#name").innerText(), "notes/short <b>.txt");
  assert.equal(JSON.parse((await row(tab.page)).params).path, "notes/short <b>.txt");
  await ends(tab);
});

test("nothing outside of the agent's folder is read", async () => {
  const tab = await visit();
  for (const path of ["../outside.txt", join(folder, "outside.txt"), "link.txt"]) {
    const answer = await fetch(`${origin}/calls`, {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ path }),
    });
    const news = (await answer.text()).trim().split("\n").map((line) => JSON.parse(line));
    assert.deepEqual(news.at(-1), { error: "ToolError", message: "The path leads out of the agent's folder." });
  }
  await ends(tab);
});

test("an agent that is killed in mid-call is told at once, and one that comes back is asked again", async () => {
  const tab = await visit();
  await choose(tab.page, "long.txt");
  await inMidCall(tab.page);
  await agent.kill();
  await agent.start();
  // The call has a key, so that the application sends it again to the agent that came back.
  await until("it is read", async () => (await step(tab.page)).state === "done", { ms: 60_000, details: async () => JSON.stringify(await step(tab.page)) });
  assert.equal(await tab.page.locator("#text").evaluate((element) => element.textContent), LONG);
  await ends(tab);
});

test("without an agent the page says so and waits for it", async () => {
  if (agent.child && !agent.isOver) await agent.stop();
  const page = await (await browser.newContext()).newPage();
  await page.goto(origin);
  const status = page.locator("#status");
  await until("it says so", async () => /^Your agent is not connected\./.test(await status.innerText()), { details: () => status.innerText() });
  await agent.start();
  await until("the files are there", async () => /^Your agent offers 2 files\.$/.test(await status.innerText()));
  await page.context().close();
});

test("the page shows every state, at every width and in both colour schemes", async () => {
  mkdirSync(pictures, { recursive: true });
  for (const [name, width, height] of [["phone", 390, 844], ["desktop", 1280, 900]]) {
    for (const colorScheme of ["light", "dark"]) {
      const tab = await visit({ viewport: { width, height }, colorScheme });
      const { page } = tab;
      const picture = async (what) => {
        const [wide, inner] = await page.evaluate("[document.documentElement.scrollWidth, innerWidth]");
        assert.ok(wide <= inner, `${name}, ${what}: ${wide} of ${inner} px`);
        await page.screenshot({ path: join(pictures, `agents-${name}-${colorScheme}-${what}.png`) });
      };
      await picture("files");
      await choose(page, "long.txt");
      await inMidCall(page);
      await picture("reading");
      await page.getByRole("button", { name: "Stop" }).click();
      await page.locator("#audit").waitFor();
      await picture("stopped");
      await choose(page, "notes/short <b>.txt");
      await page.locator("#audit").waitFor();
      await picture("read");
      await ends(tab);
    }
  }
});

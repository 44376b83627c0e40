// The console of operators in a real browser: one minute from "why is this user disconnected" to the reason.

import assert from "node:assert/strict";
import { createHmac } from "node:crypto";
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { chromium } from "playwright-core";

import { binary, freePort, Machine, root, until } from "./machines.js";

const pictures = `${root}/target/pictures`;
const [ADMIN, OTHER, SECRET] = ["console-key-0123456789", "sessions-key-0123456789", "a-secret-for-tokens-of-the-console"];
const keyFile = join(tmpdir(), `wsproxy-console-${process.pid}`);
let [browser, gateway, clients, admin] = [];

before(async () => {
  mkdirSync(pictures, { recursive: true });
  const [port, adminPort] = [await freePort(), await freePort()];
  [clients, admin] = [`127.0.0.1:${port}`, `http://127.0.0.1:${adminPort}`];
  writeFileSync(keyFile, "rotating-key-0123456789");
  const keys = [
    { name: "on-call", secret: ADMIN, scopes: ["admin"] },
    { name: "chat", secret: OTHER, scopes: ["sessions", "events", "rooms"] },
    { name: "rotating", secret_file: keyFile, scopes: ["admin"] },
  ];
  const env = {
    PORT: String(port), METRICS_PORT: String(adminPort), WSPROXY_SERVER__BIND: "127.0.0.1", SERVER_ID: "gw-1", SECRET_KEY: SECRET,
    WSPROXY_ENDPOINTS__EVENTS: "true", WSPROXY_ENDPOINTS__ROOMS: "true", WSPROXY_API__KEY: JSON.stringify(keys),
  };
  gateway = new Machine(binary, ["serve"], { env, ready: async () => (await fetch(`${admin}/ready`)).ok });
  await gateway.start();
  const args = process.getuid?.() === 0 ? ["--no-sandbox"] : [];
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args });
});

after(async () => {
  await browser?.close();
  await gateway?.stop();
  rmSync(keyFile, { force: true });
});

const base64 = (text) => Buffer.from(text).toString("base64url");

function token(user, seconds = 3600) {
  const head = `${base64('{"alg":"HS256","typ":"JWT"}')}.${base64(JSON.stringify({ sub: user, exp: Math.floor(Date.now() / 1000) + seconds }))}`;
  return `${head}.${createHmac("sha256", SECRET).update(head).digest("base64url")}`;
}

// A client of the event endpoint, in a page of its own, that keeps what it heard.
async function client(user, seconds) {
  const page = await browser.newPage();
  await page.goto(`http://${clients}/health`);
  await page.evaluate((url) => {
    window.heard = [];
    window.socket = new WebSocket(url);
    window.ending = new Promise((resolve) => window.socket.addEventListener("close", ({ code, reason }) => resolve({ code, reason })));
    window.socket.addEventListener("message", ({ data }) => window.heard.push(JSON.parse(data)));
  }, `ws://${clients}/ws?token=${token(user, seconds)}`);
  const heard = () => page.evaluate(() => window.heard);
  const closed = () => page.evaluate(() => window.ending);
  if (seconds === undefined) await until(`${user} is connected`, async () => (await heard()).some(({ type }) => type === "connected"));
  return { heard, closed, page, end: () => page.close(), send: (length) => page.evaluate((length) => window.socket.send("x".repeat(length)), length) };
}

// An open page, with everything that it complained of.
async function visit({ key = ADMIN, width = 1200, height = 900, colorScheme = "light" } = {}) {
  const page = await browser.newPage({ viewport: { width, height }, colorScheme });
  const seen = { complaints: [], requests: [] };
  page.on("pageerror", (error) => seen.complaints.push(String(error)));
  // The browser itself logs refused answers.
  page.on("console", (message) => { if (message.type() === "error" && !/Failed to load resource/.test(message.text())) seen.complaints.push(message.text()); });
  page.on("request", (request) => seen.requests.push(request));
  page.on("dialog", (dialog) => { seen.complaints.push(`dialog ${dialog.message()}`); dialog.dismiss(); });
  await page.addInitScript(() => {
    window.violations = [];
    document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
  });
  // Files of the working tree in place of those in the binary, for those who change them.
  if (process.env.CONSOLE_FILES) {
    await page.route((url) => url.pathname.startsWith("/console"), async (route) => {
      const name = new URL(route.request().url()).pathname.split("/")[2] ?? "page.html";
      route.fulfill({ response: await route.fetch(), body: readFileSync(`${root}/crates/wsproxy/src/endpoint/console/${name}`, "utf8") });
    });
  }
  const response = await page.goto(`${admin}/console`);
  if (key) {
    await page.getByLabel("An API key").fill(key);
    await page.keyboard.press("Enter");
  }
  const self = {
    page, response, ...seen, seen,
    says: (id, pattern) => until(`#${id} says ${pattern}`, async () => {
      const text = await page.locator(`#${id}`).innerText();
      if (!pattern.test(text)) throw new Error(text);
      return text;
    }, { details: () => gateway.output.split("\n").slice(-20).join("\n") }),
    find: async (kind, id) => {
      await page.getByLabel("Kind").selectOption(kind);
      await page.getByLabel("Id", { exact: true }).fill(id);
      await page.keyboard.press("Enter");
    },
    done: async () => {
      assert.deepEqual(seen.complaints, []);
      assert.deepEqual(await page.evaluate(() => window.violations), []);
      await page.close();
    },
  };
  return self;
}

test("nothing is loaded from elsewhere, and no data is asked for without the key", async () => {
  const self = await visit({ key: null });
  const policy = self.response.headers()["content-security-policy"];
  assert.match(policy, /default-src 'none'/);
  assert.doesNotMatch(policy, /unsafe|\*|https?:/);
  assert.match(policy, /frame-ancestors 'none'/);
  await self.page.getByLabel("An API key").fill(ADMIN);
  await self.page.keyboard.press("Enter");
  await self.says("status-text", /gw-1: works/);
  const urls = self.requests.map((request) => request.url());
  assert.deepEqual(urls.filter((url) => !url.startsWith(admin) || url.includes(ADMIN)), []);
  const data = self.requests.filter((request) => request.url().includes("/api/"));
  assert.ok(data.length > 0 && data.every((request) => request.headers().authorization === `Bearer ${ADMIN}`));
  assert.equal(await self.page.evaluate(() => sessionStorage.length + localStorage.length + document.cookie.length), 0);
  await self.done();
});

test("the overview fills with lines and numbers", async () => {
  const one = await client("u-lines");
  const self = await visit();
  await self.says("key-name", /^on-call$/);
  await self.says("fine", /Nothing was lost/);
  await self.says("facts", /gw-1/);
  await until("a second sample", async () => (await self.page.locator(".chart .s2").first().getAttribute("d")) !== null
    && (await self.page.locator("#charts figure").first().locator("path.s2").nth(1).getAttribute("d"))?.includes("L"), { ms: 40_000 });
  assert.equal(await self.page.locator("#charts figure").count(), 6);
  const label = await self.page.locator("#charts svg[role=img]").first().getAttribute("aria-label");
  assert.match(label, /^Connections\. sessions: now 0, events: now 1/);
  await one.end();
  await self.done();
});

test("a user that was cut off is found with the reason", async () => {
  const one = await client("u-cut");
  const self = await visit();
  await self.find("user", "u-cut");
  await self.says("found-sum", /Connected now: one connection/);
  await self.says("found-connections", /Waiting for it\s*0 B of 10 MiB/);
  await one.send(2 * 1024 * 1024);
  await one.closed();
  await self.page.getByRole("button", { name: "Look again" }).click();
  await self.says("found-sum", /Not connected. The last connection ended .* ago: The client sent a message that is too large/);
  await self.says("found-past", /Ended by the gateway[\s\S]*1009 \(too_big\)/);
  // A token of yesterday: refused before the connection.
  await (await client("u-old", -7200)).closed();
  await self.find("user", "u-old");
  await self.says("found-sum", /The last attempt was refused .* ago: The token has expired\./);
  await self.says("found-past", /403 invalid_token[\s\S]*expired/);
  await self.says("latest", /u-old/);
  // Further attempts are folded behind the newest.
  for (let i = 0; i < 2; i += 1) await (await client("u-old", -7200)).closed();
  await self.page.getByRole("button", { name: "Look again" }).click();
  await self.says("found-past", /2 more for this reason since/);
  assert.equal(await self.page.locator("#found-past .what:visible").count(), 1);
  await self.page.locator("#found-past summary").click();
  assert.equal(await self.page.locator("#found-past .what:visible").count(), 3);
  // The overview comes every ten seconds.
  await self.says("latest", /And 2 more for this reason since .*, of u-old\./);
  await self.done();
});

test("one message is sent, and connections are ended, with the name of the key in the log", async () => {
  const one = await client("u-end");
  const self = await visit();
  await self.find("user", "u-end");
  await self.says("found-sum", /Connected now/);
  await self.page.getByRole("button", { name: "Send a message …" }).click();
  await self.page.getByLabel("Message, as JSON").fill("{not json");
  await self.page.getByRole("button", { name: "Send", exact: true }).click();
  await self.says("done", /This is no JSON/);
  await self.page.getByLabel("Message, as JSON").fill('{"type":"notice","data":{"text":"<b>hello</b>"}}');
  await self.page.getByRole("button", { name: "Send", exact: true }).click();
  await self.says("done", /Sent: one receiver/);
  await until("it is heard", async () => (await one.heard()).some(({ type, data }) => type === "notice" && data.text === "<b>hello</b>"));
  await self.page.getByRole("button", { name: "End its connections …" }).click();
  assert.match(await self.page.locator("#confirm-text").innerText(), /user u-end to the event endpoint.*rooms and agent stay/);
  await self.page.getByLabel("Reason for the client").fill("please leave");
  await self.page.getByRole("button", { name: "End", exact: true }).click();
  assert.deepEqual(await one.closed(), { code: 4004, reason: "please leave" });
  await self.says("found-past", /Ended by a worker or an operator/);
  const line = (message) => gateway.output.split("\n").find((text) => text.includes(message) && text.includes('"key":"on-call"') && text.includes("u-end"));
  await until("all is logged", () => ["An operator sends a message.", "An operator ends connections.", "An operator looked for a client."].every(line));
  assert.ok(!gateway.output.includes(ADMIN) && !gateway.output.includes("<b>hello</b>"));
  await self.done();
});

test("hostile ids and texts stay texts", async () => {
  const self = await visit();
  await self.find("user", "<img src=x onerror=alert(1)>");
  await self.says("find-error", /^id /);
  // Words of clients that are ids of no one.
  await fetch(`http://${clients}/agent/ws/s-x?token=${encodeURIComponent("<img src=x onerror=alert(1)>")}`, { headers: { accept: "text/event-stream", "user-agent": "<script>alert(1)</script>" } });
  await self.find("session", "s-x");
  await self.says("found-past", /403 invalid_token/);
  // An answer with markup in every text, as a broken gateway or another program on Redis would give it.
  const evil = "<img src=x onerror=alert(1)><script>alert(2)</script>";
  const row = { kind: "end", endpoint: evil, server_id: evil, at: new Date().toISOString(), connection_id: evil, duration_ms: 5, reason: evil, code: evil, by: evil, what: evil, advice: evil, messages_out: evil, user_id: evil, address: evil, more: { count: 2, since: evil, clients: [{ session_id: evil, user_id: null }] } };
  const answer = { kind: "user", id: "u", instances: [evil], notes: [evil], connections: [{ ...row, since: row.at, waiting_bytes: 1, waiting_bytes_max: 2 }], ends: [row], refusals: [{ ...row, kind: "refusal", status: evil, message: evil, error: evil }] };
  await self.page.route("**/api/v1/console/find?*", (route) => route.fulfill({ json: answer }));
  await self.find("user", "u");
  await self.says("found-notes", /<img src=x/);
  await self.says("found-past", /<script>/);
  assert.equal(await self.page.locator("#main img, #main script").count(), 0);
  await self.done();
});

test("a wrong key, one without the scope, and one that is taken out of use", async () => {
  const self = await visit({ key: "wrong-key-0123456789" });
  await self.says("key-error", /not known here/);
  const key = self.page.getByLabel("An API key");
  await key.fill("schlüssel");
  await self.page.keyboard.press("Enter");
  await self.says("key-error", /visible ASCII/);
  await key.fill(OTHER);
  await self.page.keyboard.press("Enter");
  await self.says("key-error", /lacks the scope admin/);
  await key.fill("rotating-key-0123456789");
  await self.page.keyboard.press("Enter");
  await self.says("key-name", /^rotating$/);
  await self.find("user", "u-1");
  await self.says("found-sum", /nothing is remembered/);
  writeFileSync(keyFile, "another-key-0123456789");
  await until("the key is gone", async () => {
    if (await self.page.locator("#find-again").isVisible()) await self.page.locator("#find-again").click({ timeout: 2000 }).catch(() => {});
    return self.page.locator("#key-card").isVisible();
  });
  await self.says("key-error", /taken out of use/);
  assert.equal(await self.page.locator("#main").isVisible(), false);
  assert.equal(await self.page.locator("#found-title").textContent(), "");
  await self.done();
});

test("the configuration has origins and no secret", async () => {
  const self = await visit();
  await self.page.getByRole("button", { name: "Show the configuration in effect" }).click();
  const text = await self.says("config", /secret_key[\s\S]*From: env SECRET_KEY/);
  assert.match(text, /\*\*\*/);
  await self.page.getByLabel("Only values that are not defaults").uncheck();
  const all = await self.says("config", /From: default/);
  for (const secret of [SECRET, ADMIN, OTHER]) assert.ok(!all.includes(secret));
  await self.done();
});

test("the keyboard alone finds, sends and ends", async () => {
  const one = await client("u-keys");
  const self = await visit({ key: null });
  const { keyboard } = self.page;
  const focused = () => self.page.evaluate(() => document.activeElement.textContent.trim() || document.activeElement.id);
  // Tab by tab until what is wanted has the focus, which is to be seen.
  const reach = async (name) => {
    for (let i = 0; i < 60; i += 1) {
      if ((await focused()) === name) {
        const outline = await self.page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
        assert.equal(outline, "solid", name);
        return;
      }
      await keyboard.press("Tab");
    }
    throw new Error(`${name} is not reached; ${await focused()} has the focus`);
  };
  assert.equal(await focused(), "key");
  await keyboard.type(ADMIN);
  await keyboard.press("Enter");
  await self.says("status-text", /gw-1/);
  await until("the search has the focus", async () => (await focused()) === "id");
  await keyboard.type("u-keys");
  await keyboard.press("Enter");
  await self.says("found-sum", /Connected now/);
  await until("the answer has the focus", async () => (await focused()) === "User u-keys");
  await reach("End its connections …");
  await keyboard.press("Enter");
  await keyboard.press("Escape");
  assert.equal(await self.page.locator("#confirm").isVisible(), false);
  await keyboard.press("Enter");
  await reach("End");
  await keyboard.press("Enter");
  assert.equal((await one.closed()).code, 4004);
  await self.says("done", /Told: one instance/);
  await self.done();
});

for (const [name, width] of [["desktop", 1200], ["phone", 390]]) {
  for (const colorScheme of ["light", "dark"]) {
    test(`it fits a ${name} in ${colorScheme}`, async () => {
      const one = await client("u-picture");
      const self = await visit({ width, height: 844, colorScheme });
      await self.says("status-text", /gw-1/);
      await self.find("user", "u-picture");
      await self.says("found-sum", /Connected/);
      const wide = await self.page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      assert.ok(wide <= 0, `${wide} px too wide`);
      // Contrast of texts with the ground behind them (WCAG AA).
      const faint = await self.page.evaluate(() => {
        const channels = (text) => text.match(/[\d.]+/g).map(Number);
        const light = (color) => color.slice(0, 3).map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const ground = (element) => {
          for (let at = element; at; at = at.parentElement) {
            const color = channels(getComputedStyle(at).backgroundColor);
            if (color[3] !== 0) return color;
          }
          return [255, 255, 255];
        };
        return [...document.querySelectorAll("#main *")].filter((one) => one.checkVisibility() && [...one.childNodes].some((child) => child.nodeType === 3 && child.data.trim())).map((one) => {
          const [a, b] = [light(channels(getComputedStyle(one).color)), light(ground(one))].sort((x, y) => y - x);
          return [one.textContent.slice(0, 40), (a + 0.05) / (b + 0.05)];
        }).filter(([, contrast]) => contrast < 4.5);
      });
      assert.deepEqual(faint, []);
      await self.page.screenshot({ path: `${pictures}/console-${name}-${colorScheme}.png`, fullPage: true });
      await one.end();
      await self.done();
    });
  }
}

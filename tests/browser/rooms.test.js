// The development page of rooms in a real browser: windows that see each other come, go, move and speak.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdirSync } from "node:fs";
import { request } from "node:http";
import { after, before, test } from "node:test";
import { promisify } from "node:util";
import { chromium } from "playwright-core";

import { binary, freePort, Machine, root, until as waitFor } from "./machines.js";

const pictures = `${root}/target/pictures`;
const gateways = [];
const run = promisify(execFile);
let browser;

const until = (what, condition, ms) => waitFor(what, condition, { ms, details: () => gateways.map(({ output }) => output).join("\n") });

// A gateway with attempts enough for all windows of a test, which waits for members longer than a busy machine keeps them away.
async function dev(port, ...args) {
  const origin = `http://127.0.0.1:${port}`;
  const env = { RATE_LIMIT_MAX_REQUESTS: "10000", WSPROXY_ROOMS__LEAVE_GRACE: "60s" };
  const gateway = new Machine(binary, ["dev", "--port", String(port), ...args], { env, ready: async () => (await fetch(`${origin}/ready`)).ok });
  Object.assign(gateway, { origin, port });
  await gateway.start();
  gateways.push(gateway);
  return gateway;
}

let gateway;
before(async () => {
  mkdirSync(pictures, { recursive: true });
  gateway = await dev(await freePort());
  const args = process.getuid?.() === 0 ? ["--no-sandbox"] : [];
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args });
});

after(async () => {
  await browser?.close();
  for (const each of gateways) await each.stop();
});

// A page whose windows are all in the room, with everything it complained of and all that its sockets carried.
async function visit(room, { windows = 1, origin = gateway.origin, width = 1200, height = 900, colorScheme = "light", here = windows } = {}) {
  const page = await browser.newPage({ viewport: { width, height }, colorScheme });
  const seen = { complaints: [], requests: [], sockets: [], sent: [] };
  page.on("pageerror", (error) => seen.complaints.push(String(error)));
  page.on("console", (message) => {
    // A cut connection, and a gateway that is away, are logged by the browser itself.
    const isOfNetwork = /WebSocket connection|Failed to load resource/.test(message.text());
    if (message.type() === "error" && !isOfNetwork) seen.complaints.push(message.text());
  });
  page.on("request", (request) => seen.requests.push(request.url()));
  page.on("websocket", (socket) => {
    seen.sockets.push(socket.url());
    socket.on("framesent", ({ payload }) => seen.sent.push(JSON.parse(payload)));
  });
  await page.addInitScript(() => {
    window.shifts = [];
    new PerformanceObserver((list) => {
      for (const { value, hadRecentInput, sources } of list.getEntries()) {
        // Dots move, lists grow, and a sentence has another length.
        const what = sources.filter(({ node }) => node && !node.parentElement?.closest(".stage, .story, .log, .here")).map(({ node }) => node.className || node.nodeName);
        if (what.length > 0 && !hadRecentInput) window.shifts.push(`${value.toFixed(4)} ${what}`);
      }
    }).observe({ type: "layout-shift", buffered: true });
  });
  const response = await page.goto(`${origin}/dev/rooms?room=${room}&windows=${windows}`);
  const all = [];
  for (let i = 0; i < windows; i += 1) all.push(view(page, i));
  for (const each of all) await each.people(here);
  return Object.assign(seen, { page, response, all, one: all[0], two: all[1] });
}

// One window: what a person does in it and sees of it.
function view(page, index) {
  const place = page.locator(".window").nth(index);
  const stage = place.locator(".stage");
  const self = {
    place,
    client: () => place.getAttribute("data-client"),
    state: (name) => until(`the window is ${name}`, async () => (await place.getAttribute("data-state")) === name),
    people: (count) => until(`${count} people`, async () => {
      const found = await place.locator(".here li").count();
      if (found !== count) throw new Error(`${found} of ${count}`);
      return true;
    }),
    press: (name) => place.getByRole("button", { name, exact: true }).click(),
    lines: (kind) => place.locator(`.log li[data-kind="${kind}"]`).evaluateAll((all) => all.map((line) => line.querySelector("span").textContent)),
    told: (pattern) => until(`it says ${pattern}`, async () => {
      const text = await place.locator(".story").innerText();
      if (!pattern.test(text)) throw new Error(text);
      return text;
    }),
    dots: (owner) => place.locator(`.dot[data-owner="${owner}"]`),
    async say(text) {
      await place.getByLabel("Message to the room").fill(text);
      await self.press("Say");
    },
    // Lets the pointer appear at one share of the field's width and move to another, so that it crosses no other window.
    async move(x, y, { from = x, steps = 12 } = {}) {
      await stage.scrollIntoViewIfNeeded();
      const box = await stage.boundingBox();
      await page.mouse.move(box.x + from * box.width, box.y + 0.5 * box.height);
      await page.mouse.move(box.x + x * box.width, box.y + y * box.height, { steps });
    },
    // Place of a member's dot, as shares of the field.
    sees: (owner, x, y) => until(`the dot of ${owner} at ${x} ${y}`, async () => {
      const [dot] = await self.dots(owner).evaluateAll((all) => all.map(({ style }) => [parseFloat(style.left) / 100, parseFloat(style.top) / 100]));
      if (!dot) throw new Error("There is no dot.");
      if (Math.hypot(dot[0] - x, dot[1] - y) > 0.02) throw new Error(String(dot));
      return true;
    }),
  };
  return self;
}

test("the page loads nothing from elsewhere, and two windows see each other", async () => {
  const { page, response, requests, complaints, sent, one, two } = await visit("pair", { windows: 2 });
  const policy = response.headers()["content-security-policy"];
  assert.match(policy, /default-src 'none'/);
  assert.doesNotMatch(policy, /unsafe|\*|https?:/);
  assert.deepEqual(requests.filter((url) => !url.startsWith(gateway.origin)), []);
  await one.told(/^You are \w+\. Move the pointer/);
  const [first, second] = [await one.client(), await two.client()];
  await one.move(0.3, 0.4);
  await two.sees(first, 0.3, 0.4);
  await two.move(0.8, 0.6);
  await one.sees(second, 0.8, 0.6);
  await two.sees(first, 0.3, 0.4);
  await one.say("Hello, <b>you</b>");
  await until("it is said", async () => (await two.lines("chat")).some((line) => line.endsWith("Hello, <b>you</b>")));
  assert.equal((await one.lines("chat")).length, 1, "one's own words are shown once");
  for (const each of [one, two]) {
    for (const what of [".trip", ".flight"]) {
      await until(`${what} is measured`, async () => /^[\d.]+ ms$/.test(await each.place.locator(what).innerText()));
    }
  }
  const moves = sent.filter(({ positionUpdate }) => positionUpdate);
  assert.ok(moves.length >= 2 && moves.every(({ positionUpdate: { position } }) => position.x >= 0 && position.x <= 1));
  assert.deepEqual(complaints, []);
  await page.close();
});

test("a pointer that moves without a pause is sent 20 times a second", async () => {
  const { page, sent, one, two } = await visit("fast", { windows: 2 });
  const began = Date.now();
  await one.move(0.99, 0.5, { from: 0.01, steps: 300 });
  const took = Date.now() - began;
  await two.sees(await one.client(), 0.99, 0.5);
  const moves = sent.filter(({ positionUpdate }) => positionUpdate).length;
  assert.ok(moves >= 2 && moves <= took / 50 + 3, `${moves} positions in ${took} ms`);
  await page.close();
});

test("two pages: dots, words, a killed connection that no other page sees, and a page that is closed", async () => {
  const left = await visit("pages");
  const ann = await left.one.client();
  await left.one.move(0.25, 0.5);
  const right = await visit("pages", { here: 2 });
  const bob = await right.one.client();
  await right.one.sees(ann, 0.25, 0.5);
  await left.one.people(2);
  await right.one.move(0.7, 0.2);
  await left.one.sees(bob, 0.7, 0.2);
  await left.one.say("Who is there?");
  await until("it is heard", async () => (await right.one.lines("chat")).length === 1);
  await right.one.say("I am.");
  await until("the answer", async () => (await left.one.lines("chat")).length === 2);

  await right.one.press("Kill my connection");
  await right.one.state("away");
  assert.equal(await right.page.locator(".story").getAttribute("data-kind"), "away");
  assert.equal(await left.one.dots(bob).count(), 1, "the dot stays");
  await left.one.move(0.1, 0.9);
  await right.one.told(/^Back after [\d.]+ s, as the same member\. The others see no leave/);
  await right.one.sees(ann, 0.1, 0.9);
  assert.equal(await right.one.client(), bob);
  assert.equal(right.sockets.length, 2);
  assert.equal(new Set(right.sockets.map((url) => new URL(url).searchParams.get("client_id"))).size, 1);
  await right.one.move(0.4, 0.4);
  await left.one.sees(bob, 0.4, 0.4);
  await right.one.say("Did you miss me?");
  await until("the words behind it", async () => (await left.one.lines("chat")).length === 3);
  // What the gateway tells comes in order: a leave or a join would be here by now.
  assert.deepEqual(await left.one.lines("leave"), []);
  assert.equal((await left.one.lines("join")).length, 1);
  assert.equal(await left.one.dots(bob).count(), 1);

  const closed = Date.now();
  await right.page.close();
  await left.one.people(1);
  const took = Date.now() - closed;
  assert.equal((await left.one.lines("leave")).length, 1);
  assert.equal(await left.one.dots(bob).count(), 0);
  assert.ok(took < 4_000, `${took} ms: a page that is closed says goodbye, and is not waited for`);
  assert.deepEqual([...left.complaints, ...right.complaints], []);
  await left.page.close();
});

test("a window tells what the other window saw: nothing of a kill, all of a leave", async () => {
  const { page, complaints, one, two } = await visit("told", { windows: 2 });
  await one.move(0.5, 0.5);
  const killed = Date.now();
  await two.press("Kill my connection");
  await two.told(/You are cut off\. The others see you in your place\. Back in [012]\.\d s\./);
  const back = await two.told(/^Back after [\d.]+ s, as the same member\. The other window saw no leave and no join\.$/);
  const [away, most] = [Number(back.match(/[\d.]+/)[0]), (Date.now() - killed) / 1000];
  assert.ok(away >= 2 && away <= most + 0.05, `${away} s of ${most} s`);
  await two.press("Leave");
  await one.people(1);
  await two.state("closed");
  await two.told(/saw you leave at once/);
  await two.people(0);
  assert.equal((await one.lines("leave")).length, 1);
  assert.equal(await two.place.locator(".dot").count(), 0);
  await two.press("Join");
  await one.people(2);
  await two.sees(await one.client(), 0.5, 0.5);
  const steps = await page.locator(".steps [data-done]").evaluateAll((all) => all.map(({ dataset }) => dataset.step));
  assert.deepEqual(steps, ["move", "kill", "leave"]);
  assert.deepEqual(await page.evaluate("window.shifts"), [], "nothing jumps");
  assert.deepEqual(complaints, []);
  await page.close();
});

test("the arrow keys move a dot, and Enter says something", async () => {
  const { page, one, two } = await visit("keys", { windows: 2 });
  await one.place.locator(".stage").focus();
  for (const key of ["ArrowRight", "ArrowRight", "ArrowDown"]) await page.keyboard.press(key);
  await two.sees(await one.client(), 0.58, 0.54);
  await one.place.getByLabel("Message to the room").focus();
  await page.keyboard.type("By hand");
  await page.keyboard.press("Enter");
  await until("it is said", async () => (await two.lines("chat")).length === 1);
  await page.close();
});

test("lines for a shell work as they are copied: the backend speaks, lists and sends away", async () => {
  const { page, one, two } = await visit("shell", { windows: 2 });
  await page.getByText("The same room from a shell").click();
  const lines = await page.locator("#shell code").evaluateAll((all) => all.map(({ textContent }) => textContent));
  const line = (word) => run("bash", ["-c", lines.find((each) => each.includes(word))]).then(({ stdout }) => stdout);
  await line("/messages");
  for (const each of [one, two]) {
    await until("the backend speaks", async () => (await each.lines("chat")).includes("the backend Hello from the backend."));
  }
  const { members } = JSON.parse(await line("/members"));
  assert.deepEqual(members.map(({ client_id: id }) => id).sort(), [await one.client(), await two.client()].sort());
  assert.match(await line("/metrics"), /^wsproxy_room/m);
  await line("/close");
  for (const each of [one, two]) await each.told(/^The room was closed for you: 4004, closing time\. Join comes back\./);
  await one.press("Join");
  await one.people(1);
  await page.close();
});

test("a gateway that is started anew has all members and every dot again", async () => {
  const own = await dev(await freePort());
  const { page, complaints, one, two } = await visit("again", { windows: 2, origin: own.origin });
  const first = await one.client();
  await one.move(0.3, 0.3);
  await two.sees(first, 0.3, 0.3);
  await own.kill();
  await one.told(/The gateway does not answer\. Is “wsproxy dev” still running/);
  await one.place.page().screenshot({ path: `${pictures}/rooms-error.png`, fullPage: true });
  await own.start();
  for (const each of [one, two]) await each.state("open");
  for (const each of [one, two]) await each.people(2);
  await two.sees(first, 0.3, 0.3);
  assert.deepEqual(complaints, []);
  await page.close();
});

test("on an address for other machines the page gets tokens, and no client names itself", async () => {
  const open = await dev(await freePort(), "--bind", "0.0.0.0");
  const refused = await new Promise((resolve, reject) => {
    const upgrade = { connection: "upgrade", upgrade: "websocket", "sec-websocket-version": "13", "sec-websocket-key": btoa("0123456789abcdef") };
    request(`${open.origin}/ws/lobby?user_id=eve`, { headers: upgrade }, ({ statusCode }) => resolve(statusCode)).on("error", reject).end();
  });
  assert.equal(refused, 401);
  const { page, complaints, sockets, one, two } = await visit("open", { windows: 2, origin: open.origin });
  await one.move(0.6, 0.6);
  await two.sees(await one.client(), 0.6, 0.6);
  assert.ok(sockets.every((url) => !url.includes("token")), "a browser's token stays out of the URL");
  await page.getByText("The same room from a shell").click();
  const lines = await page.locator("#shell code").allInnerTexts();
  assert.ok(lines.some((line) => line.startsWith("T=$(")), String(lines));
  assert.deepEqual(complaints, []);
  await page.close();
});

test("every width and colour scheme shows all of it", async () => {
  for (const [name, width, height] of [["phone", 390, 844], ["desktop", 1280, 900]]) {
    for (const colorScheme of ["light", "dark"]) {
      const { page, complaints, one, two } = await visit(`${name}-${colorScheme}`, { windows: 2, width, height, colorScheme });
      const [first, second] = [await one.client(), await two.client()];
      await one.move(0.35, 0.3);
      await two.move(0.85, 0.7);
      await one.sees(second, 0.85, 0.7);
      await one.say("Can you see where I am pointing?");
      await until("it is heard", async () => (await two.lines("chat")).length === 1);
      await two.say("Yes, and I am over here. This line is long enough to show what a long line looks like.");
      await until("the answer", async () => (await one.lines("chat")).length === 2);
      await two.press("Kill my connection");
      await two.state("away");
      await two.sees(first, 0.35, 0.3);
      const [wide, inner] = await page.evaluate("[document.documentElement.scrollWidth, innerWidth]");
      assert.ok(wide <= inner, `${name}: ${wide} of ${inner} px`);
      await page.screenshot({ path: `${pictures}/rooms-${name}-${colorScheme}.png`, fullPage: true });
      await two.told(/^Back after/);
      assert.deepEqual(await page.evaluate("window.shifts"), [], `${name}: nothing jumps`);
      await page.screenshot({ path: `${pictures}/rooms-${name}-${colorScheme}-back.png`, fullPage: true });
      assert.deepEqual(complaints, []);
      await page.close();
    }
  }
});

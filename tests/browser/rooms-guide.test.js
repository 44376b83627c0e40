// The guide of a shared cursor, followed as a reader does, in two windows of Chromium: its blocks are saved and run as they are.

import assert from "node:assert/strict";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { chromium } from "playwright-core";
import { binary, freePort, Machine, root, until } from "./machines.js";

const folder = mkdtempSync(join(tmpdir(), "wsproxy-guide-"));
const guide = readFileSync(join(root, "docs/guides/rooms-cursors.md"), "utf8");
const PATH = `${join(folder, "bin")}:${process.env.PATH}`;
const SIZE = { width: 800, height: 600 };
let ports, gateway, files, browser;

/** The one block of a language that holds a word, with free ports in place of the guide's. */
function block(language, word) {
  const blocks = [...guide.matchAll(/^```(\w+)\n(.*?)^```/gms)].filter(([, name, text]) => name === language && text.includes(word));
  assert.equal(blocks.length, 1, `blocks of ${language} with ${word}`);
  return blocks[0][2].replaceAll("8080", ports.gateway).replaceAll("8000", ports.files);
}

/** The process that a line of the guide starts in the background. */
function line(word, ready) {
  const command = block("sh", word).trim().replace(/ &$/, "").replace(/\bwsproxy serve\b/, "exec wsproxy serve");
  const env = { PATH, PORT: ports.gateway };
  return new Machine("bash", ["-c", `cd ${folder} && ${command}`], { env, ready });
}

before(async () => {
  ports = { gateway: String(await freePort()), files: String(await freePort()) };
  mkdirSync(join(folder, "bin"));
  mkdirSync(join(folder, "node_modules/@wsproxy"), { recursive: true });
  symlinkSync(binary, join(folder, "bin/wsproxy"));
  symlinkSync(join(root, "clients/js"), join(folder, "node_modules/@wsproxy/client"));
  writeFileSync(join(folder, "index.html"), block("html", "importmap"));
  writeFileSync(join(folder, "cursors.js"), block("js", "pointermove"));
  gateway = line("wsproxy serve", async () => (await fetch(`http://localhost:${ports.gateway}/ready`)).ok);
  files = line("http.server", async () => (await fetch(`http://localhost:${ports.files}/`)).ok);
  await gateway.start();
  await files.start();
  const args = process.getuid?.() === 0 ? ["--no-sandbox"] : [];
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args });
});

after(async () => {
  await browser?.close();
  await gateway?.stop();
  await files?.kill();
  rmSync(folder, { recursive: true, force: true });
});

/** A window with the guide's page, in which all members are listed. */
async function open(count) {
  const page = await browser.newPage({ viewport: SIZE });
  page.problems = [];
  page.on("pageerror", (error) => page.problems.push(String(error)));
  await page.goto(`http://localhost:${ports.files}/`);
  await members(page, count);
  return page;
}

const members = (page, count) => until(`${count} names`, async () => (await page.locator("#members li").count()) === count);
const cursors = (page) => page.locator(".cursor");

/** The only other cursor of this window comes to a place. */
async function sees(page, x, y) {
  await until("the cursor", async () => {
    const box = await cursors(page).first().boundingBox();
    return box && Math.abs(box.x - x) < 2 && Math.abs(box.y - y) < 2;
  });
  assert.equal(await cursors(page).count(), 1);
}

test("each window shows the pointer of the other one, over a restart of the gateway", async () => {
  const one = await open(1);
  await one.mouse.move(100, 150);
  const two = await open(2);
  await sees(two, 100, 150);
  await members(one, 2);
  assert.match(await cursors(two).first().textContent(), /^guest-\d+$/);
  for (let x = 0; x <= 400; x += 10) await two.mouse.move(x, 300);
  await sees(one, 400, 300);

  await gateway.stop();
  await one.mouse.move(200, 250);
  await gateway.start();
  await sees(two, 200, 250);
  await sees(one, 400, 300);

  await two.context().setOffline(true);
  await new Promise((resolve) => setTimeout(resolve, 1_000));
  await two.context().setOffline(false);
  await two.mouse.move(10, 20);
  await sees(one, 10, 20);

  await two.close();
  await members(one, 1);
  assert.equal(await cursors(one).count(), 0);
  assert.deepEqual([...one.problems, ...two.problems], []);
});

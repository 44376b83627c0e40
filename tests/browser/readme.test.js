// README's sample, typed in as a reader does: its blocks are run as they stand, and its page is used in Chromium.
//
// The sample has the usual ports, so its processes and the browser run in a network of their own where that is possible.

import assert from "node:assert/strict";
import { execFile, spawn } from "node:child_process";
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { after, before, test } from "node:test";
import { setTimeout as pause } from "node:timers/promises";
import { promisify } from "node:util";
import { chromium } from "playwright-core";
import { binary, Machine, root, until } from "./machines.js";

const SECTION = "## Write a worker";
const pictures = join(root, "target/pictures");
const run = promisify(execFile);
let folder, network, redis, gateway, application, browser;

// The blocks of README's section, by language.
function blocks(language) {
  const section = readFileSync(join(root, "README.md"), "utf8").split(SECTION)[1].split("\n## ")[0];
  return [...section.matchAll(/^```(\w+)\n(.*?)^```/gms)].filter((block) => block[1] === language).map((block) => block[2]);
}

// Commands of the block that a reader runs; a backslash at the end of a line continues it.
function commands() {
  const [block] = blocks("sh").filter((each) => each.includes("uvicorn app:app"));
  return block.replaceAll("\\\n", "").split("\n").filter((line) => line !== "");
}

// A network without any other process in it, held open by a shell that waits. Where none may be made, as in some
// containers, the network of the machine has to do, if the ports are free.
async function newNetwork() {
  const up = "import fcntl,socket,struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh', b'lo', 0x41))";
  const holder = spawn("unshare", ["--map-root-user", "--net", "sh", "-c", `python3 -c "${up}" && echo up && read wait`]);
  let said = "", isOver = false;
  holder.on("error", () => { isOver = true; }).on("exit", () => { isOver = true; });
  for (const stream of [holder.stdout, holder.stderr]) stream.on("data", (data) => { said += data; });
  await until("a network of its own", () => isOver || said.includes("up"));
  if (!isOver) return { holder, enter: ["nsenter", "--preserve-credentials", "--user", "--net", "--target", String(holder.pid)] };
  for (const port of [6379, 8000, 8080]) {
    await new Promise((resolve, reject) => {
      const server = createServer().once("error", reject).listen(port, "127.0.0.1", () => server.close(resolve));
    });
  }
  return { holder, enter: ["env"] };
}

// A shell in the folder and in the network; `isReady` asks a command there.
function shell(script, isReady) {
  const [command, ...args] = network.enter;
  return new Machine(command, [...args, "bash", "-c", `cd ${folder}\n${script}`], { ready: isReady });
}

async function inNetwork(...words) {
  const [command, ...args] = network.enter;
  return (await run(command, [...args, ...words])).stdout.trim();
}

const answers = (address) => inNetwork("curl", "-sf", "-o", "/dev/null", address).then(() => true, () => false);

before(async () => {
  folder = mkdtempSync(join(tmpdir(), "wsproxy-readme-"));
  mkdirSync(join(folder, "target/release"), { recursive: true });
  symlinkSync(resolve(binary), join(folder, "target/release/wsproxy"));
  symlinkSync(join(root, "clients"), join(folder, "clients"));
  const [app] = blocks("python");
  writeFileSync(join(folder, "app.py"), app);
  // Packages come from outside, where the network of the sample does not lead.
  const line = (word) => commands().find((each) => each.includes(word)).replace(/ &$/, "");
  await run("bash", ["-c", line("pip install")], { cwd: folder });
  network = await newNetwork();
  redis = shell(line("redis-server"), async () => (await inNetwork("redis-cli", "PING")) === "PONG");
  gateway = shell(line("wsproxy serve"), () => answers("http://127.0.0.1:8080/ready"));
  application = shell(line("uvicorn app:app"), () => answers("http://127.0.0.1:8000"));
  for (const machine of [redis, gateway, application]) await machine.start();

  const wrapper = join(folder, "chromium");
  const found = process.env.CHROMIUM ?? "/usr/bin/chromium";
  writeFileSync(wrapper, `#!/bin/sh\nexec ${network.enter.join(" ")} ${found} "$@"\n`);
  chmodSync(wrapper, 0o755);
  // Chromium's sandbox does not work for the root of a namespace.
  browser = await chromium.launch({ executablePath: wrapper, args: ["--no-sandbox"] });
});

after(async () => {
  await browser?.close();
  for (const machine of [application, gateway, redis]) if (machine?.child && !machine.isOver) await machine.kill();
  network?.holder.kill();
  if (folder) rmSync(folder, { recursive: true, force: true });
});

test("README's sample answers in a browser, also after restarts", async () => {
  const page = await browser.newPage({ viewport: { width: 640, height: 360 } });
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(String(error)));
  await page.goto("http://127.0.0.1:8000");
  const shown = () => page.locator("#answers").innerText();
  const say = async (text) => {
    await page.fill("#line", text);
    await page.keyboard.press("Enter");
    await until(`an answer to ${text}`, async () => (await shown()).includes(`You said: ${text}`), {
      details: async () => `${await shown()}\n${complaints}\n${gateway.output.slice(-6000)}\n${application.output}`,
    });
  };
  await until("the page is connected", () => page.evaluate("document.querySelector('#line').disabled === false"));
  await say("hello");
  await redis.kill();
  await pause(5000);
  await redis.start();
  await until("the gateway is ready", () => answers("http://127.0.0.1:8080/ready"));
  await say("hello again");
  // Ctrl-C, as a reader ends it.
  const isOver = new Promise((resolve) => application.child.once("exit", resolve));
  process.kill(-application.child.pid, "SIGINT");
  await isOver;
  await application.start();
  await say("and again");
  assert.deepEqual(complaints, []);
  mkdirSync(pictures, { recursive: true });
  await page.screenshot({ path: join(pictures, "readme.png") });
});

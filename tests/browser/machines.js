// Real parts for the tests: processes that can be killed and started again, and a cable between the browser and the gateway.

import { execFile, spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { connect, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

export const root = fileURLToPath(new URL("../..", import.meta.url));
export const binary = process.env.WSPROXY_BIN ?? join(root, "target/debug/wsproxy");

// Ports that this process has given to parts, which may not listen yet.
const given = new Set();

export async function freePort() {
  // Below the range that the kernel hands out to clients, so that none of them takes it meanwhile, and above 10080, which
  // browsers and fetch() refuse.
  for (;;) {
    const server = createServer().listen(10_100 + Math.floor(Math.random() * 20_000), "127.0.0.1");
    const port = await new Promise((resolve) => {
      server.once("listening", () => resolve(server.address().port)).once("error", () => resolve(0));
    });
    if (port === 0) continue;
    await new Promise((resolve) => server.close(resolve));
    if (given.has(port)) continue;
    given.add(port);
    return port;
  }
}

// `details` is called for what to say beside, where it did not happen.
export async function until(what, condition, { ms = 20_000, details = () => "" } = {}) {
  const end = Date.now() + ms;
  let last;
  while (Date.now() < end) {
    try {
      const result = await condition();
      if (result) return result;
    } catch (error) { last = error; }
    await new Promise((resolve) => setTimeout(resolve, 25));
  }
  throw new Error(`${what} did not happen within ${ms} ms: ${last ?? ""}\n${await details()}`);
}

// No process outlives the tests, however they end: each leads a group of its own, which has its children.
const running = new Set();
process.on("exit", () => {
  for (const { pid } of running) try { process.kill(-pid, "SIGKILL"); } catch { /* It is gone. */ }
});

export class Machine {
  output = "";

  constructor(command, args, { env = {}, ready }) {
    Object.assign(this, { command, args, env, isReady: ready });
  }

  async start() {
    // A clean environment: variables of the person who runs the tests must not configure anything.
    const { PATH, HOME } = process.env;
    const env = { PATH, HOME, ...this.env };
    this.child = spawn(this.command, this.args, { env, detached: true, stdio: ["ignore", "pipe", "pipe"] });
    this.child.on("error", (error) => { this.output += error; });
    for (const stream of [this.child.stdout, this.child.stderr]) stream.on("data", (data) => { this.output += data; });
    const child = this.child;
    running.add(child);
    child.once("exit", () => running.delete(child));
    await until(`${this.command} ready`, () => this.isOver || this.isReady(), { ms: 60_000, details: () => this.output });
    if (this.isOver) throw new Error(`${this.command} ended:\n${this.output}`);
  }

  get isOver() {
    return this.child.exitCode !== null || this.child.signalCode !== null;
  }

  async stop(signal = "SIGTERM") {
    if (!this.child || this.isOver) return;
    const over = new Promise((resolve) => this.child.once("exit", resolve));
    this.child.kill(signal);
    await over;
  }

  // With all its children, at once.
  async kill() {
    const over = new Promise((resolve) => this.child.once("exit", resolve));
    process.kill(-this.child.pid, "SIGKILL");
    await over;
  }
}

// With its data in the file before it answers, so that being killed loses nothing. The disk may have it later: no machine
// loses its power here, and where a disk is slow each answer would wait for it.
export class Redis extends Machine {
  static async start() {
    const [folder, port] = [mkdtempSync(join(tmpdir(), "wsproxy-chat-")), await freePort()];
    const keep = ["--dir", folder, "--appendonly", "yes", "--appendfsync", "no", "--save", ""];
    const redis = new Redis("redis-server", ["--port", String(port), "--bind", "127.0.0.1", ...keep], {
      ready: async () => (await redis.ask("PING")) === "PONG",
    });
    Object.assign(redis, { folder, port, url: `redis://127.0.0.1:${port}` });
    await redis.start();
    return redis;
  }

  async ask(...words) {
    return (await promisify(execFile)("redis-cli", ["-p", String(this.port), ...words])).stdout.trim();
  }

  async end() {
    await this.stop("SIGKILL");
    rmSync(this.folder, { recursive: true, force: true });
  }
}

// Carries bytes between a browser and a port, until it is pulled out.
export class Cable {
  #sockets = new Set();
  #state = "plugged";

  static async to(target) {
    const cable = new Cable();
    cable.port = await freePort();
    cable.server = createServer((near) => cable.#join(near, target));
    await new Promise((resolve) => cable.server.listen(cable.port, "127.0.0.1", resolve));
    return cable;
  }

  #join(near, target) {
    const far = connect(target, "127.0.0.1");
    for (const [from, to] of [[near, far], [far, near]]) {
      this.#sockets.add(from);
      from.on("data", (data) => { if (!from.isDead) to.write(data); });
      from.on("error", () => {}).on("close", () => {
        this.#sockets.delete(from);
        if (!from.isDead) to.destroy();
      });
      if (this.#state === "silent") from.isDead = true;
    }
    if (this.#state === "cut") near.destroy();
  }

  // Breaks what there is, and everything new.
  cut() {
    this.#state = "cut";
    for (const socket of this.#sockets) socket.destroy();
  }

  // Nothing gets through any more, and neither side is told, as when a laptop is closed or its network is gone.
  silence() {
    this.#state = "silent";
    for (const socket of this.#sockets) socket.isDead = true;
  }

  // New connections work; old ones stay what they are.
  plug() {
    this.#state = "plugged";
  }

  async end() {
    for (const socket of this.#sockets) socket.destroy();
    await new Promise((resolve) => this.server.close(resolve));
  }
}

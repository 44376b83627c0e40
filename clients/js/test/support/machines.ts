// Real parts for tests: redis-server, the gateway, and a cable between it and the client that can be cut.

import { type ChildProcess, spawn } from "node:child_process";
import { createHmac } from "node:crypto";
import { accessSync, constants, mkdtempSync, rmSync } from "node:fs";
import { connect, createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

export const API_KEY = "key-of-the-tests-0123456789";
export const SECRET = "a-secret-of-the-tests-of-32-bytes";

/** The binary under test. Its absence is a failure: a test that did not run must not look like one that passed. */
export function binary(): string {
  const root = fileURLToPath(new URL("../../../..", import.meta.url));
  const candidates = process.env["WSPROXY_BIN"]
    ? [process.env["WSPROXY_BIN"]]
    : [join(root, "target/debug/wsproxy"), join(root, "target/release/wsproxy")];
  for (const candidate of candidates) {
    try {
      accessSync(candidate, constants.X_OK);
      return candidate;
    } catch {
      continue;
    }
  }
  throw new Error(`The gateway is missing: build it with "cargo build -p wsproxy", or name it in WSPROXY_BIN. Looked for: ${candidates.join(", ")}`);
}

// Ports that this process has given to parts, which may not listen yet.
const given = new Set<number>();

export async function freePort(): Promise<number> {
  // Below the range that the kernel hands out to clients, so that none of them takes it meanwhile, and above 10080, which
  // browsers and fetch() refuse.
  for (;;) {
    const port = 10_100 + Math.floor(Math.random() * 20_000);
    if (given.has(port)) continue;
    const server = createServer();
    const isFree = await new Promise<boolean>((resolve) => {
      server.once("error", () => resolve(false)).listen(port, "127.0.0.1", () => resolve(true));
    });
    if (!isFree) continue;
    await new Promise((resolve) => server.close(resolve));
    given.add(port);
    return port;
  }
}

export async function until(what: string, condition: () => unknown, ms = 20_000): Promise<void> {
  const end = Date.now() + ms;
  let last: unknown;
  while (Date.now() < end) {
    try {
      if (await condition()) return;
    } catch (error) {
      last = error;
    }
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  throw new Error(`${what} did not happen within ${ms} ms: ${last ?? ""}`);
}

// No process outlives the tests, however they end.
const running: Set<ChildProcess> = new Set();
process.on("exit", () => {
  for (const child of running) child.kill("SIGKILL");
});

/** Stops whatever a test that failed has left. */
export function stopAll(): void {
  for (const child of running) child.kill("SIGKILL");
}

class Machine {
  output = "";
  protected child: ChildProcess | undefined;

  protected run(command: string, args: string[], env: Record<string, string>): void {
    // A clean environment: variables of the person who runs the tests must not configure the gateway.
    const { PATH = "", HOME = "" } = process.env;
    const child = spawn(command, args, { env: { PATH, HOME, ...env }, stdio: ["ignore", "pipe", "pipe"] });
    child.on("error", (error) => (this.output += String(error)));
    for (const stream of [child.stdout, child.stderr]) stream?.on("data", (data) => (this.output += data));
    running.add(child);
    child.once("exit", () => running.delete(child));
    this.child = child;
  }

  protected async ready(what: string, condition: () => unknown): Promise<void> {
    await until(what, () => {
      if (this.child?.exitCode !== null) return true;
      return condition();
    }).catch((error: unknown) => {
      throw new Error(`${error}\n${this.output}`);
    });
    if (this.child?.exitCode !== null) throw new Error(`${what} ended:\n${this.output}`);
  }

  async stop(signal: NodeJS.Signals = "SIGTERM"): Promise<void> {
    const child = this.child;
    if (!child || child.exitCode !== null || child.signalCode !== null) return;
    const over = new Promise((resolve) => child.once("exit", resolve));
    child.kill(signal);
    await over;
  }
}

export class Redis extends Machine {
  readonly #folder: string = mkdtempSync(join(tmpdir(), "wsproxy-js-"));
  port = 0;

  static async start(): Promise<Redis> {
    const redis = new Redis();
    redis.port = await freePort();
    await redis.restart();
    return redis;
  }

  /** Starts it again with its data. */
  async restart(): Promise<void> {
    // In the file before it answers. The disk may have it later: no machine loses its power here, and some disks are slow.
    const keep = ["--appendonly", "yes", "--appendfsync", "no", "--dir", this.#folder];
    this.run("redis-server", ["--port", String(this.port), "--bind", "127.0.0.1", "--save", "", ...keep], {});
    await this.ready("redis-server", () => this.command("PING").then((answer) => answer.startsWith("+PONG")));
  }

  /** One command, its answer as it comes. */
  command(...words: string[]): Promise<string> {
    const socket = connect(this.port, "127.0.0.1");
    socket.write(`*${words.length}\r\n${words.map((word) => `$${Buffer.byteLength(word)}\r\n${word}\r\n`).join("")}`);
    return new Promise((resolve, reject) => {
      socket.on("error", reject).on("close", () => reject(new Error("Redis closed.")));
      socket.once("data", (data) => {
        resolve(String(data));
        socket.destroy();
      });
    });
  }

  /** The messages of `channel` from now on, as they come. */
  async follow(channel: string): Promise<{ heard: string; end(): void }> {
    const socket = connect(this.port, "127.0.0.1");
    const follower = { heard: "", end: () => void socket.destroy() };
    socket.on("error", () => undefined).on("data", (data) => (follower.heard += data));
    socket.write(`SUBSCRIBE ${channel}\r\n`);
    await until("the subscription", () => follower.heard.includes("subscribe"));
    follower.heard = "";
    return follower;
  }

  override async stop(signal: NodeJS.Signals = "SIGKILL"): Promise<void> {
    await super.stop(signal);
  }

  async end(): Promise<void> {
    await this.stop();
    rmSync(this.#folder, { recursive: true, force: true });
  }
}

export class Gateway extends Machine {
  port = 0;
  #env: Record<string, string> = {};

  static async start(redis: Redis, settings: Record<string, string> = {}): Promise<Gateway> {
    const gateway = new Gateway();
    gateway.port = await freePort();
    gateway.#env = {
      PORT: String(gateway.port),
      REDIS_URL: `redis://127.0.0.1:${redis.port}`,
      SECRET_KEY: SECRET,
      WSPROXY_API__KEYS: API_KEY,
      WSPROXY_ENDPOINTS__EVENTS: "true",
      WSPROXY_SERVER__DRAIN_DELAY: "0s",
      WSPROXY_SESSIONS__HISTORY: "true",
      ...settings,
    };
    await gateway.restart();
    return gateway;
  }

  async restart(): Promise<void> {
    this.run(binary(), ["serve"], this.#env);
    await this.ready("the gateway", async () => (await fetch(`${this.url}/ready`)).ok);
  }

  get url(): string {
    return `http://127.0.0.1:${this.port}`;
  }

  /** A call of the worker API. */
  async api(path: string, body: unknown = {}): Promise<any> {
    const raw = body instanceof Uint8Array ? body : JSON.stringify(body);
    const response = await fetch(`${this.url}/api/v1/${path}`, {
      method: "POST", body: raw as BodyInit, headers: { Authorization: `Bearer ${API_KEY}`, "Content-Type": "application/json" },
    });
    const text = await response.text();
    if (!response.ok) throw new Error(`${path}: ${response.status} ${text}`);
    return JSON.parse(text);
  }

  /** A one-time token, or one for event streams. */
  async token(session: string, eventStream = false): Promise<string> {
    return (await this.api(`sessions/${session}/token`, eventStream ? { event_stream: true } : undefined)).token;
  }
}

/** Relays bytes between clients and a port. */
export class Cable {
  target: number;
  port = 0;
  plugged = true;
  readonly #sockets: Set<Socket> = new Set();
  readonly #server: Server;

  static async to(target: number): Promise<Cable> {
    const cable = new Cable(target);
    cable.port = await freePort();
    await new Promise<void>((resolve) => cable.#server.listen(cable.port, "127.0.0.1", resolve));
    return cable;
  }

  private constructor(target: number) {
    this.target = target;
    this.#server = createServer((near) => {
      if (!this.plugged) return near.destroy();
      const far = connect(this.target, "127.0.0.1");
      for (const [socket, other] of [[near, far], [far, near]] as const) {
        this.#sockets.add(socket);
        socket.on("error", () => other.destroy()).on("close", () => {
          this.#sockets.delete(socket);
          other.destroy();
        });
      }
      near.pipe(far).pipe(near);
      return undefined;
    });
  }

  get url(): string {
    return `http://127.0.0.1:${this.port}`;
  }

  /** Lets nothing through any more on what runs over it now, and ends nothing; new connections work. */
  silence(): void {
    for (const socket of this.#sockets) socket.unpipe().pause();
  }

  /** Breaks everything that runs over it; new connections work. */
  cut(): void {
    for (const socket of this.#sockets) socket.destroy();
  }

  async end(): Promise<void> {
    this.cut();
    await new Promise((resolve) => this.#server.close(resolve));
  }
}

/** A JWT for `user`, with further claims. */
export function jwt(user: string, seconds = 3600, secret: string = SECRET, claims: object = {}): string {
  const encode = (value: unknown): string => Buffer.from(JSON.stringify(value)).toString("base64url");
  const now = Math.floor(Date.now() / 1000);
  const head = `${encode({ alg: "HS256", typ: "JWT" })}.${encode({ sub: user, iat: now, exp: now + seconds, ...claims })}`;
  return `${head}.${createHmac("sha256", secret).update(head).digest("base64url")}`;
}

// A user's agent: tools of this machine, and one connection that comes back by itself until the gateway says that it shall not.

import { advise, type End } from "../advice.ts";
import { type BackoffOptions, fullJitter } from "../backoff.ts";
import { Emitter } from "../emitter.ts";
import { isObject, type JsonObject, number, type Problem, type State, type StateChange, text } from "../messages.ts";
import type { SendRate } from "../outbox.ts";
import type { Address, SignalLike } from "../platform.ts";
import { AwakeClock, watchWake, type Wake } from "../wake.ts";
import type { WebSocketConstructor } from "../websocket.ts";
import { Calls, type Ended, type Tool } from "./calls.ts";
import { AgentEnded, AgentRefused, AgentReplaced } from "./errors.ts";
import { AgentLine } from "./line.ts";

/** Options of an agent. */
export interface AgentOptions {
  /** Id of the user whose agent this is. */
  userId: string;
  /**
   * The user's secret, or a function that gives it before every connection, such as one that reads a file. Throw a `GiveUp` there
   * where there will be none any more.
   */
  secret: string | (() => string | Promise<string>);
  /** Version of your program, which the gateway lists. */
  version?: string;
  /** Platform of this machine, which the gateway lists. Default: that of Node, else `browser`. */
  platform?: string;
  /** Number of calls that run at the same time. Default 16. */
  concurrency?: number;
  /** Number of calls that wait for their turn; those beyond are answered with an error. Default 256. */
  queueMax?: number;
  /** Size of a response; a larger result is answered with an error. Default 1 MiB, the gateway's default. */
  messageBytesMax?: number;
  /** Rate at which messages are sent: responses first, then progress. Default: 1,000 at once, then 900 a second; beyond some 1,000 the gateway reads more slowly. */
  sendRate?: SendRate;
  /** Pauses between attempts. */
  backoff?: BackoffOptions;
  /** Ends the agent when there was no connection for so long. Default: never. */
  giveUpAfterMs?: number;
  /** After this time a try has failed. Default 15 s. */
  connectTimeoutMs?: number;
  /** Ends the agent when aborted. */
  signal?: SignalLike;
  /** The WebSocket to use. Default: the global one, which Node has since version 22; before it, give that of the package `ws`. */
  WebSocket?: WebSocketConstructor;
  /** A source of numbers in [0, 1). Default `Math.random`. */
  random?: () => number;
}

/** A call that has ended on this agent. */
export interface CallSeen extends Ended {}

/** Events of an agent. */
export interface AgentEvents {
  /** The state has changed: connecting, open, waiting or closed. */
  state: StateChange;
  /** A call has ended. */
  call: CallSeen;
  /** Something went wrong that ends nothing: the gateway's codes, or `secret` (the function that gives it failed). */
  error: Problem;
}

const SLOW_MS = 5_000;
const RETRY_AFTER_MAX_MS = 300_000;
const TIMEOUT_MAX = 2 ** 31 - 1;
/** Time to answer a heartbeat. */
const ACK_MS = 10_000;
const HEARTBEAT_MS = 30_000;
const REPLACED = 4001;
const CREDENTIALS = 4401;
/** Close codes from here on are the gateway's and applications' own. */
const CODES_OF_APPLICATIONS = 3000;

/** What `run` has returned. */
interface Run {
  promise: Promise<void>;
  resolve: () => void;
  reject: (error: Error) => void;
}

type Timer = "try" | "stable" | "heartbeat" | "silence";

/**
 * A user's agent. Give it tools, then `run` it.
 *
 * ```ts
 * const agent = new Agent("https://gateway.example", { userId: "u-1", secret });
 * agent.tool("read_file", async ({ path }: { path: string }, { signal }) => readFile(path, { encoding: "utf8", signal }));
 * await agent.run();
 * ```
 */
export class Agent extends Emitter<AgentEvents> {
  readonly #options: AgentOptions;
  readonly #url: string;
  readonly #tools: Map<string, Tool> = new Map();
  readonly #calls: Calls;
  readonly #clock: AwakeClock = new AwakeClock();
  #unwatch: () => void = () => undefined;

  #state: State = "closed";
  #line: AgentLine | undefined;
  #connectionId: string | undefined;
  /** One try or open connection is one turn: what belongs to an earlier one is ignored. */
  #turn = 0;
  #attempt = 0;
  #downSince = 0;
  /** The gateway asked for patience until then. */
  #notBefore = 0;
  #heardAt = 0;
  #heartbeatMs = HEARTBEAT_MS;
  #timers: Partial<Record<Timer, ReturnType<typeof setTimeout> | undefined>> = {};
  /** The secret of the present try, and the one that the gateway has refused. */
  #secret = "";
  #refused: { secret: string; end: End } | undefined;
  #running: Run | undefined;

  constructor(url: Address, options: AgentOptions) {
    super();
    const address = new URL(typeof url === "string" ? url : url.href, (globalThis as { location?: { href: string } }).location?.href);
    if (address.searchParams.has("secret")) throw new Error("A secret in an address ends in logs: give it as the option secret.");
    address.protocol = address.protocol.replace("http", "ws");
    address.searchParams.set("userId", options.userId);
    this.#url = address.href;
    this.#options = options;
    for (const word of [options.version, options.platform]) {
      if (word !== undefined && !/^[\x20-\x7e]{0,64}$/.test(word)) throw new Error("version and platform have at most 64 visible ASCII characters.");
    }
    if (!this.#Socket) {
      throw new Error("This platform has no WebSocket: give one in the option WebSocket, such as that of the package ws.");
    }
    const limits = { running: options.concurrency ?? 16, waiting: options.queueMax ?? 256, bytes: options.messageBytesMax ?? 1024 * 1024 };
    this.#calls = new Calls(this.#tools, limits, (end) => this.#tell("call", end));
    options.signal?.addEventListener("abort", () => this.close());
  }

  /** State of the connection: `closed` before `run` and after the end. */
  get state(): State {
    return this.#state;
  }

  /** The gateway's name of the present connection. */
  get connectionId(): string | undefined {
    return this.#connectionId;
  }

  /** Adds a tool, or replaces the one of this name. */
  tool<P = any>(name: string, tool: Tool<P>): this {
    this.#tools.set(name, tool);
    return this;
  }

  /**
   * Connects, and serves calls until `close`, over any number of connections. Rejects with an `AgentReplaced` when another agent of the
   * user has connected, with an `AgentRefused` when the secret is not accepted, and with an `AgentEnded` when the gateway or
   * `giveUpAfterMs` ends it otherwise.
   */
  run(): Promise<void> {
    if (this.#running) return this.#running.promise;
    let settle!: Omit<Run, "promise">;
    const promise = new Promise<void>((resolve, reject) => (settle = { resolve, reject }));
    this.#running = { promise, ...settle };
    this.#attempt = 0;
    this.#refused = undefined;
    this.#calls.begin();
    this.#downSince = Date.now();
    this.#unwatch = watchWake(this.#clock, (what) => this.#woke(what));
    if (this.#options.signal?.aborted) this.close();
    else this.#try();
    return promise;
  }

  /** Ends the connection, and the calls in progress with it. */
  close(reason = ""): void {
    if (!this.#running) return;
    const { resolve } = this.#running;
    this.#stop(reason);
    this.#to("closed", { code: 1000, reason });
    resolve();
  }

  /** Ends it politely: takes no further calls, waits up to `graceMs` for those that are here, then closes. */
  async stop(graceMs = 5_000): Promise<void> {
    if (!this.#running) return;
    const { promise } = this.#running;
    const timer = setTimeout(() => this.close(), graceMs);
    // After another end in the meantime there is nothing to wait for; `run` has said why.
    await Promise.race([this.#calls.drain(), promise.catch(() => undefined)]);
    clearTimeout(timer);
    this.close();
  }

  get #Socket(): WebSocketConstructor | undefined {
    return this.#options.WebSocket ?? (globalThis as { WebSocket?: WebSocketConstructor }).WebSocket;
  }

  #try(): void {
    this.#leave();
    const turn = this.#turn;
    this.#to("connecting", {});
    // A handler may have closed it.
    if (turn !== this.#turn) return;
    const timeout = this.#options.connectTimeoutMs ?? 15_000;
    this.#timers.try = setTimeout(() => this.#ended(turn, { code: 1006, reason: "no connection in time", opened: false }), timeout);
    void this.#open(turn);
  }

  async #open(turn: number): Promise<void> {
    const { secret } = this.#options;
    try {
      const value: unknown = typeof secret === "string" ? secret : await secret();
      if (typeof value !== "string" || value === "") throw new Error("There is no secret.");
      if (turn !== this.#turn) return;
      this.#secret = value;
    } catch (cause) {
      if (turn !== this.#turn) return;
      const end: End = { code: 1006, reason: `no secret: ${cause}`, opened: false };
      if (typeof secret === "string" || (cause instanceof Error && cause.name === "GiveUp")) return this.#finish(end, String(cause));
      this.#tell("error", { code: "secret", message: `No secret: ${cause}`, cause });
      return this.#ended(turn, end);
    }
    // The gateway counts failures, and another try with a secret that it has refused is one.
    if (this.#refused?.secret === this.#secret) return this.#finish(this.#refused.end);
    try {
      const line = new AgentLine(this.#Socket as WebSocketConstructor, this.#url, this.#secret, this.#options.sendRate ?? {}, {
        message: (message) => this.#message(line, message),
        ended: (end) => this.#ended(turn, end),
      });
      this.#line = line;
    } catch (error) {
      // For example, an insecure address in a secure page.
      this.#ended(turn, { code: 1006, reason: String(error), opened: false });
    }
  }

  #message(line: AgentLine, message: JsonObject): void {
    this.#heardAt = Date.now();
    switch (message["type"]) {
      case "connected":
        return this.#opened(line, message);
      case "tool_call":
        return this.#calls.take(line, message);
      case "tool_cancel":
        return this.#calls.cancel(line, message);
      case "error":
        return this.#tell("error", { code: text(message["code"]) ?? "error", message: text(message["message"]) ?? "" });
    }
  }

  #opened(line: AgentLine, { connectionId, heartbeat }: JsonObject): void {
    clearTimeout(this.#timers.try);
    this.#connectionId = text(connectionId);
    this.#refused = undefined;
    this.#heartbeatMs = (isObject(heartbeat) && number(heartbeat["interval"])) || HEARTBEAT_MS;
    this.#timers.stable = setTimeout(() => (this.#attempt = 0), this.#options.backoff?.stableMs ?? 10_000);
    this.#beatIn(this.#heartbeatMs);
    if (line.hearsProgress) {
      const { version = "", platform = platformName() } = this.#options;
      line.send(JSON.stringify({ type: "hello", version, platform, capabilities: ["cancel", "progress"] }));
    }
    this.#to("open", {});
  }

  #beatIn(ms: number): void {
    clearTimeout(this.#timers.heartbeat);
    this.#timers.heartbeat = setTimeout(() => this.#beat(), Math.min(ms, TIMEOUT_MAX));
  }

  /** Sends a heartbeat. Where nothing comes in time, the connection is dead. */
  #beat(): void {
    const [turn, since] = [this.#turn, Date.now()];
    this.#line?.send(JSON.stringify({ type: "heartbeat", timestamp: since }));
    this.#beatIn(this.#heartbeatMs);
    // The heartbeats that follow must not put off what this one has begun.
    this.#timers.silence ??= setTimeout(() => {
      this.#timers.silence = undefined;
      if (this.#heardAt < since) this.#ended(turn, { code: 1006, reason: "nothing heard", opened: true });
    }, ACK_MS);
  }

  #woke(what: Wake): void {
    // Failures on one network say nothing of another.
    if (what === "online") this.#attempt = 0;
    if (this.#state === "waiting" && Date.now() >= this.#notBefore) this.#try();
    else if (this.#state === "open") this.#beat();
  }

  #ended(turn: number, end: End): void {
    if (turn !== this.#turn) return;
    const advice = this.#advise(end);
    if (advice === "final") return this.#finish(end);
    if (advice === "credentials") this.#refused = { secret: this.#secret, end };
    this.#leave();
    const { giveUpAfterMs = Infinity } = this.#options;
    const left = this.#downSince + giveUpAfterMs - Date.now();
    if (left <= 0) return this.#finish(end, `There was no connection for ${giveUpAfterMs} ms.`);
    const { baseMs = 500, maxMs = 30_000 } = this.#options.backoff ?? {};
    const retryAfterMs = Math.min(end.retryAfterMs ?? 0, RETRY_AFTER_MAX_MS);
    const jitterMs = fullJitter(this.#attempt, baseMs, maxMs, this.#options.random ?? Math.random);
    const delayMs = jitterMs + (retryAfterMs || (advice === "slow" ? SLOW_MS : 0));
    this.#notBefore = Date.now() + retryAfterMs;
    this.#attempt += 1;
    this.#timers.try = setTimeout(() => this.#try(), Math.min(delayMs, left, TIMEOUT_MAX));
    this.#to("waiting", { ...told(end), delayMs });
  }

  #advise(end: End): ReturnType<typeof advise> {
    const isGateways = end.refusal !== undefined;
    // A newer agent of the user was faster; another try would replace it.
    if (end.status === 409 && isGateways) return "final";
    const isRefusal = (end.status === 401 || end.status === 403) && isGateways;
    // With a fixed secret the same would be refused again; a function may give another one.
    if (isRefusal || (end.opened && end.code === CREDENTIALS)) return typeof this.#options.secret === "string" ? "final" : "credentials";
    const advice = advise(end);
    // A message that the gateway did not accept is no reason to stop for ever: its call is over, and others may go well.
    return advice === "final" && end.opened && end.code < CODES_OF_APPLICATIONS ? "slow" : advice;
  }

  /** Everything of the present turn ends here. */
  #leave(reason = ""): void {
    this.#turn += 1;
    for (const timer of Object.values(this.#timers)) clearTimeout(timer);
    this.#timers = {};
    if (this.#state === "open") this.#downSince = Date.now();
    const line = this.#line;
    this.#line = this.#connectionId = undefined;
    if (!line) return;
    line.close(1000, reason);
    this.#calls.end(line);
  }

  #stop(reason = ""): void {
    this.#unwatch();
    this.#running = undefined;
    this.#leave(reason);
  }

  #finish(end: End, message?: string): void {
    const reject = this.#running?.reject;
    this.#stop();
    this.#to("closed", told(end));
    reject?.(this.#error(end, message));
  }

  #error(end: End, message: string | undefined): AgentEnded {
    const { userId } = this.#options;
    const { status, code } = end;
    if (message !== undefined) return new AgentEnded(message, end);
    if (code === REPLACED || status === 409) {
      return new AgentReplaced(`Another agent of ${userId} has connected, and the newer one stays.`, end);
    }
    if (code === CREDENTIALS || status === 401 || status === 403) {
      return new AgentRefused(`The gateway does not accept the secret of ${userId}: ${end.reason || `HTTP ${status}`}.`, end);
    }
    return new AgentEnded(`The connection of ${userId} has ended: ${status ? `HTTP ${status}` : code} ${end.reason}`.trim(), end);
  }

  #to(state: State, why: Partial<StateChange>): void {
    const previous = this.#state;
    this.#state = state;
    this.#tell("state", { state, previous, attempt: this.#attempt, ...why });
  }

  #tell<K extends keyof AgentEvents>(event: K, value: AgentEvents[K]): void {
    this.emit(event, value)?.catch((cause: unknown) => console.error(cause));
  }
}

function told({ code, reason, status }: End): Partial<StateChange> {
  return { code, reason, ...(status ? { status } : {}) };
}

function platformName(): string {
  return (globalThis as { process?: { platform?: string } }).process?.platform ?? "browser";
}

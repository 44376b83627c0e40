// The rules that sessions and events share: one connection that comes back, resumes where it was, and delivers each message once.

import { advise, type End } from "./advice.ts";
import { fullJitter } from "./backoff.ts";
import { Emitter } from "./emitter.ts";
import { iterate } from "./iterate.ts";
import {
  type Connected,
  type HistoryLost,
  isBehind,
  isGatewayError,
  type JsonObject,
  number,
  position,
  type Problem,
  type Received,
  type Resumed,
  type StateChange,
  type State,
  text,
} from "./messages.ts";
import type { ConnectionOptions, CredentialReason, CredentialRequest } from "./options.ts";
import { Recent } from "./recent.ts";
import { openSse } from "./sse.ts";
import type { TokenStream } from "./streams.ts";
import type { Frame, Target, Transport, TransportEvents } from "./transport.ts";
import { watchWake, type Wake } from "./wake.ts";
import { openWebSocket, type WebSocketConstructor } from "./websocket.ts";

/** Every event of a connection. */
export interface ConnectionEvents<M> {
  /** It connects, is open, waits or is closed. */
  state: StateChange;
  /** A message of a worker, once. */
  message: Received<M>;
  /** The gateway told who and where one is. */
  connected: Connected;
  /** What was missed follows. */
  resumed: Resumed;
  /** Messages are missing for good. */
  historyLost: HistoryLost;
  /** The gateway had lost its bus, and the channel has no history: what was published meanwhile is missing. */
  busRecovered: { gapMs: number };
  /** Something went wrong that ends nothing. */
  error: Problem;
  /** A token stream was heard of for the first time: sessions only. */
  stream: TokenStream;
  /** A new token is in use: events only. */
  refreshed: { expiresAt: number | undefined };
}

/** A place to connect to, and what opens it. */
export interface Grant {
  /** Where, without credentials. */
  url: URL;
  /** The credential. */
  token: string;
  /** Whether the credential opens event streams only. */
  eventStream?: boolean;
}

/** The types of messages that have one. */
export type TypeOf<M> = M extends { type: infer T extends string } ? T : string;
/** Those messages of `M` which have the type `T`. */
export type OfType<M, T> = M extends { type: infer U } ? (T extends U ? M : never) : never;

/** What broke before this without a message may never have worked, as behind a proxy that accepts and then drops. */
const BRIEF_MS = 5_000;
/** After this long on server-sent events the next try is a WebSocket again. */
const SSE_STAY_MS = 60_000;
/** Server-sent events have a comment every 15 s. */
const SSE_SILENCE_MS = 40_000;
const SLOW_MS = 5_000;
const TIMEOUT_MAX = 2 ** 31 - 1;

/**
 * A connection that comes back by itself. It begins to connect as soon as the code that made it has returned, so that no
 * handler attached there misses anything.
 */
export abstract class Connection<M> extends Emitter<ConnectionEvents<M>> implements AsyncIterable<Received<M>> {
  /** Where it leads, without credentials. */
  protected readonly base: URL;
  readonly #options: ConnectionOptions;
  readonly #seen: Recent;
  readonly #queue: (string | Uint8Array)[] = [];
  #unwatch: () => void = () => undefined;

  #state: State = "connecting";
  #position: string;
  #asked = "";
  #path = "";
  #connectionId: string | undefined;
  #attempt = 0;
  #reason: CredentialReason = "initial";
  #failures = 0;

  // One try or open connection is one turn: what belongs to an earlier one is ignored.
  #turn = 0;
  #abort: AbortController = new AbortController();
  #transport: Transport | undefined;
  #openedAt = 0;
  #heardAt = 0;
  #hasHeard = false;
  #timers: Record<"try" | "stable" | "silence", ReturnType<typeof setTimeout> | undefined> = {
    try: undefined,
    stable: undefined,
    silence: undefined,
  };

  /** Checks the options and begins to connect; what subclasses need must be there one microtask later. */
  constructor(options: ConnectionOptions & { url: string | URL }) {
    super();
    this.#options = options;
    this.base = new URL(options.url, (globalThis as { location?: { href: string } }).location?.href);
    this.#position = options.lastEventId ?? "";
    this.#seen = new Recent(options.dedupMax ?? 2048);
    if (options.transport === "websocket" && !this.#socket) {
      throw new Error("This platform has no WebSocket: give one in the options, such as that of the package ws.");
    }
    options.signal?.addEventListener("abort", () => this.close());
    queueMicrotask(() => {
      if (options.signal?.aborted) this.close();
      if (this.#state === "connecting") this.#start();
    });
  }

  /** What it is doing. */
  get state(): State {
    return this.#state;
  }

  /** What carries it while it is open. */
  get transport(): "websocket" | "sse" | undefined {
    return this.#state === "open" ? this.#transport?.kind : undefined;
  }

  /** The position after which a new connection would resume; empty where there is none. Store it to resume after a reload. */
  get lastEventId(): string {
    return this.#position;
  }

  /** The gateway's name of the present connection, where it told it. */
  get connectionId(): string | undefined {
    return this.#connectionId;
  }

  /** Calls `handler` with every message of this type. Answers a function that ends it. */
  onType<T extends TypeOf<M>>(
    type: T,
    handler: (message: OfType<M, T>, received: Received<M>) => unknown,
  ): () => void {
    return this.on("message", (received) => {
      const { data } = received;
      return isObject(data) && data["type"] === type ? handler(data as OfType<M, T>, received) : undefined;
    });
  }

  /** All messages from now on, until the connection is closed. A message counts as handled when the next one is asked for. */
  [Symbol.asyncIterator](): AsyncIterableIterator<Received<M>> {
    return iterate(
      (take) => this.on("message", take),
      (end) => this.on("state", ({ state }) => (state === "closed" ? end() : undefined)),
    );
  }

  /** Resolves when it is open, at once if it is; rejects when it is closed. */
  opened(): Promise<void> {
    return new Promise((resolve, reject) => {
      const check = ({ state, code, reason }: Partial<StateChange>): void => {
        if (state === "open") resolve();
        else if (state === "closed") reject(new Error(`The connection is closed: ${code} ${reason}`));
        else return;
        off();
      };
      const off = this.on("state", check);
      check({ state: this.#state, code: 1000, reason: "" });
    });
  }

  /**
   * Sends `message` as JSON; without a connection it is kept for the next one, up to `queueMax`. Throws where it cannot be sent
   * or kept. What was sent just before a connection broke may be lost.
   */
  send(message: unknown): void {
    this.sendRaw(JSON.stringify(message));
  }

  /** The same with JSON that is text or bytes already. */
  sendRaw(data: string | Uint8Array): void {
    if (this.#state === "closed") throw new Error("The connection is closed.");
    if (this.#state === "open") {
      if (this.#transport?.kind === "sse") throw new Error("Server-sent events only go downstream.");
      this.#transport?.send(data);
    } else if (this.#queue.length >= (this.#options.queueMax ?? 256)) {
      throw new Error("Too many messages wait for a connection.");
    } else {
      this.#queue.push(data);
    }
  }

  /** Connects at once: again after `closed`, without waiting in `waiting`, anew while open. */
  connect(): void {
    this.#attempt = 0;
    if (this.#state === "closed") this.#start();
    else this.#try();
  }

  /** Ends it, with a code that a browser may send (1000, 3000 to 4999). Messages that wait are dropped. */
  close(code = 1000, reason = ""): void {
    if (this.#state !== "closed") this.#finish({ code, reason, opened: true }, code, reason);
  }

  /** What opens the next connection. */
  protected abstract authorize(request: CredentialRequest): Promise<Grant>;

  /** Takes what the gateway itself says; false where `message` is no such thing. `id` is that beside the message. */
  protected notice(message: JsonObject, id: string | undefined): boolean {
    // What has an id of its own beside it was published by a worker, whatever its type.
    if (id && id !== message["event_id"] && id !== message["last_event_id"]) return false;
    // Empty, where there is no history.
    const eventId = text(message["event_id"]) || undefined;
    switch (message["type"]) {
      case "opened":
      case "connected":
        this.#connectionId = text(message["connection_id"]);
        this.#adopt(eventId);
        this.tell("connected", {
          connectionId: this.#connectionId,
          eventId,
          userId: text(message["user_id"]),
          expiresAt: number(message["expires_at"]),
        });
        return true;
      case "resumed":
        if (typeof message["count"] !== "number") return false;
        this.tell("resumed", { count: message["count"], lastEventId: text(message["last_event_id"]) });
        return true;
      case "bus_recovered":
        this.tell("busRecovered", { gapMs: number(message["gap_ms"]) ?? 0 });
        return true;
      case "error":
        if (message["code"] === "history_lost") {
          this.#position = eventId ?? "";
          const reason = text(message["reason"]) ?? "unknown";
          this.tell("historyLost", { reason, message: text(message["message"]) ?? reason, eventId });
          return true;
        }
        if (!isGatewayError(message)) return false;
        this.problem(String(message["code"]), text(message["message"]) ?? "");
        return true;
      default:
        return false;
    }
  }

  /** Takes a message that is no one's but the library's; it has been counted as received. */
  protected consume(_message: JsonObject, _eventId: string | undefined): boolean {
    return false;
  }

  /** All handlers have run: `ok` unless one of them threw, or there is none. */
  protected handled(_received: Received<M>, _ok: boolean): void {}

  /** A message came that came before. `ackId`: by what it is acknowledged. */
  protected duplicate(_ackId: string): void {}

  /** The transport is open no longer, or never was. */
  protected ended(): void {}

  /** Another session begins where this one was. */
  protected renewed(): void {}

  /** How long a healthy connection may be silent. */
  protected silence(): number | undefined {
    return undefined;
  }

  /** Something suggests that an open connection may be dead. */
  protected probe(what: Wake): void {
    // Nobody can ask a session's gateway anything. On another network the old connection never ends by itself, and with a
    // position nothing is lost by a new one.
    if (what === "online" && this.#position !== "") this.#try();
  }

  /** Lets the message at this position come again. */
  protected forget(position: string): void {
    this.#seen.delete(position);
  }

  /** Ends the present connection as if `end` had come from the other side. */
  protected give(end: End): void {
    this.#ended(this.#turn, end);
  }

  /** Waits for silence, anew at every look, since what is heard only writes down the time. */
  protected listen(): void {
    clearTimeout(this.#timers.silence);
    const silence = this.#silence();
    if (silence === undefined) return;
    const rest = this.#heardAt + silence - Date.now();
    if (rest <= 0) return this.give({ code: 1006, reason: "nothing heard", opened: true });
    this.#timers.silence = setTimeout(() => this.listen(), Math.min(rest, TIMEOUT_MAX));
  }

  /** Whether something came within the last `ms`. */
  protected heardWithin(ms: number): boolean {
    return Date.now() - this.#heardAt < ms;
  }

  /** Tells the handlers; what they throw harms nobody. */
  protected tell<K extends keyof ConnectionEvents<M>>(event: K, value: ConnectionEvents<M>[K]): void {
    this.emit(event, value)?.catch((cause: unknown) => this.#threw(cause, event === "error"));
  }

  /** Tells of something that went wrong. */
  protected problem(code: string, message: string, cause?: unknown): void {
    this.tell("error", { code, message, ...(cause === undefined ? {} : { cause }) });
  }

  get #socket(): WebSocketConstructor | undefined {
    return this.#options.WebSocket ?? (globalThis as { WebSocket?: WebSocketConstructor }).WebSocket;
  }

  #start(): void {
    this.#unwatch();
    this.#unwatch = watchWake((what) => {
      if (this.#state === "waiting") {
        if (what === "online") this.#attempt = 0;
        this.#try();
      } else if (this.#state === "open") {
        const silence = this.#silence();
        if (silence !== undefined && !this.heardWithin(silence)) this.#try();
        else this.probe(what);
      }
    });
    this.#try();
  }

  #try(): void {
    this.#leave();
    const turn = this.#turn;
    this.#to("connecting", {});
    // A handler may have closed it.
    if (turn !== this.#turn) return;
    const timeout = this.#options.connectTimeoutMs ?? 15_000;
    this.#timers.try = setTimeout(
      () => this.#ended(turn, { code: 1006, reason: "no connection in time", opened: false }),
      timeout,
    );
    void this.#open(turn);
  }

  async #open(turn: number): Promise<void> {
    let grant: Grant;
    try {
      grant = await this.authorize({ reason: this.#reason, signal: this.#abort.signal });
    } catch (cause) {
      if (turn !== this.#turn) return;
      this.problem("credentials", `No credentials: ${cause}`, cause);
      // The gateway has refused nothing: what is asked for next time is the same.
      return this.#ended(turn, { code: 1006, reason: "no credentials", opened: false, status: 0 });
    }
    if (turn !== this.#turn) return;
    if (grant.url.href !== this.#path) {
      if (this.#path !== "") this.#renew();
      this.#path = grant.url.href;
    }
    const url = new URL(grant.url);
    this.#asked = this.#position;
    if (this.#options.resume ?? true) url.searchParams.set("last_event_id", this.#asked);
    if (grant.eventStream && this.#options.transport === "websocket") {
      const reason = "The token opens event streams only.";
      this.problem("credentials", reason);
      return this.#ended(turn, { code: 1006, reason, opened: false, status: 0 });
    }
    const target = { url, token: grant.token, envelope: this.#options.envelope ?? true };
    this.#carry(turn, target, grant.eventStream ?? false);
  }

  #carry(turn: number, target: Target, eventStream: boolean): void {
    const events: TransportEvents = {
      opened: () => this.#opened(),
      frame: (frame) => this.#frame(frame),
      alive: () => void (this.#heardAt = Date.now()),
      position: (id) => this.#adopt(id),
      ended: (end) => this.#ended(turn, end),
    };
    const { sseTokenIn = "header" } = this.#options;
    const Socket = this.#socket;
    try {
      if (eventStream || this.#useSse() || !Socket) {
        const fetcher = this.#options.fetch ?? ((...a: Parameters<typeof fetch>) => fetch(...a));
        this.#transport = openSse(fetcher, target, sseTokenIn, events);
      } else {
        this.#transport = openWebSocket(Socket, target, events);
      }
    } catch (error) {
      // Such as an insecure URL in a secure page.
      this.#failures += 1;
      this.#ended(turn, { code: 1006, reason: String(error), opened: false });
    }
  }

  #useSse(): boolean {
    const { transport = "auto", sseAfter = 3 } = this.#options;
    return transport === "sse" || (transport === "auto" && (!this.#socket || this.#failures >= sseAfter));
  }

  #opened(): void {
    clearTimeout(this.#timers.try);
    this.#openedAt = this.#heardAt = Date.now();
    this.#hasHeard = false;
    this.#timers.stable = setTimeout(() => (this.#attempt = 0), this.#options.backoff?.stableMs ?? 10_000);
    this.listen();
    this.#reason = "reconnect";
    const queued = this.#queue.splice(0);
    if (this.#transport?.kind === "websocket") for (const data of queued) this.#transport.send(data);
    else if (queued.length > 0) this.problem("downstream_only", `${queued.length} messages cannot be sent.`);
    this.#to("open", {});
  }

  #silence(): number | undefined {
    const { silenceMs } = this.#options;
    return silenceMs ?? (this.#transport?.kind === "sse" ? SSE_SILENCE_MS : this.silence());
  }

  #frame({ body, id }: Frame): void {
    this.#heardAt = Date.now();
    this.#hasHeard = true;
    const data = parse(body);
    if (isObject(data) && this.notice(data, id)) return;
    const own = isObject(data) ? data["event_id"] : undefined;
    // Without positions beside messages, a JSON object has its own as a member. Any other value there is the application's.
    const eventId = id === undefined ? position(own) : id || undefined;
    if (eventId !== undefined) {
      if (this.#seen.has(eventId)) return this.duplicate(text(own) || eventId);
      this.#seen.add(eventId);
      // A message that is sent again because nobody acknowledged it must not take the position back. Any other that is behind is of
      // another life of the log.
      const isAsked = isObject(data) && data["ack"] === true;
      if (!isAsked || !isBehind(eventId, this.#position)) this.#position = eventId;
    }
    if (isObject(data) && this.consume(data, eventId)) return;

    const received: Received<M> = { data: data as M, eventId, raw: body };
    const heard = this.hears("message");
    const work = this.emit("message", received);
    // Nobody has handled it: where it is sent again, there may be somebody.
    if (!heard) return this.handled(received, false);
    if (!work) return this.handled(received, true);
    work.then(
      () => this.handled(received, true),
      (cause: unknown) => {
        this.handled(received, false);
        this.#threw(cause, false);
      },
    );
  }

  #adopt(position: string | undefined): void {
    // With something to resume, the present position is right only after what was missed.
    if (position && this.#asked === "" && this.#position === "") this.#position = position;
  }

  #renew(): void {
    this.#position = "";
    this.#seen.clear();
    this.renewed();
  }

  #ended(turn: number, end: End): void {
    if (turn !== this.#turn) return;
    // A gateway need not serve server-sent events, and what it says of them says nothing of the WebSocket that comes next.
    const isOffer = this.#transport?.kind === "sse" && (this.#options.transport ?? "auto") === "auto" && this.#socket;
    this.#count(end);
    const advice = isOffer && end.status && end.status !== 403 && advise(end) === "stop" ? "retry" : advise(end);
    if (advice === "stop") return this.#finish(end);
    if (advice === "credentials") this.#reason = end.status ? "rejected" : "expired";
    else if (end.opened) this.#reason = "reconnect";
    else if (end.status === undefined) this.#reason = "failed";
    this.#leave();

    const { baseMs = 500, maxMs = 30_000 } = this.#options.backoff ?? {};
    const random = this.#options.random ?? Math.random;
    let delayMs = fullJitter(this.#attempt, baseMs, maxMs, random);
    if (advice === "credentials" && this.#attempt === 0) delayMs = 0;
    if (advice === "slow") delayMs += end.retryAfterMs ?? SLOW_MS;
    this.#attempt += 1;
    this.#timers.try = setTimeout(() => this.#try(), Math.min(delayMs, TIMEOUT_MAX));
    this.#to("waiting", { ...told(end), delayMs });
  }

  /** Counts WebSockets that failed in a row, so that `auto` knows when to try something else. */
  #count(end: End): void {
    const { sseAfter = 3 } = this.#options;
    const lived = end.opened ? Date.now() - this.#openedAt : 0;
    if (this.#transport?.kind === "websocket") {
      // These answers come from the gateway: WebSockets get through.
      if ([401, 403, 429, 503].includes(end.status ?? 0)) return;
      const isBrief = end.code === 1006 && lived < BRIEF_MS && !this.#hasHeard;
      this.#failures = !end.opened || isBrief ? this.#failures + 1 : 0;
    } else if (this.#transport && (!end.opened || lived > SSE_STAY_MS)) {
      this.#failures = Math.min(this.#failures, sseAfter - 1);
    }
  }

  /** Everything of the present turn ends here. */
  #leave(code = 1000, reason = ""): void {
    this.#turn += 1;
    this.#abort.abort();
    this.#abort = new AbortController();
    for (const timer of Object.values(this.#timers)) clearTimeout(timer);
    this.#transport?.close(code, reason);
    this.#transport = undefined;
    this.#connectionId = undefined;
    this.ended();
  }

  #finish(end: End, code?: number, reason?: string): void {
    this.#unwatch();
    this.#leave(code, reason);
    this.#queue.length = 0;
    this.#reason = "initial";
    this.#to("closed", told(end));
  }

  #to(state: State, why: Partial<StateChange>): void {
    const previous = this.#state;
    this.#state = state;
    this.tell("state", { state, previous, attempt: this.#attempt, ...why });
  }

  #threw(cause: unknown, whileTelling: boolean): void {
    if (!whileTelling && this.hears("error")) this.problem("handler", `A handler threw: ${cause}`, cause);
    else console.error(cause);
  }
}

function told({ code, reason, status }: End): Partial<StateChange> {
  return { code, reason, ...(status ? { status } : {}) };
}

function isObject(value: unknown): value is JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value) && !(value instanceof Uint8Array);
}

function parse(body: string | Uint8Array): unknown {
  if (typeof body !== "string") return body;
  try {
    return JSON.parse(body);
  } catch {
    return body;
  }
}

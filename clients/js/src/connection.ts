// The rules that sessions and events share: one connection that comes back, resumes where it was, and delivers each message once.

import { advise, type End } from "./advice.ts";
import { fullJitter } from "./backoff.ts";
import type { ConnectionEvents, Grant, OfType, TypeOf } from "./contract.ts";
import { Emitter } from "./emitter.ts";
import { iterate } from "./iterate.ts";
import {
  isBehind,
  isObject,
  type JsonObject,
  parse,
  position,
  readNotice,
  type Received,
  type State,
  type StateChange,
  text,
} from "./messages.ts";
import type { ConnectionOptions, CredentialReason, CredentialRequest } from "./options.ts";
import type { Data } from "./outbox.ts";
import type { Address } from "./platform.ts";
import { Recent } from "./recent.ts";
import { type Opening, Spare } from "./spare.ts";
import { openSse } from "./sse.ts";
import type { Frame, Target, Transport, TransportEvents } from "./transport.ts";
import { Uplink } from "./uplink.ts";
import { AwakeClock, watchWake, type Wake } from "./wake.ts";
import { openWebSocket, type WebSocketConstructor } from "./websocket.ts";

/** A connection that ends sooner, without a message, may never have worked, as behind a proxy that accepts and then drops. */
const BRIEF_MS = 5_000;
/** After this long on server-sent events the next try is a WebSocket again. */
const SSE_STAY_MS = 60_000;
/** Server-sent events have a comment every 15 s. */
const SSE_SILENCE_MS = 40_000;
/** On server-sent events for want of a WebSocket, the pause before the first look for one, and the longest of all. */
const SEEK_MS = 5_000;
const SEEK_MAX_MS = 300_000;
/** Time to listen to a connection that may be dead before another one is opened, and the shortest time between two such checks. */
const DOUBT_MS = 3_000;
const DOUBT_PAUSE_MS = 60_000;
const SLOW_MS = 5_000;
const RETRY_AFTER_MAX_MS = 300_000;
const TIMEOUT_MAX = 2 ** 31 - 1;

type Timer = "try" | "stable" | "silence" | "seek" | "doubt";
type Kind = Transport["kind"];

/**
 * A connection that comes back by itself. It begins to connect as soon as the code that made it has returned, so that no
 * handler attached there misses anything.
 */
export abstract class Connection<M> extends Emitter<ConnectionEvents<M>> implements AsyncIterable<Received<M>> {
  /** Address of the endpoint, without credentials. */
  protected readonly base: string;
  readonly #options: ConnectionOptions;
  readonly #seen: Recent;
  readonly #clock: AwakeClock = new AwakeClock();
  readonly #uplink: Uplink;
  #unwatch: () => void = () => undefined;

  #state: State = "connecting";
  #position: string;
  #asked = "";
  #path = "";
  #connectionId: string | undefined;
  /** The reason of the end. */
  #end: Partial<StateChange> = {};
  #attempt = 0;
  #reason: CredentialReason = "initial";
  #failures = 0;
  #downSince = 0;
  /** The gateway asked for patience until then. */
  #notBefore = 0;

  // One try or open connection is one turn: what belongs to an earlier one is ignored.
  #turn = 0;
  #abort: AbortController = new AbortController();
  #transport: Transport | undefined;
  #isUp = false;
  #openedAt = 0;
  #heardAt = 0;
  #hasHeard = false;
  #timers: Partial<Record<Timer, ReturnType<typeof setTimeout> | undefined>> = {};

  // On server-sent events for want of a WebSocket, or with a connection that may be dead.
  readonly #spare: Spare = new Spare();
  #isFallback = false;
  #isBlocked = false;
  #seekMs = SEEK_MS;
  #soughtAt = 0;
  #doubtedAt = 0;

  /** Checks the options and begins to connect; what subclasses need must be there one microtask later. */
  constructor(options: ConnectionOptions & { url: Address }) {
    super();
    this.#options = options;
    const url = typeof options.url === "string" ? options.url : options.url.href;
    this.base = new URL(url, (globalThis as { location?: { href: string } }).location?.href).href;
    this.#position = options.lastEventId ?? "";
    this.#seen = new Recent(options.dedupMax ?? 2048);
    this.#uplink = new Uplink(options, this.#clock);
    if (options.transport !== "sse" && !this.#socket) {
      throw new Error(
        'This platform has no WebSocket: give one in the option WebSocket, such as that of the package ws, or only listen with transport: "sse".',
      );
    }
    options.signal?.addEventListener("abort", () => this.close());
    queueMicrotask(() => {
      if (options.signal?.aborted) this.close();
      if (this.#state === "connecting") this.#start();
    });
  }

  /** State of the connection. */
  get state(): State {
    return this.#state;
  }

  /** The transport of the open connection. */
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
      check({ ...this.#end, state: this.#state });
    });
  }

  /**
   * Sends `message` as JSON, in order, and no faster than `sendRate`; without a connection it waits for the next one. Throws where
   * it cannot be sent, or `queueMax` messages wait already. What a lost connection may not have delivered is sent again, so that a
   * worker may get it twice, unless `resend` is false.
   */
  send(message: unknown): void {
    this.sendRaw(JSON.stringify(message));
  }

  /** The same with JSON that is text or bytes already. */
  sendRaw(data: Data): void {
    if (this.#state === "closed") throw new Error("The connection is closed.");
    const refusal = this.#refusal();
    if (refusal !== undefined) throw new Error(refusal);
    this.#push(data);
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

  /** Sends `message` if it can be sent or kept. */
  protected offer(message: unknown): void {
    if (this.#state === "closed" || this.#refusal() !== undefined) return;
    this.#push(JSON.stringify(message));
  }

  /** Sends a message of this very connection before all others, if it is open. */
  protected sendNow(message: unknown): void {
    this.#uplink.sendNow(JSON.stringify(message));
  }

  /** Returns the address and the credential of the next connection. */
  protected abstract authorize(request: CredentialRequest): Promise<Grant>;

  /** Type of the gateway's first message, which names the connection. */
  protected abstract get greeting(): string;

  /** Takes a message of the gateway itself; false for any other. `id` is the position beside the message. */
  protected notice(message: JsonObject, id: string | undefined): boolean {
    const notice = readNotice(message, id, this.greeting);
    if (!notice) return false;
    if ("connected" in notice) {
      this.#connectionId = notice.connected.connectionId;
      this.#adopt(notice.connected.eventId);
    } else if ("historyLost" in notice) {
      this.#position = notice.historyLost.eventId ?? "";
    }
    for (const event of Object.keys(notice) as (keyof ConnectionEvents<M>)[]) {
      this.tell(event, (notice as Partial<ConnectionEvents<M>>)[event] as ConnectionEvents<M>[typeof event]);
    }
    return true;
  }

  /** Takes a message that is meant for the library only; it has been counted as received. */
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

  /** Longest silence of a healthy connection. */
  protected silence(): number | undefined {
    return undefined;
  }

  /** Something suggests that an open connection may be dead. */
  protected probe(what: Wake): void {
    // A session's gateway answers no question, but with a position nothing is lost by a new connection. On another network the
    // old one never ends by itself. Elsewhere it may well live: it is left only when another one is open.
    if (what === "online" && this.#position !== "") this.#try();
    // After a sleep the gateway has given up the old one, so that nothing is lost without a position either.
    else if (what === "slept" || (what === "visible" && this.#position !== "")) this.#doubt();
  }

  /** Lets the message at this position come again. */
  protected forget(position: string): void {
    this.#seen.delete(position);
  }

  /** Gives the present connection up: the other side says nothing any more. */
  protected give(reason: string): void {
    this.#ended(this.#turn, { code: 1006, reason, opened: true }, true);
  }

  /** Ends it, if the function that gives credentials has said that none will come. */
  protected gaveUp(cause: unknown): boolean {
    if (!(cause instanceof Error) || cause.name !== "GiveUp") return false;
    this.#finish({ code: 1006, reason: cause.message || "The application gave up.", opened: false });
    return true;
  }

  /** Waits for silence, anew at every look, since what is heard only writes down the time. */
  protected listen(): void {
    clearTimeout(this.#timers.silence);
    const silence = this.#silence();
    if (silence === undefined) return;
    const rest = this.#heardAt + silence - Date.now();
    if (rest <= 0) return this.give("nothing heard");
    this.#timers.silence = setTimeout(() => this.listen(), Math.min(rest, TIMEOUT_MAX));
  }

  /** True where a message or a frame came within the last `ms`. */
  protected heardWithin(ms: number): boolean {
    return Date.now() - this.#heardAt < ms;
  }

  /** Calls the handlers. An exception of one does not keep the event from the others. */
  protected tell<K extends keyof ConnectionEvents<M>>(event: K, value: ConnectionEvents<M>[K]): void {
    this.emit(event, value)?.catch((cause: unknown) => this.#threw(cause, event === "error"));
  }

  /** Reports an error that ends nothing. */
  protected problem(code: string, message: string, cause?: unknown): void {
    this.tell("error", { code, message, ...(cause === undefined ? {} : { cause }) });
  }

  get #random(): () => number {
    return this.#options.random ?? Math.random;
  }

  get #socket(): WebSocketConstructor | undefined {
    return this.#options.WebSocket ?? (globalThis as { WebSocket?: WebSocketConstructor }).WebSocket;
  }

  #start(): void {
    this.#unwatch();
    this.#unwatch = watchWake(this.#clock, (what) => this.#woke(what));
    this.#downSince = Date.now();
    this.#try();
  }

  #woke(what: Wake): void {
    if (what === "online") {
      // Failures on one network say nothing of another.
      this.#attempt = 0;
      this.#isBlocked = false;
      this.#seekMs = SEEK_MS;
    }
    if (this.#state === "waiting" && Date.now() >= this.#notBefore) this.#try();
    if (this.#state !== "open") return;
    const silence = this.#silence();
    if (silence !== undefined && !this.heardWithin(silence)) this.#try();
    else this.probe(what);
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
      if (turn !== this.#turn || this.gaveUp(cause)) return;
      this.problem("credentials", `No credentials: ${cause}`, cause);
      // The gateway has refused nothing: what is asked for next time is the same.
      return this.#ended(turn, { code: 1006, reason: "no credentials", opened: false, status: 0 });
    }
    if (turn !== this.#turn) return;
    if (grant.url !== this.#path) {
      if (this.#path !== "") this.#renew();
      this.#path = grant.url;
    }
    const { transport = "auto" } = this.#options;
    if (grant.eventStream && transport === "websocket") {
      const reason = "The token opens event streams only.";
      this.problem("credentials", reason);
      return this.#ended(turn, { code: 1006, reason, opened: false, status: 0 });
    }
    const isSse = grant.eventStream || this.#useSse();
    this.#isFallback = isSse && !grant.eventStream && transport === "auto";
    this.#asked = this.#position;
    try {
      this.#transport = this.#connect(isSse ? "sse" : "websocket", grant, {
        opened: (ms) => this.#opened(ms),
        ended: (end) => this.#ended(turn, end),
      });
    } catch (error) {
      // For example, an insecure URL in a secure page.
      this.#failures += 1;
      this.#ended(turn, { code: 1006, reason: String(error), opened: false });
    }
  }

  /** Opens a transport that resumes from the present position. */
  #connect(kind: Kind, grant: Grant, tell: Opening): Transport {
    const url = new URL(grant.url);
    if (this.#options.resume ?? true) url.searchParams.set("last_event_id", this.#position);
    const target: Target = { url: url.href, token: grant.token, envelope: this.#options.envelope ?? true };
    const since = Date.now();
    const events: TransportEvents = {
      opened: () => tell.opened(Date.now() - since),
      frame: (frame) => this.#frame(frame),
      alive: () => this.#heard(),
      position: (id) => this.#adopt(id),
      ended: tell.ended,
    };
    const Socket = this.#socket;
    if (kind === "websocket" && Socket) return openWebSocket(Socket, target, events);
    const fetcher = this.#options.fetch ?? ((...a: Parameters<typeof fetch>) => fetch(...a));
    return openSse(fetcher, target, this.#options.sseTokenIn ?? "header", events);
  }

  #useSse(): boolean {
    const { transport = "auto", sseAfter = 3 } = this.#options;
    return transport === "sse" || (transport === "auto" && this.#failures >= sseAfter);
  }

  #opened(handshakeMs: number): void {
    clearTimeout(this.#timers.try);
    this.#isUp = true;
    this.#openedAt = this.#heardAt = Date.now();
    this.#hasHeard = false;
    this.#timers.stable = setTimeout(() => (this.#attempt = 0), this.#options.backoff?.stableMs ?? 10_000);
    this.listen();
    this.#reason = "reconnect";
    const { size } = this.#uplink;
    if (this.#transport?.kind === "websocket") {
      this.#uplink.opened(this.#transport, handshakeMs);
    } else if (this.#isFallback) {
      this.#seek();
    } else if (size > 0) {
      this.#uplink.clear();
      this.problem("downstream_only", `${size} messages cannot be sent.`);
    }
    this.#to("open", {});
  }

  /** The reason for which a message can be neither sent nor kept now. */
  #refusal(): string | undefined {
    const { transport } = this.#options;
    const isSse = this.#isUp && this.#transport?.kind === "sse";
    if (transport === "sse" || (isSse && !this.#isFallback)) return "Server-sent events only go downstream.";
    if (isSse && this.#isBlocked) {
      if (Date.now() - this.#soughtAt > SEEK_MS) this.#seek(0);
      return "Server-sent events only go downstream, and no WebSocket gets through.";
    }
    return this.#uplink.isFull ? "Too many messages wait for a connection, or for their turn." : undefined;
  }

  #push(data: Data): void {
    this.#uplink.push(data);
    if (this.#isUp && this.#transport?.kind === "sse") this.#seek();
  }

  /** On server-sent events for want of a WebSocket: looks for one at growing intervals, at once where something waits for it. */
  #seek(wait?: number): void {
    clearTimeout(this.#timers.seek);
    const isUrgent = this.#uplink.size > 0 && !this.#isBlocked;
    const usual = this.#seekMs * (0.5 + this.#random() / 2);
    const look = (): void => {
      if (this.#spare.isOpening) return this.#seek(SEEK_MS);
      this.#seekMs = Math.min(this.#seekMs * 2, SEEK_MAX_MS);
      this.#beside("websocket", () => this.#foundNone());
    };
    this.#timers.seek = setTimeout(look, wait ?? (isUrgent ? 0 : usual));
  }

  #foundNone(): void {
    this.#isBlocked = true;
    this.#soughtAt = Date.now();
    const { size } = this.#uplink;
    if (size > 0) this.problem("downstream_only", `${size} messages wait for a WebSocket, and none gets through.`);
    this.#seek();
  }

  /** The present connection may be dead: if it stays silent, another one is opened beside it. */
  #doubt(): void {
    if (Date.now() - this.#doubtedAt < DOUBT_PAUSE_MS) return;
    const since = Date.now();
    clearTimeout(this.#timers.doubt);
    this.#timers.doubt = setTimeout(() => {
      if (this.#heardAt > since || !this.#transport) return;
      this.#doubtedAt = Date.now();
      this.#beside(this.#transport.kind, () => {
        if (this.#heardAt <= since) this.give("nothing heard");
      });
    }, DOUBT_MS);
  }

  /** Opens a further connection, which takes over as soon as it is open; else calls `failed`, and the present one goes on. */
  #beside(kind: Kind, failed: () => void): void {
    const turn = this.#turn;
    let asked = "";
    void this.#spare.open({
      timeoutMs: this.#options.connectTimeoutMs ?? 15_000,
      prepare: async () => {
        const grant = await this.authorize({ reason: "reconnect", signal: this.#abort.signal }).catch((cause: unknown) => {
          if (turn === this.#turn) this.gaveUp(cause);
        });
        if (grant?.url !== this.#path || (grant.eventStream && kind === "websocket")) return undefined;
        asked = this.#position;
        return (opening) => this.#connect(kind, grant, opening);
      },
      opened: (transport, handshakeMs) => {
        this.#part();
        this.#transport = transport;
        this.#asked = asked;
        this.#opened(handshakeMs);
      },
      failed,
      ended: (end) => this.#ended(turn, end),
    });
  }

  #silence(): number | undefined {
    const { silenceMs } = this.#options;
    return silenceMs ?? (this.#transport?.kind === "sse" ? SSE_SILENCE_MS : this.silence());
  }

  #heard(): void {
    this.#heardAt = Date.now();
    this.#uplink.heard();
  }

  #frame({ body, id }: Frame): void {
    this.#heard();
    this.#hasHeard = true;
    const data = parse(body);
    if (isObject(data) && this.notice(data, id)) return;
    const own = isObject(data) ? data["event_id"] : undefined;
    // Without positions beside messages, a JSON object has its own as a member. Any other value there is the application's.
    const eventId = id === undefined ? position(own) : id || undefined;
    if (eventId !== undefined) {
      if (this.#seen.has(eventId)) return this.duplicate(text(own) || eventId);
      this.#seen.add(eventId);
      // A message that is repeated for want of an acknowledgement must not take the position back. Any other that is behind is of
      // another life of the log.
      const isAsked = isObject(data) && data["ack"] === true;
      if (!isAsked || !isBehind(eventId, this.#position)) this.#position = eventId;
    }
    if (isObject(data) && this.consume(data, eventId)) return;

    const received: Received<M> = { data: data as M, eventId, raw: body };
    const heard = this.hears("message");
    const work = this.emit("message", received);
    // No handler took it. Where the message is sent again, there may be one.
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

  #ended(turn: number, end: End, isGivenUp = false): void {
    if (turn !== this.#turn) return;
    // A gateway need not serve server-sent events, and what it says of them says nothing of the WebSocket that comes next.
    const isOffer = this.#transport?.kind === "sse" && this.#isFallback;
    this.#count(end);
    const advice = isOffer && end.status && end.status !== 403 && advise(end) === "final" ? "retry" : advise(end);
    if (advice === "final") return this.#finish(end);
    if (advice === "credentials") this.#reason = end.status ? "rejected" : "expired";
    else if (end.opened) this.#reason = "reconnect";
    else if (end.status === undefined) this.#reason = "failed";
    if (!isGivenUp) this.#uplink.lost(end);
    this.#leave();
    const { giveUpAfterMs = Infinity } = this.#options;
    const left = this.#downSince + giveUpAfterMs - Date.now();
    if (left <= 0) return this.#finish({ ...end, reason: `There was no connection for ${giveUpAfterMs} ms.` });

    const { baseMs = 500, maxMs = 30_000 } = this.#options.backoff ?? {};
    let delayMs = fullJitter(this.#attempt, baseMs, maxMs, this.#random);
    if (advice === "credentials" && this.#attempt === 0) delayMs = 0;
    const retryAfterMs = Math.min(end.retryAfterMs ?? 0, RETRY_AFTER_MAX_MS);
    this.#notBefore = Date.now() + retryAfterMs;
    delayMs += retryAfterMs || (advice === "slow" ? SLOW_MS : 0);
    this.#attempt += 1;
    this.#timers.try = setTimeout(() => this.#try(), Math.min(delayMs, left, TIMEOUT_MAX));
    this.#to("waiting", { ...told(end), delayMs });
  }

  /** Counts WebSockets that failed in a row, so that `auto` knows when to try something else. */
  #count(end: End): void {
    const { sseAfter = 3 } = this.#options;
    const lived = end.opened ? Date.now() - this.#openedAt : 0;
    if (this.#transport?.kind === "websocket") {
      // Only the gateway gives these answers: WebSockets get through.
      if ([401, 403, 429, 503].includes(end.status ?? 0)) return;
      const isBrief = end.code === 1006 && lived < BRIEF_MS && !this.#hasHeard;
      this.#failures = !end.opened || isBrief ? this.#failures + 1 : 0;
      // One that opens and breaks gets through no better than one that is refused.
      this.#isBlocked = end.opened && isBrief && this.#failures >= sseAfter;
      if (this.#failures === 0) this.#seekMs = SEEK_MS;
    } else if (this.#transport && (!end.opened || lived > SSE_STAY_MS)) {
      this.#failures = Math.min(this.#failures, sseAfter - 1);
    }
  }

  /** Everything of the present turn ends here. */
  #leave(code = 1000, reason = ""): void {
    this.#turn += 1;
    this.#abort.abort();
    this.#abort = new AbortController();
    this.#spare.drop();
    this.#part(code, reason);
  }

  /** Leaves the present transport. */
  #part(code = 1000, reason = ""): void {
    for (const timer of Object.values(this.#timers)) clearTimeout(timer);
    if (this.#isUp) this.#downSince = Date.now();
    if (this.#isUp && this.#transport?.kind === "websocket") this.#uplink.leave(code, reason);
    this.#transport?.close(code, reason);
    this.#transport = undefined;
    this.#isUp = false;
    this.#connectionId = undefined;
    this.ended();
  }

  #finish(end: End, code?: number, reason?: string): void {
    this.#unwatch();
    this.#uplink.clear();
    this.#leave(code, reason);
    this.#reason = "initial";
    this.#end = told(end);
    this.#to("closed", this.#end);
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

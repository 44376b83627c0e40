// The events endpoint: JWTs that are refreshed in place, a heartbeat in JSON, acknowledgements.

import { Connection } from "./connection.ts";
import type { Grant } from "./contract.ts";
import { type JsonObject, number, type Received, text } from "./messages.ts";
import type { ConnectionOptions, CredentialRequest } from "./options.ts";
import type { Address } from "./platform.ts";
import { Recent } from "./recent.ts";
import type { Wake } from "./wake.ts";

/** Types of messages by name, such as `{ task_status_update: { task_id: string; status: string } }`. */
export type EventMap = Record<string, unknown>;

/** A message of the events endpoint. */
export type EventMessage<T extends EventMap> = {
  [K in keyof T & string]: {
    /** Type of the message. */
    type: K;
    /** Id of the message: that of the worker, else the position in the history. */
    event_id: string;
    /** Time of publishing. */
    timestamp: string;
    /** Content of the message. */
    data: T[K];
    /** True where the worker wants an acknowledgement. */
    ack?: boolean;
  };
}[keyof T & string];

/** Options of a connection to the events of a user. */
export interface EventsOptions extends ConnectionOptions {
  /** The endpoint, such as `https://gateway.example/ws`. */
  url: Address;
  /**
   * Gets the user's JWT. It is called again before the token expires, after it was refused, and where a handshake failed without
   * saying why; not at every reconnect. Throw a `GiveUp` where there will be none any more; anything else that is thrown is tried
   * again.
   */
  getToken: (request: CredentialRequest) => string | Promise<string>;
  /** Acknowledges messages when all handlers have run, and not where one threw. Default true; else call `ack`. */
  autoAck?: boolean;
  /** Time before the expiry at which a token is refreshed; at most half of its life is left unused. Default 60 s. */
  refreshBeforeMs?: number;
}

const PROBE_MS = 5_000;
/** An unexplained failure is seldom the token's fault: the function that gives tokens is not called after each of them. */
const TOKEN_AGE_MS = 30_000;
const TOKEN_MARGIN_MS = 10_000;
const REFRESH_RETRY_MS = 10_000;
/** No token is asked for more often than this while a connection is open, however soon they expire. */
const REFRESH_PAUSE_MS = 5_000;
const TIMEOUT_MAX = 2 ** 31 - 1;

/** A user's events: each delivered once to the handlers, over any number of connections. */
export class Events<T extends EventMap = EventMap> extends Connection<EventMessage<T>> {
  readonly #options: EventsOptions;
  readonly #acked: Recent;
  #token: { value: string; since: number; expiresAt: number } | undefined;
  #refresh: { token: string; asked: number } | undefined;
  #refreshedAt = 0;
  #intervalMs = 30_000;
  /** Lead of the gateway's clock over the local one. */
  #ahead = 0;
  #refreshTimer: ReturnType<typeof setTimeout> | undefined;
  #probeTimer: ReturnType<typeof setTimeout> | undefined;
  /** Number of own pings without an answer. */
  #pings = 0;
  #turn = 0;

  /** Begins to connect; see {@link connectEvents}. */
  constructor(options: EventsOptions) {
    super(options);
    this.#options = options;
    this.#acked = new Recent(options.dedupMax ?? 2048);
  }

  /** Acknowledges the message with this `event_id`; only needed with `autoAck: false`. */
  ack(eventId: string): void {
    this.#acked.add(eventId);
    // Over server-sent events nothing can be acknowledged; the message comes again over the next WebSocket, or not at all. So does
    // one whose acknowledgement finds no room.
    if (this.transport !== "sse") this.offer({ type: "ack", event_id: eventId });
  }

  protected override async authorize(request: CredentialRequest): Promise<Grant> {
    const { reason } = request;
    const now = Date.now();
    const token = this.#token;
    const usable =
      token !== undefined &&
      (reason === "reconnect" || (reason === "failed" && now - token.since < TOKEN_AGE_MS)) &&
      token.expiresAt > now + TOKEN_MARGIN_MS;
    if (usable) return { url: this.base, token: token.value };
    const value = await this.#ask(request);
    this.#token = { value, since: Date.now(), expiresAt: Infinity };
    return { url: this.base, token: value };
  }

  protected override get greeting(): string {
    return "connected";
  }

  protected override notice(message: JsonObject, id: string | undefined): boolean {
    // Whatever comes is an answer.
    clearTimeout(this.#probeTimer);
    // An event of the application's may have a type of ours. What the gateway says itself has no data, and in these cases no id.
    if ("data" in message) return false;
    const isBare = !id && !("event_id" in message);
    switch (message["type"]) {
      case "ping":
        if (!isBare) return false;
        this.#clock(message);
        this.sendNow({ type: "pong" });
        return true;
      case "pong":
        if (!isBare || this.#pings === 0) return false;
        this.#pings -= 1;
        return true;
      case "refreshed":
        return isBare && this.#tookRefresh(message);
      case "error":
        if (isBare && message["code"] === "invalid_token" && this.#refresh) {
          this.#refresh = undefined;
          this.#refreshIn(REFRESH_RETRY_MS);
        }
    }
    if (!super.notice(message, id)) return false;
    if (message["type"] === "connected") this.#greeted(message);
    return true;
  }

  protected override consume(message: JsonObject, eventId: string | undefined): boolean {
    // The envelope keeps the position out of the message; here it is the id of one that has none.
    if (eventId !== undefined) message["event_id"] ??= eventId;
    return false;
  }

  protected override handled({ eventId, data }: Received<EventMessage<T>>, ok: boolean): void {
    if ((data as { ack?: unknown } | null)?.ack !== true) return;
    const ackId = text(data.event_id) || eventId;
    // A message that could not be handled may come again.
    if (!ok && eventId) this.forget(eventId);
    if (ok && ackId && (this.#options.autoAck ?? true)) this.ack(ackId);
  }

  protected override duplicate(ackId: string): void {
    // The acknowledgement was lost, or is on its way.
    if (this.#acked.has(ackId)) this.ack(ackId);
  }

  protected override ended(): void {
    this.#turn += 1;
    this.#refresh = undefined;
    this.#pings = 0;
    clearTimeout(this.#refreshTimer);
    clearTimeout(this.#probeTimer);
  }

  protected override silence(): number {
    return this.#intervalMs * 2 + PROBE_MS;
  }

  protected override probe(what: Wake): void {
    if (this.transport !== "websocket") return super.probe(what);
    clearTimeout(this.#probeTimer);
    this.#pings += 1;
    this.sendNow({ type: "ping" });
    this.#probeTimer = setTimeout(() => this.give("no answer to a ping"), PROBE_MS);
  }

  #greeted(message: JsonObject): void {
    this.#clock(message);
    const { interval } = (message["heartbeat"] ?? {}) as { interval?: number };
    if (interval) this.#intervalMs = interval * 1000;
    this.listen();
    this.#expires(number(message["expires_at"]));
  }

  #tookRefresh(message: JsonObject): boolean {
    if (!this.#refresh) return false;
    const expiresAt = number(message["expires_at"]);
    this.#token = { value: this.#refresh.token, since: this.#refresh.asked, expiresAt: Infinity };
    this.#refresh = undefined;
    this.#expires(expiresAt);
    this.tell("refreshed", { expiresAt });
    return true;
  }

  async #ask(request: CredentialRequest): Promise<string> {
    const token = (await this.#options.getToken(request)) as unknown;
    if (typeof token !== "string" || token === "") throw new Error("getToken gave no token.");
    return token;
  }

  /** Learns the gateway's clock, since the expiry is told in its time. */
  #clock({ timestamp }: JsonObject): void {
    const theirs = typeof timestamp === "number" ? timestamp * (timestamp < 1e11 ? 1000 : 1) : Date.parse(text(timestamp) ?? "");
    if (theirs > 0) this.#ahead = theirs - Date.now();
  }

  #expires(expiresAt: number | undefined): void {
    if (!this.#token || expiresAt === undefined) return;
    const left = expiresAt * 1000 - this.#ahead - Date.now();
    // An unknown clock may be hours off; then what is left says nothing, and the gateway will close when it is time.
    if (left <= 0) return;
    this.#token.expiresAt = Date.now() + left;
    this.#refreshIn(Math.max(left - (this.#options.refreshBeforeMs ?? 60_000), left / 2));
  }

  #refreshIn(ms: number): void {
    clearTimeout(this.#refreshTimer);
    // Server-sent events cannot carry a new token: the gateway ends them with 4401 when it is time.
    if (this.transport !== "websocket") return;
    const soonest = this.#refreshedAt + REFRESH_PAUSE_MS - Date.now();
    this.#refreshTimer = setTimeout(() => void this.#renewToken(), Math.min(Math.max(ms, soonest), TIMEOUT_MAX));
  }

  async #renewToken(): Promise<void> {
    const turn = this.#turn;
    try {
      const asked = Date.now();
      this.#refreshedAt = asked;
      const token = await this.#ask({ reason: "refresh", signal: AbortSignal.timeout(30_000) });
      if (turn !== this.#turn) return;
      this.#refresh = { token, asked };
      this.sendNow({ type: "refresh", token });
    } catch (cause) {
      if (turn !== this.#turn || this.gaveUp(cause)) return;
      this.problem("refresh", `No fresh token: ${cause}`, cause);
      this.#refreshIn(REFRESH_RETRY_MS);
    }
  }
}

/**
 * Connects to the events of the user whose token `getToken` gives. `T` names the types of messages and their `data`.
 *
 * ```ts
 * const events = connectEvents<{ task_status_update: { task_id: string; status: string } }>({
 *   url: "https://gateway.example/ws",
 *   getToken: async () => (await fetch("/token", { method: "POST" })).text(),
 * });
 * events.onType("task_status_update", ({ data }) => show(data.task_id, data.status));
 * events.on("historyLost", () => reloadEverything());
 * ```
 */
export function connectEvents<T extends EventMap = EventMap>(options: EventsOptions): Events<T> {
  return new Events<T>(options);
}

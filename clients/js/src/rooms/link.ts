// One connection to a room that comes back by itself. Knows when to connect, when to wait and when to stop, and nothing of what is said.

import { advise, type End } from "../advice.ts";
import { type BackoffOptions, fullJitter } from "../backoff.ts";
import type { State, StateChange } from "../messages.ts";
import type { CredentialReason, CredentialRequest } from "../options.ts";
import { whenRefused } from "../refused.ts";
import type { Transport } from "../transport.ts";
import { AwakeClock, watchWake, type Wake } from "../wake.ts";
import { openWebSocket, type WebSocketConstructor } from "../websocket.ts";

/** Options of a link. */
export interface LinkOptions {
  /** Pauses between attempts. */
  backoff?: BackoffOptions;
  /** Ends it for good when there was no connection for so long. Default: never. */
  giveUpAfterMs?: number;
  /** After this time a try has failed. Default 15 s. */
  connectTimeoutMs?: number;
  /** The WebSocket to use. Default: the global one, which Node has since version 22; before it, give that of the package `ws`. */
  WebSocket?: WebSocketConstructor;
  /** A source of numbers in [0, 1). Default `Math.random`. */
  random?: () => number;
}

/** The user of a link. */
export interface LinkHost {
  /** True where the credential is always the same, so that a refused one ends the link. */
  readonly isFixed: boolean;
  /** Returns the address of the next connection, and the credential; throws where there is none. */
  authorize(request: CredentialRequest): Promise<{ url: string; token: string }>;
  /** The WebSocket is open: the first message may be sent. */
  opened(transport: Transport): void;
  /** A message came. */
  frame(body: string | Uint8Array): void;
  /** The connection is lost, for whatever reason. */
  lost(end: End | undefined): void;
  /** The state has changed. */
  changed(change: StateChange): void;
  /** Something went wrong that ends nothing. */
  problem(code: string, message: string, cause?: unknown): void;
}

type Timer = "try" | "stable" | "silence" | "probe";

/** Close code with which this side leaves a connection to come back: any other one than 1000 and 1001, after which the gateway says that the member has left. */
const RECONNECTING = 4000;
const SLOW_MS = 5_000;
const RETRY_AFTER_MAX_MS = 300_000;
const TIMEOUT_MAX = 2 ** 31 - 1;
/** After so long a silence the gateway is asked for a sign of life, and has this time for it. */
const SILENCE_MS = 25_000;
const PROBE_MS = 5_000;
/** The question, which the gateway answers with the same. */
const PING = '{"type":255}';

/** See the head of this file. It is `closed` until `connect`. */
export class Link {
  readonly #options: LinkOptions;
  readonly #host: LinkHost;
  readonly #Socket: WebSocketConstructor;
  readonly #clock: AwakeClock = new AwakeClock();
  #unwatch: () => void = () => undefined;
  #state: State = "closed";
  /** One try or open connection is one turn: what belongs to an earlier one is ignored. */
  #turn = 0;
  #abort: AbortController = new AbortController();
  #transport: Transport | undefined;
  #attempt = 0;
  #reason: CredentialReason = "initial";
  #downSince = 0;
  /** The gateway asked for patience until then. */
  #notBefore = 0;
  #heardAt = 0;
  #timers: Partial<Record<Timer, ReturnType<typeof setTimeout> | undefined>> = {};

  constructor(options: LinkOptions, host: LinkHost) {
    this.#options = options;
    this.#host = host;
    const Socket = options.WebSocket ?? (globalThis as { WebSocket?: WebSocketConstructor }).WebSocket;
    if (!Socket) throw new Error("This platform has no WebSocket: give one in the option WebSocket, such as that of the package ws.");
    this.#Socket = Socket;
  }

  /** State of the connection. */
  get state(): State {
    return this.#state;
  }

  /** Connects at once: begins anew where it is closed, and leaves the present connection where there is one. */
  connect(): void {
    this.#attempt = 0;
    if (this.#state === "closed") {
      this.#unwatch();
      this.#unwatch = watchWake(this.#clock, (what) => this.#woke(what));
      this.#downSince = Date.now();
    }
    this.#try();
  }

  /** The other side has said all that a connection begins with. */
  ready(): void {
    clearTimeout(this.#timers.try);
    this.#timers.stable = setTimeout(() => (this.#attempt = 0), this.#options.backoff?.stableMs ?? 10_000);
    this.#reason = "reconnect";
    this.#listen();
    this.#to("open", {});
  }

  /** Ends it for good. */
  close(code: number, reason: string): void {
    if (this.#state !== "closed") this.#finish({ code, reason, opened: true }, code);
  }

  #try(): void {
    this.#leave(undefined);
    const turn = this.#turn;
    this.#to("connecting", {});
    // A handler may have closed it.
    if (turn !== this.#turn) return;
    const timeout = this.#options.connectTimeoutMs ?? 15_000;
    this.#timers.try = setTimeout(() => this.#ended(turn, { code: 1006, reason: "no connection in time", opened: false }), timeout);
    void this.#open(turn);
  }

  async #open(turn: number): Promise<void> {
    let grant: { url: string; token: string };
    try {
      grant = await this.#host.authorize({ reason: this.#reason, signal: this.#abort.signal });
    } catch (cause) {
      if (turn !== this.#turn || this.gaveUp(cause)) return;
      this.#host.problem("credentials", `No credentials: ${cause}`, cause);
      // The gateway has refused nothing: what is asked for next time is the same.
      return this.#ended(turn, { code: 1006, reason: "no credentials", opened: false, status: 0 });
    }
    if (turn !== this.#turn) return;
    try {
      const transport = openWebSocket(this.#Socket, { ...grant, envelope: false, whenRefused }, {
        opened: () => this.#host.opened(transport),
        frame: ({ body }) => {
          this.#heardAt = Date.now();
          this.#host.frame(body);
        },
        alive: () => undefined,
        position: () => undefined,
        ended: (end) => this.#ended(turn, end),
      });
      this.#transport = transport;
    } catch (error) {
      // For example, an insecure URL in a secure page.
      this.#ended(turn, { code: 1006, reason: String(error), opened: false });
    }
  }

  /** Ends it, if `cause` is the word of the application that there will be no token. */
  gaveUp(cause: unknown): boolean {
    if (!(cause instanceof Error) || cause.name !== "GiveUp") return false;
    this.#finish({ code: 1006, reason: cause.message || "The application gave up.", opened: false });
    return true;
  }

  /** Waits for silence, and asks then. */
  #listen(): void {
    clearTimeout(this.#timers.silence);
    const rest = Math.min(this.#heardAt + SILENCE_MS - Date.now(), SILENCE_MS);
    if (rest <= 0) return this.#probe();
    this.#timers.silence = setTimeout(() => this.#listen(), rest);
  }

  /** Asks for a sign of life. Without any the connection is dead. */
  #probe(): void {
    const [turn, since] = [this.#turn, Date.now()];
    clearTimeout(this.#timers.probe);
    this.#transport?.send(PING);
    this.#timers.probe = setTimeout(() => {
      if (this.#heardAt >= since) this.#listen();
      else this.#ended(turn, { code: 1006, reason: "nothing heard", opened: true });
    }, PROBE_MS);
  }

  #woke(what: Wake): void {
    // Failures on one network say nothing of another.
    if (what === "online") this.#attempt = 0;
    if (this.#state === "waiting" && Date.now() >= this.#notBefore) this.#try();
    else if (this.#state === "open") this.#probe();
  }

  #ended(turn: number, end: End): void {
    if (turn !== this.#turn) return;
    const advice = advise(end);
    if (advice === "final" || (advice === "credentials" && this.#host.isFixed)) return this.#finish(end);
    if (advice === "credentials") this.#reason = end.status ? "rejected" : "expired";
    else if (end.opened) this.#reason = "reconnect";
    else if (end.status === undefined) this.#reason = "failed";
    this.#leave(end);
    const { giveUpAfterMs = Infinity, random = Math.random } = this.#options;
    const left = this.#downSince + giveUpAfterMs - Date.now();
    if (left <= 0) return this.#finish({ ...end, reason: `There was no connection for ${giveUpAfterMs} ms.` });
    const { baseMs = 500, maxMs = 30_000 } = this.#options.backoff ?? {};
    const jitterMs = advice === "credentials" && this.#attempt === 0 ? 0 : fullJitter(this.#attempt, baseMs, maxMs, random);
    const retryAfterMs = Math.min(end.retryAfterMs ?? 0, RETRY_AFTER_MAX_MS);
    const delayMs = jitterMs + (retryAfterMs || (advice === "slow" ? SLOW_MS : 0));
    this.#notBefore = Date.now() + retryAfterMs;
    this.#attempt += 1;
    this.#timers.try = setTimeout(() => this.#try(), Math.min(delayMs, left, TIMEOUT_MAX));
    this.#to("waiting", { ...told(end), delayMs });
  }

  /** Everything of the present turn ends here. */
  #leave(end: End | undefined, code = RECONNECTING): void {
    this.#turn += 1;
    this.#abort.abort();
    this.#abort = new AbortController();
    for (const timer of Object.values(this.#timers)) clearTimeout(timer);
    this.#timers = {};
    if (this.#state === "open") this.#downSince = Date.now();
    const transport = this.#transport;
    this.#transport = undefined;
    transport?.close(code, code === RECONNECTING ? "reconnecting" : (end?.reason ?? ""));
    if (transport) this.#host.lost(end);
  }

  #finish(end: End, code?: number): void {
    this.#unwatch();
    this.#leave(end, code);
    this.#reason = "initial";
    this.#to("closed", told(end));
  }

  #to(state: State, why: Partial<StateChange>): void {
    const previous = this.#state;
    this.#state = state;
    this.#host.changed({ state, previous, attempt: this.#attempt, ...why });
  }
}

function told({ code, reason, status }: End): Partial<StateChange> {
  return { code, reason, ...(status ? { status } : {}) };
}

// Replaces the token of an open connection before it expires, so that the gateway need not end it.

import type { Transport } from "../transport.ts";
import type { Token } from "./token.ts";

/** The user of a refresh. */
export interface RefreshHost {
  /** There is no fresh token: `cause` was thrown. */
  failed(cause: unknown): void;
  /** A fresh token is in use. */
  done(): void;
}

const RETRY_MS = 10_000;
/** No token is asked for more often than this while a connection is open, however soon they expire. */
const PAUSE_MS = 5_000;
const TIMEOUT_MAX = 2 ** 31 - 1;

/** See the head of this file. */
export class Refresh {
  readonly #token: Token;
  readonly #beforeMs: number;
  readonly #host: RefreshHost;
  #transport: Transport | undefined;
  #asked: string | undefined;
  #askedAt = -Infinity;
  #timer: ReturnType<typeof setTimeout> | undefined;

  /** `beforeMs` is the time before the expiry. */
  constructor(token: Token, beforeMs: number, host: RefreshHost) {
    this.#token = token;
    this.#beforeMs = beforeMs;
    this.#host = host;
  }

  /** A connection is open, with the token in use. */
  opened(transport: Transport): void {
    this.#transport = transport;
    this.#schedule();
  }

  /** The connection is lost. */
  lost(): void {
    clearTimeout(this.#timer);
    this.#transport = this.#asked = undefined;
  }

  /** The gateway has accepted the fresh token. False where none was sent. */
  accepted(): boolean {
    if (this.#asked === undefined) return false;
    this.#token.use(this.#asked);
    this.#asked = undefined;
    this.#schedule();
    this.#host.done();
    return true;
  }

  /** The gateway has refused the fresh token; the one in use is as good as before. */
  refused(): void {
    if (this.#asked === undefined) return;
    this.#asked = undefined;
    this.#in(RETRY_MS);
  }

  #schedule(): void {
    clearTimeout(this.#timer);
    const left = this.#token.expiresAt - Date.now();
    if (left < Infinity) this.#in(Math.max(left - this.#beforeMs, left / 2));
  }

  #in(ms: number): void {
    clearTimeout(this.#timer);
    const soonest = this.#askedAt + PAUSE_MS - Date.now();
    this.#timer = setTimeout(() => void this.#ask(), Math.min(Math.max(ms, soonest), TIMEOUT_MAX));
  }

  async #ask(): Promise<void> {
    const transport = this.#transport;
    this.#askedAt = Date.now();
    try {
      const token = await this.#token.fresh({ reason: "refresh", signal: AbortSignal.timeout(30_000) });
      if (transport === undefined || transport !== this.#transport) return;
      this.#asked = token;
      transport.send(JSON.stringify({ type: "refresh", token }));
    } catch (cause) {
      if (transport !== this.#transport) return;
      this.#host.failed(cause);
    }
    // Again, unless there is an answer until then.
    if (transport === this.#transport) this.#in(RETRY_MS);
  }
}

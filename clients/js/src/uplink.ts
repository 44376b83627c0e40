// Sends what waits in the outbox over one WebSocket after the other, and finds out what of it has arrived.

import { isRateLimited } from "./advice.ts";
import { type Data, Outbox, type SendRate } from "./outbox.ts";
import type { Transport } from "./transport.ts";
import { AwakeClock } from "./wake.ts";

/** Options of sending. */
export interface UplinkOptions {
  queueMax?: number;
  sendRate?: SendRate;
  resend?: boolean;
}

/** So much may wait in the WebSocket; the rest waits here, where it can be sent again. */
const UNSENT_MAX = 64 * 1024;
const UNSENT_PAUSE_MS = 50;
/**
 * Messages that were sent so long before the network broke a connection, or before this side left it, have arrived. Only time awake counts; and after
 * a sleep nothing has arrived for its age alone, since a connection that died meanwhile may be found out late.
 */
const BROKEN_MS = 15_000;
const LEFT_MS = 120_000;
/** Time for a connection that was left to say that it has read everything. */
const SETTLE_MS = 5_000;
const ROUND_TRIP_MIN_MS = 500;

/** Nothing reaches a transport but between `opened` and `lost` or `leave`. */
export class Uplink {
  readonly #outbox: Outbox;
  readonly #resend: boolean;
  readonly #clock: AwakeClock;
  #transport: Transport | undefined;
  #roundTripMs = SETTLE_MS;
  #timer: ReturnType<typeof setTimeout> | undefined;
  /** The connection that was left and has not said yet what it has read. */
  #left: object | undefined;

  /** `clock` says when messages were sent. */
  constructor({ queueMax = 256, sendRate, resend = true }: UplinkOptions, clock: AwakeClock = new AwakeClock()) {
    this.#outbox = new Outbox(queueMax, sendRate);
    this.#resend = resend;
    this.#clock = clock;
  }

  /** Number of messages that wait. */
  get size(): number {
    return this.#outbox.size;
  }

  /** True where no further message may wait. */
  get isFull(): boolean {
    return this.#outbox.isFull;
  }

  /** Sends `data` when it is its turn. The caller has asked `isFull`. */
  push(data: Data): void {
    this.#outbox.push(data);
    this.#send();
  }

  /** Sends what belongs to this very connection, before all that waits; nothing without a connection. */
  sendNow(data: string): void {
    if (!this.#transport) return;
    this.#outbox.spend(Date.now());
    this.#transport.send(data);
  }

  /** A WebSocket is open. A round trip takes no longer than its handshake did. */
  opened(transport: Transport, handshakeMs: number): void {
    this.#transport = transport;
    this.#roundTripMs = Math.min(Math.max(handshakeMs, ROUND_TRIP_MIN_MS), SETTLE_MS);
    this.#outbox.opened(Date.now());
    this.#send();
  }

  /**
   * Something came from the other side: what was sent a round trip ago is taken to be there. Where the path is dead only upwards, it is
   * not; the gateway confirms nothing by which that could be known.
   */
  heard(): void {
    this.#outbox.arrived(this.#clock.now() - this.#roundTripMs);
  }

  /** The other side, or the network, has ended the connection: keeps what may not have been read before. */
  lost({ code, reason }: { code: number; reason: string }): void {
    const transport = this.#detach();
    if (!transport) return;
    if (isRateLimited(code, reason)) this.#outbox.slower();
    // A close frame is taken as proof that the path was good until now.
    const since = code === 1006 ? this.#doubtful(BROKEN_MS) : this.#since(this.#roundTripMs);
    this.#outbox.lost(since, transport.unsent());
  }

  /**
   * Leaves the connection, which may be alive. If it answers this very close, it has read everything; until that is known, everything waits,
   * so that the order stays.
   */
  leave(code: number, reason: string): void {
    const transport = this.#detach();
    const count = transport ? this.#outbox.lost(this.#doubtful(LEFT_MS), transport.unsent()) : 0;
    if (count === 0) return transport?.close(code, reason);
    const me = {};
    this.#left = me;
    this.#outbox.doubt(count);
    const settle = (isClean: boolean): void => {
      clearTimeout(timer);
      if (this.#left !== me) return;
      this.#left = undefined;
      this.#outbox.settle(isClean);
      this.#send();
    };
    const timer = setTimeout(() => settle(false), SETTLE_MS);
    transport?.close(code, reason, settle);
  }

  /** Forgets everything. */
  clear(): void {
    this.#detach();
    this.#left = undefined;
    this.#outbox.clear();
  }

  #since(ms: number): number {
    return this.#resend ? this.#clock.now() - ms : Infinity;
  }

  /** Since when messages may not have arrived, without proof that the other side lived until now. */
  #doubtful(ms: number): number {
    const hasSlept = this.#outbox.oldest <= this.#clock.sleptAt;
    return this.#resend && hasSlept ? -Infinity : this.#since(ms);
  }

  #detach(): Transport | undefined {
    clearTimeout(this.#timer);
    const transport = this.#transport;
    this.#transport = undefined;
    return transport;
  }

  #send(): void {
    clearTimeout(this.#timer);
    while (this.#transport) {
      const now = Date.now();
      const isStuck = this.#outbox.size > 0 && this.#transport.unsent() > UNSENT_MAX;
      const pause = isStuck ? UNSENT_PAUSE_MS : this.#outbox.pause(now);
      if (pause === undefined) return;
      if (pause > 0) {
        this.#timer = setTimeout(() => this.#send(), pause);
        return;
      }
      const data = this.#outbox.take(now, this.#clock.now());
      if (data !== undefined) this.#transport.send(data);
    }
  }
}

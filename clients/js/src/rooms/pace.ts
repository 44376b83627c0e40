// Sends messages no faster than the gateway lets one client send: first those that wait in order, then the newest of those that replace each other.

import type { SendRate } from "../outbox.ts";
import type { Transport } from "../transport.ts";

/** A message that replaces the earlier one of its key, and is made when it is its turn. */
interface Newest {
  make: () => string | Uint8Array;
  intervalMs: number;
}

/** Above this the network is too slow: positions give way to newer ones here. */
const UNSENT_MAX = 64 * 1024;
const UNSENT_PAUSE_MS = 50;
/** Where the gateway has no limit. */
const UNLIMITED_PER_SECOND = 1_000;
const PER_SECOND = 90;
const BURST = 100;

/**
 * Invariant: at most `max` messages wait in order, and one for each key. What waits in order without a connection goes out over the next one;
 * what replaces each other does not.
 */
export class Pace {
  readonly #max: number;
  readonly #given: SendRate | undefined;
  #perSecond: number;
  #burst: number;
  #tokens = 0;
  #filledAt = 0;
  #notBefore = 0;
  #waiting: { data: string | Uint8Array; isKept: boolean }[] = [];
  #newest: Map<string, Newest> = new Map();
  /** When a message of the key may be sent again. */
  readonly #due: Map<string, number> = new Map();
  #transport: Transport | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor(max: number, rate?: SendRate) {
    this.#max = max;
    this.#given = rate;
    this.#perSecond = Math.max(rate?.perSecond ?? PER_SECOND, 0.01);
    this.#burst = Math.max(rate?.burst ?? BURST, 1);
  }

  /** True while there is a connection. */
  get isOpen(): boolean {
    return this.#transport !== undefined;
  }

  /** Sends `data` in order. With `isKept` it waits for a connection; else the next connection does not get it. Throws where too many wait. */
  push(data: string | Uint8Array, isKept: boolean): void {
    if (!isKept && !this.#transport) return;
    if (this.#waiting.length >= this.#max) throw new Error("Too many messages wait for a connection, or for their turn.");
    this.#waiting.push({ data, isKept });
    this.#run();
  }

  /** Sends `data` before all that waits; only over this connection. The caller does so seldom. */
  urgent(data: string | Uint8Array): void {
    if (!this.#transport) return;
    this.#waiting.unshift({ data, isKept: false });
    this.#run();
  }

  /** Sends the newest message of `key`, at most once in `intervalMs`; only over this connection. */
  newest(key: string, intervalMs: number, make: () => string | Uint8Array): void {
    if (!this.#transport) return;
    this.#newest.set(key, { make, intervalMs });
    this.#run();
  }

  /** Nothing of `key` shall be sent any more. */
  drop(key: string): void {
    this.#newest.delete(key);
    this.#due.delete(key);
  }

  /** A connection is open, over which `first` goes before all that waits. `perSecond` is the gateway's limit: 0 for none, nothing where it is unknown. */
  opened(transport: Transport, perSecond: number | undefined, first: readonly (string | Uint8Array)[]): void {
    this.#waiting.unshift(...first.map((data) => ({ data, isKept: false })));
    if (!this.#given && perSecond !== undefined) {
      this.#perSecond = perSecond === 0 ? UNLIMITED_PER_SECOND : Math.max(perSecond * 0.9, 0.5);
      this.#burst = Math.max(Math.min(perSecond || UNLIMITED_PER_SECOND, BURST), 1);
    }
    this.#transport = transport;
    this.#tokens = this.#burst;
    this.#filledAt = Date.now();
    this.#notBefore = 0;
    this.#run();
  }

  /** The connection is lost. */
  lost(): void {
    clearTimeout(this.#timer);
    this.#transport = undefined;
    this.#newest.clear();
    this.#due.clear();
    this.#waiting = this.#waiting.filter(({ isKept }) => isKept);
  }

  /** Forgets everything. */
  clear(): void {
    this.lost();
    this.#waiting = [];
  }

  /** Sends nothing for a while: the gateway has refused a message. */
  rest(ms: number): void {
    this.#notBefore = Math.max(this.#notBefore, Date.now() + ms);
  }

  /** The gateway has ended a connection that was too fast. */
  slower(): void {
    this.#perSecond = Math.max(this.#perSecond / 2, 0.5);
    this.#burst = Math.max(Math.floor(this.#burst / 2), 1);
  }

  #run(): void {
    clearTimeout(this.#timer);
    while (this.#transport) {
      const now = Date.now();
      const [key, dueMs] = this.#waiting.length > 0 ? [undefined, 0] : this.#next(now);
      if (dueMs === undefined) return;
      const pause = Math.max(this.#pause(now), dueMs);
      if (pause > 0) {
        this.#timer = setTimeout(() => this.#run(), pause);
        return;
      }
      this.#tokens -= 1;
      this.#transport.send(key === undefined ? (this.#waiting.shift() as { data: string }).data : this.#take(key, now));
    }
  }

  /** The key whose turn is next, and the time until then. */
  #next(now: number): [string | undefined, number | undefined] {
    let next: [string | undefined, number | undefined] = [undefined, undefined];
    for (const key of this.#newest.keys()) {
      // A wait is no longer than one interval, also after the clock was set back.
      const wait = Math.max(Math.min((this.#due.get(key) ?? now) - now, this.#newest.get(key)?.intervalMs ?? 0), 0);
      if (wait === 0) return [key, 0];
      if (next[1] === undefined || wait < next[1]) next = [key, wait];
    }
    return next;
  }

  #take(key: string, now: number): string | Uint8Array {
    const { make, intervalMs } = this.#newest.get(key) as Newest;
    this.#newest.delete(key);
    this.#due.set(key, now + intervalMs);
    return make();
  }

  #pause(now: number): number {
    if ((this.#transport?.unsent() ?? 0) > UNSENT_MAX) return UNSENT_PAUSE_MS;
    // A clock that was set back earns nothing.
    this.#tokens = Math.min(this.#burst, this.#tokens + (Math.max(now - this.#filledAt, 0) / 1000) * this.#perSecond);
    this.#filledAt = now;
    return Math.max(this.#tokens >= 1 ? 0 : Math.ceil(((1 - this.#tokens) / this.#perSecond) * 1000), this.#notBefore - now);
  }
}

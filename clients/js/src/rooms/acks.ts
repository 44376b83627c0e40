// Which reliable messages of a connection have come, so that each is told once and acknowledged. Knows neither a clock nor a connection.

/** The gateway keeps so many messages; what is further back is given up. */
const WINDOW = 1_000n;

/** The numbers of one connection. */
export class Acks {
  /** All up to here have come, or come no more. */
  #upTo = 0n;
  /** Those beyond that have come. */
  readonly #ahead: Set<bigint> = new Set();
  #newest = 0n;
  /** Those that are to be acknowledged. */
  #pending: Set<bigint> = new Set();

  /** Notes that the message `seq` has come. False where it had come before. */
  take(seq: bigint): boolean {
    this.#pending.add(seq);
    if (seq <= this.#upTo || this.#ahead.has(seq)) return false;
    this.#ahead.add(seq);
    if (seq > this.#newest) this.#newest = seq;
    if (this.#newest - this.#upTo > WINDOW) {
      this.#upTo = this.#newest - WINDOW;
      for (const old of this.#ahead) if (old <= this.#upTo) this.#ahead.delete(old);
    }
    while (this.#ahead.delete(this.#upTo + 1n)) this.#upTo += 1n;
    return true;
  }

  /** Returns the Ack for all that came since the last one; nothing where none did. */
  flush(): { seq: bigint; more?: bigint[] } | undefined {
    if (this.#pending.size === 0) return undefined;
    const more = [...this.#pending].filter((seq) => seq > this.#upTo);
    this.#pending = new Set();
    return { seq: this.#upTo, ...(more.length > 0 ? { more } : {}) };
  }
}

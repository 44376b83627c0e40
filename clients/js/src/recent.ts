// A set that keeps the newest of what was put into it.

/** Invariant: never holds more than `max` keys; the oldest leaves first, since what is repeated is repeated soon. */
export class Recent {
  readonly #keys: Set<string> = new Set();
  readonly #max: number;

  constructor(max: number) {
    this.#max = max;
  }

  /** True where `key` is among the newest. */
  has(key: string): boolean {
    return this.#keys.has(key);
  }

  /** Puts `key` in. */
  add(key: string): void {
    this.#keys.add(key);
    if (this.#keys.size > this.#max) {
      for (const oldest of this.#keys) {
        this.#keys.delete(oldest);
        break;
      }
    }
  }

  /** Takes `key` out, as if it had never been in. */
  delete(key: string): void {
    this.#keys.delete(key);
  }

  /** Takes everything out. */
  clear(): void {
    this.#keys.clear();
  }
}

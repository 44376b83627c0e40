// Moments at which a page or a machine comes back to life: an open connection may be dead then, and a pause can end early.

/** The event: the network is back, the user looks at the page again, or the machine was asleep. */
export type Wake = "online" | "visible" | "slept";

/** Interval at which the clock is read. */
const TICK_MS = 5_000;
/** A timer that comes so late was not delayed by work. */
const SLEEP_MS = 60_000;

/**
 * Counts the time in which this machine was awake, by a clock that may jump. It counts too little rather than too much: a pause between two
 * looks counts as one tick at most, since timers of hidden pages come late, and one in which the machine slept counts nothing.
 */
export class AwakeClock {
  #awakeMs = 0;
  #lookedAt: number = Date.now();
  #sleptAt = -Infinity;

  /** The milliseconds awake until now. The caller has to ask at every tick. */
  now(): number {
    const pause = Date.now() - this.#lookedAt;
    this.#lookedAt += pause;
    if (pause > TICK_MS + SLEEP_MS) this.#sleptAt = this.#awakeMs;
    else this.#awakeMs += Math.min(Math.max(pause, 0), TICK_MS);
    return this.#awakeMs;
  }

  /** Time at which the machine last fell asleep, by this clock. */
  get sleptAt(): number {
    this.now();
    return this.#sleptAt;
  }
}

interface Events {
  addEventListener(type: string, listener: () => void): void;
  removeEventListener(type: string, listener: () => void): void;
}

/** Calls `wake` at these moments, and keeps `clock` going. Answers a function that ends it. */
export function watchWake(clock: AwakeClock, wake: (what: Wake) => void): () => void {
  const { document } = globalThis as { document?: Events & { visibilityState: string } };
  const page = globalThis as unknown as Partial<Events>;
  const isHidden = (): boolean => document?.visibilityState === "hidden";
  const online = (): void => wake("online");
  const visible = (): void => (isHidden() ? undefined : wake("visible"));
  let last = Date.now();
  const timer = setInterval(() => {
    const late = Date.now() - last - TICK_MS;
    last = Date.now();
    clock.now();
    // Browsers hold back the timers of hidden pages; the page will be looked at again.
    if (late > SLEEP_MS && !isHidden()) wake("slept");
  }, TICK_MS);
  // In Node the watch keeps no program alive.
  (timer as unknown as { unref?(): void }).unref?.();
  page.addEventListener?.("online", online);
  document?.addEventListener("visibilitychange", visible);
  // Pages that were frozen, which not every browser tells by their visibility.
  document?.addEventListener("resume", visible);
  return () => {
    clearInterval(timer);
    page.removeEventListener?.("online", online);
    document?.removeEventListener("visibilitychange", visible);
    document?.removeEventListener("resume", visible);
  };
}

// Pauses between attempts: exponential with full jitter; knows neither a clock nor a source of randomness.

/** Options of the pauses between attempts. */
export interface BackoffOptions {
  /** Longest wait before the first retry. Default 500 ms. */
  baseMs?: number;
  /** Longest wait of all. Default 30 s. */
  maxMs?: number;
  /** A connection that was open this long starts again at `baseMs`. Default 10 s. */
  stableMs?: number;
}

/**
 * The wait before retry number `attempt` (0 is the first): anything between nothing and the whole of an exponentially
 * growing range, so that many clients who failed together come back spread over all of it.
 */
export function fullJitter(attempt: number, baseMs: number, maxMs: number, random: () => number): number {
  return Math.floor(random() * Math.min(maxMs, baseMs * 2 ** Math.min(attempt, 50)));
}

// The one table of what to do after the end of a connection, as the gateway's table of close codes advises.

/** How a connection, or the try to open one, ended. */
export interface End {
  /** WebSocket close code; 1006 where there was none. */
  code: number;
  /** The reason that came with it. */
  reason: string;
  /** Whether it had been open. */
  opened: boolean;
  /** HTTP status of a refused handshake, where it is known (never for WebSockets in browsers). */
  status?: number;
  /** What the gateway's `Retry-After` asked for. */
  retryAfterMs?: number;
  /** What the gateway's JSON error said of trying again. */
  retryable?: boolean;
}

/**
 * `retry`: after a pause with jitter. `slow`: after a longer one. `credentials`: at once, with a fresh token.
 * `stop`: not on its own.
 */
export type Advice = "retry" | "slow" | "credentials" | "stop";

/** What to do after `end`. */
export function advise(end: End): Advice {
  if (end.status !== undefined) {
    if (end.status === 401 || end.status === 403) return end.reason === "origin_not_allowed" ? "stop" : "credentials";
    if (end.status === 429 || end.status === 503) return "slow";
    return end.retryable === false ? "stop" : "retry";
  }
  switch (end.code) {
    case 1000: // The other side wanted the end.
    case 1002: // What both would do again the same way fails again the same way.
    case 1003:
    case 1007:
    case 1009:
    case 1010:
      return "stop";
    case 1008:
      // One code for three causes, of which the table tells them apart by their reason.
      if (end.reason === "slow consumer") return "retry";
      return end.reason === "too many messages" ? "slow" : "stop";
    case 1013:
      return "slow";
    case 4002:
      return "retry";
    case 4401:
      return "credentials";
    default:
      // 4001 replaced by a newer one, 4003 idle, 4004 ended by the backend, and whatever code a worker chose to end it.
      return end.code >= 3000 ? "stop" : "retry";
  }
}

// The one table of what to do after the end of a connection: the rule of docs/clients.md, of which spec/finality.json has every row.

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
  /** What `Retry-After` asked for. */
  retryAfterMs?: number;
  /** The gateway's own refusal; `unknown` where the body could not be seen, nothing where it is not the gateway's. */
  refusal?: Refusal | "unknown";
}

/** What the gateway says in the body of a refusal. */
export interface Refusal {
  /** For programs, such as `invalid_token`. */
  code: string;
  /** Whether the same request may be sent again. */
  retryable: boolean;
}

/**
 * `retry`: after a pause with jitter. `slow`: after a longer one. `credentials`: with a fresh token, the first time at once.
 * `final`: not on its own.
 */
export type Advice = "retry" | "slow" | "credentials" | "final";

const OF_CREDENTIALS: readonly string[] = ["missing_credentials", "malformed_credentials", "invalid_token"];

/** What to do after `end`. */
export function advise(end: End): Advice {
  return end.status === undefined ? adviseClosed(end.code, end.reason) : adviseRefused(end.status, end.refusal);
}

/** The gateway's own refusal in `body`; nothing where something in between has answered. */
export function parseRefusal(body: string): Refusal | undefined {
  try {
    const { code, message, retryable } = (JSON.parse(body) as { error?: Record<string, unknown> }).error ?? {};
    const isOwn = typeof code === "string" && typeof message === "string" && typeof retryable === "boolean";
    return isOwn ? { code, retryable } : undefined;
  } catch {
    return undefined;
  }
}

function adviseRefused(status: number, refusal: Refusal | "unknown" | undefined): Advice {
  if (status === 429 || status === 503) return "slow";
  if (refusal === "unknown") return status === 401 || status === 403 ? "credentials" : "retry";
  if (!refusal) return "retry";
  if ((status === 401 || status === 403) && OF_CREDENTIALS.includes(refusal.code)) return "credentials";
  return !refusal.retryable && status >= 400 && status < 500 && status !== 408 ? "final" : "retry";
}

function adviseClosed(code: number, reason: string): Advice {
  switch (code) {
    case 1000: // The other side wanted the end.
    case 1002: // What both would do again the same way fails again the same way.
    case 1003:
    case 1007:
    case 1009:
    case 1010:
      return "final";
    case 1008:
      // One code for three causes, of which the table tells them apart by their reason.
      if (reason === "slow consumer") return "retry";
      return reason === "too many messages" ? "slow" : "final";
    case 1013:
      return "slow";
    case 4002:
      return "retry";
    case 4401:
      return "credentials";
    default:
      // 4001 replaced by a newer one, 4003 idle, 4004 ended by the backend, and whatever code a worker chose to end it.
      return code >= 3000 ? "final" : "retry";
  }
}

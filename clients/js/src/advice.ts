// The one table of what to do after the end of a connection: the rule of docs/guides/reconnecting.md, of which spec/finality.json has every row.

/** The end of a connection, or of an attempt to open one. */
export interface End {
  /** WebSocket close code; 1006 where there was none. */
  code: number;
  /** The reason that came with it. */
  reason: string;
  /** True where the connection had been open. */
  opened: boolean;
  /** HTTP status of a refused handshake, where it is known (never for WebSockets in browsers). */
  status?: number;
  /** The pause that `Retry-After` asked for. */
  retryAfterMs?: number;
  /** The gateway's own refusal; `unknown` where the body could not be seen, nothing where it is not the gateway's. */
  refusal?: Refusal | "unknown";
}

/** The gateway's own refusal, from the body of its answer. */
export interface Refusal {
  /** Code for programs, such as `invalid_token`. */
  code: string;
  /** True where the same request may be sent again. */
  retryable: boolean;
}

/**
 * `retry`: after a pause with jitter. `slow`: after a longer one. `credentials`: with a fresh token, the first time at once.
 * `final`: not on its own.
 */
export type Advice = "retry" | "slow" | "credentials" | "final";

/** Close code of a policy: one code for several causes, which only the reason tells apart. */
const POLICY = 1008;

/** The gateway's reason for {@link POLICY} where the client sent too many messages per second. */
const TOO_MANY_MESSAGES = "too many messages";

/** Advice by the reason of {@link POLICY}; every other reason is final. */
export const ADVICE_OF_POLICY: Readonly<Record<string, Advice>> = { "slow consumer": "retry", [TOO_MANY_MESSAGES]: "slow" };

const OF_CREDENTIALS: readonly string[] = ["missing_credentials", "malformed_credentials", "invalid_token"];

/** Returns the advice for `end`. */
export function advise(end: End): Advice {
  return end.status === undefined ? adviseClosed(end.code, end.reason) : adviseRefused(end.status, end.refusal);
}

/** Whether the gateway ended the connection since the client sent too many messages per second. */
export function isRateLimited(code: number, reason: string): boolean {
  return code === POLICY && reason === TOO_MANY_MESSAGES;
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
    case POLICY:
      return Object.hasOwn(ADVICE_OF_POLICY, reason) ? ADVICE_OF_POLICY[reason]! : "final";
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

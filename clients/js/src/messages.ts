// The gateway's own messages on the wire, and the types in which handlers get them.

/** A message that came. */
export interface Received<M> {
  /** The message: parsed where it is JSON, else its text or bytes. */
  data: M;
  /** Its position, where it was published with history. A member `event_id` of its own is another thing. */
  eventId: string | undefined;
  /** The message as it came. */
  raw: string | Uint8Array;
}

/** State of a connection: `waiting` is between two attempts, `closed` is final until `connect()`. */
export type State = "connecting" | "open" | "waiting" | "closed";

/** A change of state, and what led to it. */
export interface StateChange {
  /** The state now. */
  state: State;
  /** The one before. */
  previous: State;
  /** Number of failed attempts since the connection was last stable. */
  attempt: number;
  /** The wait until the next try, in the state `waiting`. */
  delayMs?: number;
  /** The close code that led here; 1006 where there was none. */
  code?: number;
  /** The reason that came with it. */
  reason?: string;
  /** HTTP status of a refused handshake, where it is known. */
  status?: number;
}

/** The gateway's first message on a connection. */
export interface Connected {
  /** The gateway's name of this connection. */
  connectionId: string | undefined;
  /** The position at which the stream begins. */
  eventId: string | undefined;
  /** Id of the user: events only. */
  userId: string | undefined;
  /** Expiry of the token, in seconds of Unix time: events only. */
  expiresAt: number | undefined;
}

/** The missed messages follow now, in order, before any new one. */
export interface Resumed {
  /** Number of missed messages. */
  count: number;
  /** The position they follow. */
  lastEventId: string | undefined;
}

/** Messages are missing and cannot be had again: reload whatever is built from them. */
export interface HistoryLost {
  /** The reason. */
  reason: "trimmed" | "unknown" | "expired" | "emptied" | "ambiguous" | "overflow" | "disabled" | (string & {});
  /** The same for people. */
  message: string;
  /** Position at which the stream goes on. */
  eventId: string | undefined;
}

/** Something went wrong that ends nothing by itself: told by the gateway, or found here. */
export interface Problem {
  /**
   * The gateway's code, such as `invalid_json`, `no_receiver`, `publish_lost`, `publish_refused`, `invalid_token`; or from here
   * `credentials` (the function that gives them failed), `refresh`, `handler` (one of your handlers threw), `downstream_only`
   * (messages wait for a WebSocket, or cannot be sent at all).
   */
  code: string;
  /** The same for people. */
  message: string;
  /** The thrown value, if there was one. */
  cause?: unknown;
}

/** A JSON object off the wire. */
export type JsonObject = Record<string, unknown>;

/** True where `value` is such an object. */
export function isObject(value: unknown): value is JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value) && !(value instanceof Uint8Array);
}

/** The value of JSON; text that is none, and bytes, as they are. */
export function parse(body: string | Uint8Array): unknown {
  if (typeof body !== "string") return body;
  try {
    return JSON.parse(body);
  } catch {
    return body;
  }
}

/** `value` if it is text. */
export function text(value: unknown): string | undefined {
  return typeof value === "string" ? value : undefined;
}

/** `value` if it is a number. */
export function number(value: unknown): number | undefined {
  return typeof value === "number" ? value : undefined;
}

// Workers may use the type `error` for messages of their own; these codes are the gateway's.
const GATEWAY_CODES: readonly string[] = [
  "invalid_json",
  "no_receiver",
  "publish_lost",
  "publish_refused",
  "invalid_token",
  "invalid_message",
];

/** The gateway's own messages, by the event that tells each. */
export type Notice =
  | { connected: Connected }
  | { resumed: Resumed }
  | { busRecovered: { gapMs: number } }
  | { historyLost: HistoryLost }
  | { error: Problem };

/**
 * Reads what the gateway says itself; nothing where `message` is a worker's, who may use the same words. `id` is that beside the
 * message, `greeting` the type with which a connection of this kind begins.
 */
export function readNotice(message: JsonObject, id: string | undefined, greeting: string): Notice | undefined {
  // With a position beside it that it does not name itself, it was published.
  if (id && id !== message["event_id"] && id !== message["last_event_id"]) return undefined;
  // Empty, where there is no history.
  const eventId = text(message["event_id"]) || undefined;
  const connectionId = text(message["connection_id"]);
  const code = text(message["code"]) ?? "";
  switch (message["type"]) {
    case greeting: {
      if (connectionId === undefined) return undefined;
      const [userId, expiresAt] = [text(message["user_id"]), number(message["expires_at"])];
      return { connected: { connectionId, eventId, userId, expiresAt } };
    }
    case "resumed": {
      const count = number(message["count"]);
      return count === undefined ? undefined : { resumed: { count, lastEventId: text(message["last_event_id"]) } };
    }
    case "bus_recovered":
      return { busRecovered: { gapMs: number(message["gap_ms"]) ?? 0 } };
    case "error":
      if (code === "history_lost") {
        const reason = text(message["reason"]) ?? "unknown";
        return { historyLost: { reason, message: text(message["message"]) ?? reason, eventId } };
      }
      return GATEWAY_CODES.includes(code) ? { error: { code, message: text(message["message"]) ?? "" } } : undefined;
    default:
      return undefined;
  }
}

/** `value` if it is a position `milliseconds-sequence-tag`. */
export function position(value: unknown): string | undefined {
  return typeof value === "string" && /^[1-9]\d{0,19}-(0|[1-9]\d{0,19})-[\da-f]{8}$/.test(value) ? value : undefined;
}

/**
 * True where the position `next` is behind `last`. The tag is no part of the order; ids that workers gave have none, so the one
 * that came later counts as the later one.
 */
export function isBehind(next: string, last: string): boolean {
  const [a, b] = [order(next), order(last)];
  if (!a || !b) return false;
  return a[0] === b[0] ? a[1] < b[1] : a[0] < b[0];
}

function order(id: string): [bigint, bigint] | undefined {
  const parts = /^(\d{1,20})-(\d{1,20})(-[\da-f]{8})?$/.exec(id);
  return parts ? [BigInt(parts[1] as string), BigInt(parts[2] as string)] : undefined;
}

// The options of a connection, with defaults that suit a browser.

import type { BackoffOptions } from "./backoff.ts";
import type { SendRate } from "./outbox.ts";
import type { FetchLike, Signal, SignalLike } from "./platform.ts";
import type { WebSocketConstructor } from "./websocket.ts";

/** The reason for which a credential is asked for. */
export type CredentialReason = "initial" | "reconnect" | "failed" | "rejected" | "expired" | "refresh";

/** Arguments of the function that gives credentials. */
export interface CredentialRequest {
  /**
   * `initial`, `reconnect` after a lost connection, `failed` after a handshake that failed without saying why (browsers never say),
   * `rejected` after one refused for its credentials, `expired` after close
   * code 4401, `refresh` before the expiry of a token in use.
   */
  reason: CredentialReason;
  /** Aborted when the answer is not needed any more. */
  signal: Signal;
}

/** Options of every connection. */
export interface ConnectionOptions {
  /** First position to resume from, such as an id from storage; `"0"`: the start of what is held. Default: no resume. */
  lastEventId?: string;
  /** Asks for positions, and resumes after a lost connection. Default true. */
  resume?: boolean;
  /**
   * Offers the subprotocol `wsproxy.id.v1`, which carries positions beside messages instead of in them, so that messages
   * of every kind resume. Without it, JSON objects alone do. Default true.
   */
  envelope?: boolean;
  /**
   * `auto` falls back to server-sent events where WebSockets fail, and goes on looking for a WebSocket. `sse` only listens: `send`
   * throws. Default `auto`.
   */
  transport?: "auto" | "websocket" | "sse";
  /** After how many failed WebSockets in a row `auto` tries server-sent events. Default 3. */
  sseAfter?: number;
  /** Place of the token in requests for server-sent events: a header, or the URL, which needs no CORS preflight but ends in logs. Default `header`. */
  sseTokenIn?: "header" | "query";
  /** Pauses between attempts. */
  backoff?: BackoffOptions;
  /** Ends it for good when there was no connection for so long. Default: never. */
  giveUpAfterMs?: number;
  /** After this time a try has failed. Default 15 s. */
  connectTimeoutMs?: number;
  /** After this time without any message the connection counts as dead. Default: what the gateway's heartbeat says, where it has one. */
  silenceMs?: number;
  /** Upper bound of messages of `send` that wait, for a connection or for their turn. Default 256. */
  queueMax?: number;
  /** Rate at which messages are sent. Default: somewhat less than the gateway's default lets one connection send. */
  sendRate?: SendRate;
  /**
   * Repeats messages that a lost connection may not have delivered over the next one, so that a worker may get a message twice.
   * With false a worker gets each at most once. Default true.
   */
  resend?: boolean;
  /** Number of positions that are remembered to recognise duplicates. Default 2048. */
  dedupMax?: number;
  /** Ends the connection when aborted. */
  signal?: SignalLike;
  /** The WebSocket to use. Default: the global one, which Node has since version 22; before it, give that of the package `ws`. */
  WebSocket?: WebSocketConstructor;
  /** The fetch to use for server-sent events. Default: the global one. */
  fetch?: FetchLike;
  /** A source of numbers in [0, 1). Default `Math.random`. */
  random?: () => number;
}

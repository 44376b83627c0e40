// The seam between a connection and its kinds: what the connection tells them, and what each gives it.

import type { Connected, HistoryLost, Problem, Received, Resumed, StateChange } from "./messages.ts";
import type { TokenStream } from "./streams.ts";

/** Every event of a connection. */
export interface ConnectionEvents<M> {
  /** It connects, is open, waits or is closed. */
  state: StateChange;
  /** A message of a worker, once. */
  message: Received<M>;
  /** The gateway told who and where one is. */
  connected: Connected;
  /** What was missed follows. */
  resumed: Resumed;
  /** Messages are missing for good. */
  historyLost: HistoryLost;
  /** The gateway had lost its bus, and the channel has no history: what was published meanwhile is missing. */
  busRecovered: { gapMs: number };
  /** Something went wrong that ends nothing. */
  error: Problem;
  /** A token stream was heard of for the first time: sessions only. */
  stream: TokenStream;
  /** A new token is in use: events only. */
  refreshed: { expiresAt: number | undefined };
}

/** A place to connect to, and what opens it. */
export interface Grant {
  /** Where, without credentials. */
  url: string;
  /** The credential. */
  token: string;
  /** Whether the credential opens event streams only. */
  eventStream?: boolean;
}

/** The types of messages that have one. */
export type TypeOf<M> = M extends { type: infer T extends string } ? T : string;
/** Those messages of `M` which have the type `T`. */
export type OfType<M, T> = M extends { type: infer U } ? (T extends U ? M : never) : never;

// The seam between a connection and its kinds (sessions, events): the events and types that both use.

import type { Connected, HistoryLost, Problem, Received, Resumed, StateChange } from "./messages.ts";
import type { TokenStream } from "./streams.ts";

/** Every event of a connection. */
export interface ConnectionEvents<M> {
  /** The state has changed: connecting, open, waiting or closed. */
  state: StateChange;
  /** A message of a worker, once. */
  message: Received<M>;
  /** The gateway has named the connection. */
  connected: Connected;
  /** The missed messages follow. */
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
  /** The address, without credentials. */
  url: string;
  /** The credential. */
  token: string;
  /** True where the credential opens event streams only. */
  eventStream?: boolean;
}

/** The types of messages that have one. */
export type TypeOf<M> = M extends { type: infer T extends string } ? T : string;
/** The messages of `M` that have the type `T`. */
export type OfType<M, T> = M extends { type: infer U } ? (T extends U ? M : never) : never;

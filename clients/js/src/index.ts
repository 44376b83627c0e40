// Everything that is public.

export type { BackoffOptions } from "./backoff.ts";
export { Connection } from "./connection.ts";
export type { ConnectionEvents, OfType, TypeOf } from "./contract.ts";
export type { Handler } from "./emitter.ts";
export { connectEvents, type EventMap, type EventMessage, Events, type EventsOptions } from "./events.ts";
export { GiveUp } from "./give-up.ts";
export type { Connected, HistoryLost, Problem, Received, Resumed, State, StateChange } from "./messages.ts";
export type { ConnectionOptions, CredentialReason, CredentialRequest } from "./options.ts";
export type { SendRate } from "./outbox.ts";
export type { Address, FetchLike, ResponseLike, Signal, SignalLike } from "./platform.ts";
export { connectSession, Session, type SessionOptions, type SessionToken } from "./session.ts";
export { type Outcome, type StreamFailure, TokenStream, type TokenStreamEvents } from "./streams.ts";
export type { WebSocketConstructor, WebSocketLike } from "./websocket.ts";

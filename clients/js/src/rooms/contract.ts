// Options and arguments that programs give to a room, and events that they get from it.

import type { Problem, StateChange } from "../messages.ts";
import type { SendRate } from "../outbox.ts";
import type { Address, SignalLike } from "../platform.ts";
import type { LinkOptions } from "./link.ts";
import type { GetToken } from "./token.ts";
import type { Avatar, Codec, Rotation } from "./wire.ts";
import type { Component, Member, WorldEvents } from "./world.ts";

/** A position to move to; `z` may be left out. */
export interface Place {
  readonly x: number;
  readonly y: number;
  readonly z?: number;
}

/** What others see of this client. */
export interface Presence {
  /** Name to show. */
  name?: string;
  avatarUrl?: string;
  avatar?: Avatar;
  position?: Place;
  rotation?: Rotation;
  hostClientId?: string;
}

/** Options of a room. */
export interface RoomOptions extends LinkOptions {
  /** The gateway, such as `https://gateway.example`. */
  url: Address;
  /** The room's id. */
  room: string;
  /**
   * Gets the user's JWT. It is called again before the token expires, after it was refused, and where a handshake failed without
   * saying why; not at every reconnect. Throw a `GiveUp` where there will be none any more; anything else that is thrown is tried
   * again.
   */
  getToken?: GetToken;
  /** The user's id instead of a token: only for a gateway in development mode, which believes it. */
  userId?: string;
  /**
   * Id of this client, unique in its room: a second client of the same user with this id replaces the first. Default: a new one for each
   * `Room`. To stay the same member over a reload of the page, keep `room.clientId` and give it here.
   */
  clientId?: string;
  /** Name to show; short for `presence.name`. */
  name?: string;
  /** What others see of this client. */
  presence?: Presence;
  /** Sends and reads binary messages: `binary` of `@wsproxy/client/rooms/binary`. Default: text. */
  binary?: Codec;
  /** Rate at which messages are sent. Default: somewhat less than the gateway lets this client send. */
  sendRate?: SendRate;
  /** Upper bound of messages that wait, for a connection or for their turn. Default 256. */
  queueMax?: number;
  /** Time before the expiry at which a token is refreshed; at most half of its life is left unused. Default 60 s. */
  refreshBeforeMs?: number;
  /** Ends the room when aborted. */
  signal?: SignalLike;
}

/** Options of a message. */
export interface SayOptions {
  /** Has the gateway repeat it to receivers until they acknowledge it. */
  reliable?: boolean;
}

/** An entity that appears. */
export interface Spawn {
  /** The kind of thing, in words of yours. */
  template?: string;
  components?: Readonly<Record<string, Component>>;
  position?: Place;
  rotation?: Rotation;
}

/** A chat message that came. */
export interface Chat {
  /** Client id of the sender; empty: a worker. */
  from: string;
  /** The sender, if it is in the room. */
  member: Member | undefined;
  text: string;
  kind: "normal" | "whisper" | "shout";
}

/** A message of the application's own kind. */
export interface Custom {
  /** Client id of the sender; empty: a worker. */
  from: string;
  /** The sender, if it is in the room. */
  member: Member | undefined;
  name: string;
  data: Uint8Array;
}

/** Something went wrong that ends nothing. */
export interface RoomProblem extends Problem {
  /** The milliseconds after which to try again. */
  retryAfterMs?: number;
  /** The entity that the room has refused. */
  entityId?: string;
}

/** Events of a room. */
export interface RoomEvents extends WorldEvents {
  /** The state of the connection has changed: connecting, open, waiting or closed. */
  state: StateChange;
  /** A member, or a worker, says something. */
  chat: Chat;
  /** A message of the application's own kind has come. */
  custom: Custom;
  /** Something went wrong that ends nothing: the gateway's codes, or `credentials`, `refresh` or `handler`. */
  error: RoomProblem;
  /** A new token is in use until then, in milliseconds of Unix time; `Infinity` where it does not say. */
  refreshed: { expiresAt: number };
}

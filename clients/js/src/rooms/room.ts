// A room: who is in it, what is in it, and what its members say; over any number of connections.

import { type End, isRateLimited } from "../advice.ts";
import { Emitter } from "../emitter.ts";
import type { State, StateChange } from "../messages.ts";
import type { CredentialRequest } from "../options.ts";
import type { Transport } from "../transport.ts";
import { Acks } from "./acks.ts";
import { Belongings } from "./belongings.ts";
import { turned, vector } from "./check.ts";
import type { Chat, Custom, Place, Presence, RoomEvents, RoomOptions, RoomProblem, SayOptions, Spawn } from "./contract.ts";
import { json } from "./json.ts";
import { Link } from "./link.ts";
import { toBytes } from "./own.ts";
import { Pace } from "./pace.ts";
import { Refresh } from "./refresh.ts";
import { Token } from "./token.ts";
import {
  CHAT,
  type Codec,
  type EntitySnapshot,
  type Envelope,
  type Limits,
  type Outgoing,
  type Payload,
  type Payloads,
  type PlayerSnapshot,
  PRESENCE,
  type PresenceData,
  type Rotation,
  type ServerHello,
} from "./wire.ts";
import { type Component, type Entity, type Member, readable, World } from "./world.ts";

const VERSION = 1;
/** Name of the gateway's answer to a fresh token. */
const REFRESHED = "refreshed";
const PRESENCE_MS = 100;
const ACK_MS = 100;
/** Messages that come between two pages of a state. */
const HELD_MAX = 10_000;
const REST_MAX_MS = 60_000;
const REFRESH_BEFORE_MS = 60_000;

/** A room, as one client of it sees it; see {@link connectRoom}. */
export class Room extends Emitter<RoomEvents> {
  readonly #options: RoomOptions;
  readonly #codec: Codec;
  readonly #link: Link;
  readonly #pace: Pace;
  readonly #world: World;
  readonly #belongings: Belongings;
  readonly #token: Token | undefined;
  readonly #refresh: Refresh | undefined;
  /** What others shall see of this client. */
  #presence: Partial<PresenceData> = {};
  /** The same as this connection began with it. */
  #greeted: Partial<PresenceData> | undefined;
  #end: Partial<StateChange> = {};
  #connectionId: string | undefined;
  #limits: Limits | undefined;
  /** True once a state has come. */
  #wasOpen = false;
  #transport: Transport | undefined;
  /** The pages of the state that have come, and what came after the first of them. */
  #pages: { players: PlayerSnapshot[]; entities: EntitySnapshot[]; held: Envelope[] } | undefined;
  #acks: Acks = new Acks();
  #ackTimer: ReturnType<typeof setTimeout> | undefined;

  /** Checks the options and begins to connect; see {@link connectRoom}. */
  constructor(options: RoomOptions) {
    super();
    if ((options.getToken === undefined) === (options.userId === undefined)) throw new Error("A room needs either getToken or userId.");
    this.#options = options;
    this.#codec = options.binary ?? json;
    this.#pace = new Pace(options.queueMax ?? 256, options.sendRate);
    this.#token = options.getToken && new Token(options.getToken);
    this.#refresh = this.#token && new Refresh(this.#token, options.refreshBeforeMs ?? REFRESH_BEFORE_MS, {
      failed: (cause) => this.#link.gaveUp(cause) || this.#problem({ code: "refresh", message: `No fresh token: ${cause}`, cause }),
      done: () => this.#tell("refreshed", { expiresAt: this.#token?.expiresAt ?? Infinity }),
    });
    this.#world = new World(options.clientId ?? randomId(), (event, value) => {
      if (event === "despawn") this.#belongings.forget((value as RoomEvents["despawn"]).entity.id);
      this.#tell(event, value as RoomEvents[typeof event]);
    });
    this.#belongings = new Belongings(this.#world, this.#pace, (message) => this.#encode(message), (entityId, cause) => {
      this.#problem({ code: "too_large", message: String(cause), entityId, cause });
    });
    this.#link = new Link(options, {
      isFixed: options.getToken === undefined,
      authorize: (request) => this.#authorize(request),
      opened: (transport) => this.#opened(transport),
      frame: (body) => this.#frame(body),
      lost: (end) => this.#lost(end),
      changed: (change) => this.#changed(change),
      problem: (code, message, cause) => this.#problem({ code, message, ...(cause === undefined ? {} : { cause }) }),
    });
    this.#show({ ...(options.name === undefined ? {} : { name: options.name }), ...options.presence });
    options.signal?.addEventListener("abort", () => this.close());
    // No handler that is attached by the code that made the room misses anything.
    queueMicrotask(() => {
      if (options.signal?.aborted) this.close();
      else if (this.#end.state === undefined) this.#link.connect();
    });
  }

  /** The room's id. */
  get id(): string {
    return this.#options.room;
  }

  /** Id of this client in the room. */
  get clientId(): string {
    return this.#world.self;
  }

  /** The gateway's name of the present connection. */
  get connectionId(): string | undefined {
    return this.#connectionId;
  }

  /** State of the connection. */
  get state(): State {
    return this.#end.state ?? (this.#link.state === "closed" ? "connecting" : this.#link.state);
  }

  /** Who is in the room, this client included, by client id. It stays as it was while there is no connection. */
  get members(): ReadonlyMap<string, Member> {
    return this.#world.members;
  }

  /** What is in the room, this client's included, by entity id. */
  get entities(): ReadonlyMap<string, Entity> {
    return this.#world.entities;
  }

  /** The gateway's limits of this client, once they are known. */
  get limits(): Readonly<Limits> | undefined {
    return this.#limits;
  }

  /** Resolves when the room is open and its state is here, at once if it is; rejects when it is closed. */
  opened(): Promise<void> {
    return new Promise((resolve, reject) => {
      const check = ({ state, code, reason }: Partial<StateChange>): void => {
        if (state === "open") resolve();
        else if (state === "closed") reject(new Error(`The room is closed: ${code} ${reason}`));
        else return;
        off();
      };
      const off = this.on("state", check);
      check({ ...this.#end, state: this.state });
    });
  }

  /** Calls `handler` with every message of this name. Answers a function that ends it. */
  onCustom(name: string, handler: (data: Uint8Array, message: Custom) => unknown): () => void {
    return this.on("custom", (message) => (message.name === name ? handler(message.data, message) : undefined));
  }

  /** Lets an entity of this client appear, or anew. Others get it in any case; without a connection when there is one. */
  spawn(id: string, entity: Spawn = {}): void {
    this.#checkOpen();
    this.#belongings.spawn(id, entity);
  }

  /** Changes components of an entity of this client; those that are not named stay. */
  update(id: string, components: Readonly<Record<string, Component>>): void {
    this.#checkOpen();
    this.#belongings.update(id, components);
  }

  /** Lets an entity of this client disappear. */
  despawn(id: string): void {
    this.#checkOpen();
    this.#belongings.despawn(id);
  }

  /**
   * Moves an entity of this client. Sent at once and then 20 times a second at most: the newest position wins. Without a `rotation` the last
   * one stays.
   */
  move(id: string, position: Place, rotation?: Rotation): void {
    this.#checkOpen();
    this.#belongings.move(id, position, rotation);
  }

  /** Changes what others see of this client; what is not named stays. */
  setPresence(presence: Presence): void {
    this.#checkOpen();
    this.#show(presence);
    this.#sendPresence();
  }

  /** Says something to all others. */
  chat(text: string, options: SayOptions = {}): void {
    this.#say({ chatMessage: { message: text }, ...said(options) });
  }

  /** Says something to one client. */
  whisper(to: string, text: string, options: SayOptions = {}): void {
    this.#say({ chatMessage: { message: text, type: CHAT.WHISPER }, to, ...said(options) });
  }

  /** Sends a message of your own kind, to all others or to one client; text goes as UTF-8. */
  send(name: string, data: Uint8Array | string = "", { to, ...options }: SayOptions & { to?: string } = {}): void {
    this.#say({ custom: { name, data: toBytes(data) }, ...(to === undefined ? {} : { to }), ...said(options) });
  }

  /** Connects at once: again after `closed`, without waiting in `waiting`, anew while open. */
  connect(): void {
    this.#end = {};
    this.#link.connect();
  }

  /** Leaves the room, with a code that a browser may send (1000, 3000 to 4999). */
  close(code = 1000, reason = ""): void {
    if (this.state === "closed") return;
    if (this.#link.state === "closed") this.#changed({ state: "closed", previous: "connecting", attempt: 0, code, reason });
    else this.#link.close(code, reason);
  }

  async #authorize(request: CredentialRequest): Promise<{ url: string; token: string }> {
    const { url: base, room, userId } = this.#options;
    const url = new URL(typeof base === "string" ? base : base.href, (globalThis as { location?: { href: string } }).location?.href);
    url.pathname = `${url.pathname.replace(/\/$/, "")}/ws/${encodeURIComponent(room)}`;
    url.searchParams.set("client_id", this.clientId);
    if (userId !== undefined) url.searchParams.set("user_id", userId);
    const { displayName } = this.#presence;
    if (displayName) url.searchParams.set("display_name", displayName);
    return { url: url.href, token: this.#token ? await this.#token.get(request) : "" };
  }

  #opened(transport: Transport): void {
    this.#transport = transport;
    this.#acks = new Acks();
    this.#greeted = this.#presence;
    const { displayName = "" } = this.#presence;
    const hello = { clientId: this.clientId, displayName, version: VERSION, features: ["batch", "acks"], presence: this.#presence };
    transport.send(this.#codec.encode({ clientHello: hello }));
  }

  #frame(body: string | Uint8Array): void {
    const envelope = this.#codec.decode(body);
    // Another dialect, or the answer to the question for a sign of life.
    if (!envelope) return;
    if (envelope.payload.case === "serverHello") return this.#hello(envelope.payload.value);
    if (!this.#pages) return this.#take(envelope);
    this.#pages.held.push(envelope);
    if (this.#pages.held.length > HELD_MAX) this.#link.connect();
  }

  #hello({ more, limits, assignedClientId, connectionId, initialState }: ServerHello): void {
    this.#pages ??= { players: [], entities: [], held: [] };
    const pages = this.#pages;
    pages.players.push(...(initialState?.players ?? []));
    pages.entities.push(...(initialState?.entities ?? []));
    this.#limits = limits ?? this.#limits;
    this.#connectionId = connectionId || this.#connectionId;
    if (assignedClientId) this.#world.self = assignedClientId;
    if (more || !this.#transport) return;
    this.#pages = undefined;
    const initial = !this.#wasOpen;
    this.#wasOpen = true;
    const tell = this.#world.replace(pages.players, pages.entities, initial);
    const transport = this.#transport;
    this.#restore(transport, pages.entities);
    this.#refresh?.opened(transport);
    // A gateway may tell the whole state anew.
    if (this.#link.state !== "open") this.#link.ready();
    tell();
    for (const envelope of pages.held) if (this.#transport === transport) this.#take(envelope);
  }

  /** Sends what the room does not have any more, or not yet, of this client's; then all that waits. */
  #restore(transport: Transport, snapshots: EntitySnapshot[]): void {
    const { first, sendPositions } = this.#belongings.restore(snapshots);
    this.#pace.opened(transport, this.#limits?.messagesPerSecond, first);
    if (this.#presence !== this.#greeted) this.#sendPresence();
    sendPositions();
  }

  #take({ sender, reliable, seq, payload }: Envelope): void {
    if (reliable && seq > 0n && payload.case !== "presenceEvent") {
      this.#ackTimer ??= setTimeout(() => this.#acknowledge(), ACK_MS);
      if (!this.#acks.take(seq)) return;
    }
    // Messages of an earlier connection of this client. Its state is known here.
    if (sender !== this.clientId) this.#apply(sender, payload);
  }

  #apply(sender: string, { case: kind, value }: Payload): void {
    const world = this.#world;
    switch (kind) {
      case "positionUpdate":
        return world.move(value.entityId, sender, value.position, value.rotation);
      case "positionBatch":
        for (const { sender: from, update } of value.entries) {
          if (update && from !== this.clientId) world.move(update.entityId, from, update.position, update.rotation);
        }
        return;
      case "entitySpawn":
        return world.spawn(value.entityId, sender, value.templateId, value.components);
      case "entityUpdate":
        return world.update(value.entityId, sender, readable(value.components));
      case "entityDespawn":
        return world.despawn(value.entityId, sender);
      case "presenceEvent":
        if (value.clientId === this.clientId) return;
        if (value.eventType === PRESENCE.LEAVE) return world.leave(value.clientId);
        return world.present(value.clientId, value.data);
      case "chatMessage":
        return this.#tell("chat", { from: sender, member: world.members.get(sender), text: value.message, kind: kindOf(value.type) });
      case "custom":
        if (sender === "" && value.name === REFRESHED && this.#refresh?.accepted()) return;
        return this.#tell("custom", { from: sender, member: world.members.get(sender), name: value.name, data: value.data });
      case "error":
        return this.#refused(value);
    }
  }

  #refused({ code, message, retryAfterMs, messageId }: Payloads["error"]): void {
    const entityId = this.#belongings.refused(messageId, code);
    if (code === "rate_limited") this.#pace.rest(Math.min(retryAfterMs, REST_MAX_MS));
    if (code === "invalid_token") this.#refresh?.refused();
    const more = { ...(retryAfterMs > 0 ? { retryAfterMs } : {}), ...(entityId === undefined ? {} : { entityId }) };
    this.#problem({ code, message, ...more });
  }

  #acknowledge(): void {
    this.#ackTimer = undefined;
    const ack = this.#acks.flush();
    if (ack) this.#pace.urgent(this.#codec.encode({ ack }));
  }

  #show({ name, avatarUrl, avatar, position, rotation, hostClientId }: Presence): void {
    const changes: Partial<PresenceData> = {
      ...(name === undefined ? {} : { displayName: name }),
      ...(avatarUrl === undefined ? {} : { avatarUrl }),
      ...(avatar === undefined ? {} : { avatarConfig: avatar }),
      ...(position === undefined ? {} : { position: vector(position) }),
      ...(rotation === undefined ? {} : { rotation: turned(rotation) }),
      ...(hostClientId === undefined ? {} : { hostClientId }),
    };
    this.#presence = { ...this.#presence, ...changes };
    this.#world.setSelf({ displayName: "", avatarUrl: "", ...this.#presence }, name !== undefined);
  }

  #checkOpen(): void {
    if (this.state === "closed") throw new Error("The room is closed.");
  }

  #sendPresence(): void {
    this.#pace.newest("presence", PRESENCE_MS, () => this.#codec.encode({ presenceEvent: { eventType: PRESENCE.UPDATE, data: this.#presence } }));
  }

  /** Sends in order, over the next connection where there is none. */
  #say(message: Outgoing): void {
    this.#checkOpen();
    this.#pace.push(this.#encode(message), true);
  }

  #encode(message: Outgoing): string | Uint8Array {
    const data = this.#codec.encode(message);
    const { messageBytesMax: max = 0 } = this.#limits ?? {};
    // The gateway would end the connection for good.
    if (max > 0 && data.length * 3 > max && sizeOf(data) > max) throw new Error(`A message has at most ${max} bytes.`);
    return data;
  }

  #lost(end: End | undefined): void {
    clearTimeout(this.#ackTimer);
    this.#ackTimer = this.#transport = this.#pages = this.#connectionId = undefined;
    this.#belongings.lost();
    this.#refresh?.lost();
    if (end && isRateLimited(end.code, end.reason)) this.#pace.slower();
    this.#pace.lost();
  }

  #changed(change: StateChange): void {
    if (change.state === "closed") {
      this.#end = change;
      this.#pace.clear();
    }
    this.#tell("state", change);
  }

  #problem(problem: RoomProblem): void {
    this.#tell("error", problem);
  }

  /** Calls the handlers. An exception of one does not keep the event from the others. */
  #tell<K extends keyof RoomEvents>(event: K, value: RoomEvents[K]): void {
    if (!this.hears(event)) return;
    this.emit(event, value)?.catch((cause: unknown) => {
      if (event !== "error" && this.hears("error")) this.#problem({ code: "handler", message: `A handler threw: ${cause}`, cause });
      else console.error(cause);
    });
  }
}

/**
 * Enters a room. Its members see each other come, go, move and speak.
 *
 * ```ts
 * const room = connectRoom({
 *   url: "https://gateway.example", room: "lobby", name: "Ada",
 *   getToken: async () => (await fetch("/token", { method: "POST" })).text(),
 * });
 * room.on("chat", ({ member, text }) => show(member?.name, text));
 * await room.opened();
 * room.chat(`Hello to all ${room.members.size} of you`);
 * ```
 */
export function connectRoom(options: RoomOptions): Room {
  return new Room(options);
}

function said({ reliable }: SayOptions): { reliable?: boolean } {
  return reliable ? { reliable } : {};
}

function kindOf(type: number): Chat["kind"] {
  return type === CHAT.WHISPER ? "whisper" : type === CHAT.SHOUT ? "shout" : "normal";
}

function sizeOf(data: string | Uint8Array): number {
  return typeof data === "string" ? new TextEncoder().encode(data).length : data.length;
}

function randomId(): string {
  return Array.from({ length: 4 }, () => Math.floor(Math.random() * 2 ** 32).toString(36)).join("");
}

// Members and entities of a room as this client knows them. Knows neither a connection nor a clock.

import type { Avatar, EntitySnapshot, PlayerSnapshot, PresenceData, Rotation, Vector } from "./wire.ts";

/** Value of a component: bytes only where they are no text. */
export type Component = string | Uint8Array;

/** A client in the room. The object stays the same as long as the member stays, and has the newest values. */
export interface Member {
  readonly clientId: string;
  /** Name to show; empty where it has none. */
  readonly name: string;
  readonly avatarUrl: string | undefined;
  readonly avatar: Avatar | undefined;
  readonly position: Vector | undefined;
  readonly rotation: Rotation | undefined;
  readonly hostClientId: string | undefined;
}

/** Something that a member has put into the room. The object stays the same as long as the entity exists, and has the newest values. */
export interface Entity {
  readonly id: string;
  /** Client id of the member whose entity it is; empty: a worker's. */
  readonly owner: string;
  /** The kind of thing, in the application's words; empty where only positions of it have come. */
  readonly template: string;
  readonly components: Readonly<Record<string, Component>>;
  readonly position: Vector | undefined;
  readonly rotation: Rotation | undefined;
}

/** Events of members and entities. They tell what others do, and what the room does for them. */
export interface WorldEvents {
  /** A member has come; `initial`: it was there before this client. */
  join: { member: Member; initial: boolean };
  /** A member has left. */
  leave: { member: Member };
  /** A member has changed its presence. */
  presence: { member: Member };
  /** An entity has appeared; `initial`: it was there before this client. */
  spawn: { entity: Entity; initial: boolean };
  /** Components of an entity have changed: `components` holds these. */
  update: { entity: Entity; components: Readonly<Record<string, Component>> };
  /** An entity has disappeared. */
  despawn: { entity: Entity };
  /** An entity has another position. */
  move: { entity: Entity };
}

type Writable<T> = { -readonly [K in keyof T]: T[K] };
/** Tells an event. */
export type Tell = <K extends keyof WorldEvents>(event: K, value: WorldEvents[K]) => void;

/** The state of a room. Changes are told when the maps have them. */
export class World {
  readonly members: Map<string, Writable<Member>> = new Map();
  readonly entities: Map<string, Writable<Entity>> = new Map();
  readonly #tell: Tell;
  #self: string;
  /** Name that the gateway shows of this client, which may have it from the token. */
  #ownName = "";

  /** `self` is this client's id. */
  constructor(self: string, tell: Tell) {
    this.#self = self;
    this.#tell = tell;
  }

  /** Client id of this client. */
  get self(): string {
    return this.#self;
  }

  /** Another client id for this client: its own member and entities go with it. */
  set self(id: string) {
    const own = this.members.get(this.#self);
    if (own && id !== this.#self) {
      this.members.delete(this.#self);
      this.members.set(id, { ...own, clientId: id });
    }
    for (const entity of this.entities.values()) if (this.isOwn(entity)) entity.owner = id;
    this.#self = id;
  }

  /** True for an entity of this client. */
  isOwn(entity: Entity | undefined): boolean {
    return entity?.owner === this.#self;
  }

  /**
   * Takes the whole state of a room, and returns what there is to tell. This client's own member and entities stay as they are here, and so do a
   * worker's entities, which no state has; its own that are unknown here are added where `initial` is true.
   */
  replace(players: readonly PlayerSnapshot[], snapshots: readonly EntitySnapshot[], initial: boolean): () => void {
    const told: (() => void)[] = [];
    const tell: Tell = (event, value) => told.push(() => this.#tell(event, value));
    const [isPlayer, byId] = [new Set(players.map(({ clientId }) => clientId)), new Map(snapshots.map((each) => [each.id, each]))];
    for (const [id, entity] of this.entities) {
      const snapshot = byId.get(id);
      if (entity.owner === "" || this.isOwn(entity) || snapshot?.ownerId === entity.owner) continue;
      this.entities.delete(id);
      tell("despawn", { entity });
    }
    for (const [id, member] of this.members) {
      if (id === this.#self || isPlayer.has(id)) continue;
      this.members.delete(id);
      tell("leave", { member });
    }
    for (const { clientId, ...presence } of players) {
      // The state says nothing of a host.
      const known = this.members.get(clientId);
      const hostClientId = known?.hostClientId;
      if (clientId === this.#self) {
        this.#ownName = presence.displayName;
        if (known) known.name = this.#ownName || known.name;
      } else this.#present(clientId, { ...presence, hostClientId }, initial, tell);
    }
    for (const snapshot of snapshots) this.#snapshot(snapshot, initial, tell);
    return () => {
      for (const each of told) each();
    };
  }

  /** A member has come, or changed its presence. */
  present(clientId: string, presence: PresenceData | undefined): void {
    this.#present(clientId, presence ?? { displayName: "", avatarUrl: "" }, false, this.#tell);
  }

  /** A member has left: its entities go with it. */
  leave(clientId: string): void {
    const member = this.members.get(clientId);
    if (!member || clientId === this.#self) return;
    const gone = [...this.entities.values()].filter(({ owner }) => owner === clientId);
    for (const { id } of gone) this.entities.delete(id);
    this.members.delete(clientId);
    for (const entity of gone) this.#tell("despawn", { entity });
    this.#tell("leave", { member });
  }

  /** An entity has appeared, or appears anew. */
  spawn(id: string, owner: string, template: string, components: Record<string, Component>): void {
    this.#spawn({ id, owner, template, components, position: undefined, rotation: undefined }, false, this.#tell);
  }

  /** Components of an entity have changed. */
  update(id: string, owner: string, changed: Record<string, Component>): void {
    const entity = this.entities.get(id);
    if (entity?.owner === owner) this.#update(entity, changed, this.#tell);
  }

  /** An entity has disappeared. */
  despawn(id: string, owner: string): void {
    const entity = this.entities.get(id);
    if (entity?.owner !== owner) return;
    this.entities.delete(id);
    this.#tell("despawn", { entity });
  }

  /** An entity has another position. One that was never heard of appears. */
  move(id: string, owner: string, position: Vector | undefined, rotation: Rotation | undefined): void {
    const known = this.entities.get(id);
    if (!known) this.#spawn({ id, owner, template: "", components: {}, position: undefined, rotation: undefined }, false, this.#tell);
    else if (known.owner !== owner) return;
    this.#move(this.entities.get(id), position, rotation, this.#tell);
  }

  /** This client's own member shows `presence`, with another name than before where `isRenamed`. */
  setSelf(presence: PresenceData, isRenamed: boolean): void {
    if (isRenamed) this.#ownName = "";
    const own = this.members.get(this.#self);
    const values = shown({ ...presence, displayName: this.#ownName || presence.displayName });
    if (own) Object.assign(own, values);
    else this.members.set(this.#self, { clientId: this.#self, ...values });
  }

  /** This client's own entity is as the parts that are given say. */
  setOwn(id: string, parts: Partial<Omit<Entity, "id" | "owner">>): void {
    const own = this.entities.get(id);
    if (own) Object.assign(own, parts);
    else this.entities.set(id, { id, owner: this.#self, template: "", components: {}, position: undefined, rotation: undefined, ...parts });
  }

  #present(clientId: string, presence: PresenceData, initial: boolean, tell: Tell): void {
    const values = shown(presence);
    const known = this.members.get(clientId);
    if (!known) {
      const member = { clientId, ...values };
      this.members.set(clientId, member);
      tell("join", { member, initial });
    } else if (!same(known, { ...known, ...values })) {
      Object.assign(known, values);
      tell("presence", { member: known });
    }
  }

  #snapshot(snapshot: EntitySnapshot, initial: boolean, tell: Tell): void {
    const { id, ownerId: owner, templateId: template, position, rotation } = snapshot;
    const known = this.entities.get(id);
    if (owner === this.#self && (known || !initial)) return;
    const at = { position: point(position), rotation: quaternion(rotation) };
    this.#spawn({ id, owner, template, components: allComponents(snapshot), ...at }, initial, tell);
    this.#move(this.entities.get(id), position, rotation, tell);
  }

  #spawn(entity: Entity, initial: boolean, tell: Tell): void {
    const known = this.entities.get(entity.id);
    if (!known || known.owner !== entity.owner) {
      if (known) tell("despawn", { entity: known });
      this.entities.set(entity.id, entity);
      return tell("spawn", { entity, initial });
    }
    const { template, components } = entity;
    const isAnew = known.template !== template || Object.keys(known.components).some((name) => !Object.hasOwn(components, name));
    if (!isAnew) return this.#update(known, components, tell);
    Object.assign(known, { template, components });
    tell("spawn", { entity: known, initial });
  }

  #update(entity: Writable<Entity>, components: Readonly<Record<string, Component>>, tell: Tell): void {
    const changed = Object.entries(components).filter(([name, value]) => !same(entity.components[name], value));
    if (changed.length === 0) return;
    entity.components = { ...entity.components, ...Object.fromEntries(changed) };
    tell("update", { entity, components: Object.fromEntries(changed) });
  }

  #move(entity: Writable<Entity> | undefined, position: Vector | undefined, rotation: Rotation | undefined, tell: Tell): void {
    if (!entity || ((!position || samePlace(position, entity.position)) && (!rotation || samePlace(rotation, entity.rotation)))) return;
    entity.position = point(position) ?? entity.position;
    entity.rotation = quaternion(rotation) ?? entity.rotation;
    tell("move", { entity });
  }
}

/** All components of an entity in a state. */
export function allComponents({ components, binaryComponents }: EntitySnapshot): Record<string, Component> {
  return { ...components, ...binaryComponents };
}

/** Values of an update: text where the bytes are some. */
export function readable(components: Record<string, Uint8Array>): Record<string, Component> {
  return Object.fromEntries(Object.entries(components).map(([name, bytes]) => [name, decode(bytes)]));
}

/** True where two values are the same on the wire, which has numbers in single precision. */
export function same(a: unknown, b: unknown): boolean {
  if (typeof a === "number" && typeof b === "number") return Math.fround(a) === Math.fround(b);
  if (typeof a !== "object" || typeof b !== "object" || a === null || b === null) return a === b;
  const names = new Set([...Object.keys(a), ...Object.keys(b)]);
  return [...names].every((name) => same((a as Record<string, unknown>)[name], (b as Record<string, unknown>)[name]));
}

/** The same for two positions or two rotations. */
export function samePlace(a: Vector & { w?: number }, b: (Vector & { w?: number }) | undefined): boolean {
  const { fround } = Math;
  return b !== undefined && fround(a.x) === fround(b.x) && fround(a.y) === fround(b.y) && fround(a.z) === fround(b.z) && fround(a.w ?? 0) === fround(b.w ?? 0);
}

function shown({ displayName, avatarUrl, position, rotation, avatarConfig, hostClientId }: PresenceData): Omit<Member, "clientId"> {
  return {
    name: displayName,
    avatarUrl: avatarUrl || undefined,
    avatar: avatarConfig && appearance(avatarConfig),
    position: point(position),
    rotation: quaternion(rotation),
    hostClientId: hostClientId || undefined,
  };
}

// Plain values: a decoder may have put members of its own into what it gives.

function point(value: Vector | undefined): Vector | undefined {
  return value && { x: value.x, y: value.y, z: value.z };
}

function quaternion(value: Rotation | undefined): Rotation | undefined {
  return value && { x: value.x, y: value.y, z: value.z, w: value.w };
}

function appearance({ bodyType, primaryColor, secondaryColor, height, customModelUrl }: Avatar): Avatar {
  const all = { bodyType, primaryColor, secondaryColor, height, customModelUrl };
  return Object.fromEntries(Object.entries(all).filter(([, value]) => value !== undefined && value !== "" && value !== 0));
}

function decode(bytes: Uint8Array): Component {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return bytes;
  }
}

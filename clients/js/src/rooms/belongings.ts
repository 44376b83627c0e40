// This client's entities: what it does with them, and what the room has to be told of that, now or over the next connection.

import { vector, turned } from "./check.ts";
import type { Place, Spawn } from "./contract.ts";
import { repair, spawning, updating } from "./own.ts";
import type { Pace } from "./pace.ts";
import type { EntitySnapshot, Outgoing, Rotation } from "./wire.ts";
import type { Component, Entity, World } from "./world.ts";

const MOVE_MS = 50;
/** Spawns whose refusal would be understood. */
const SPAWNS_MAX = 256;
/** Codes with which a spawn is refused for what it is. */
const FINAL_CODES: readonly string[] = ["invalid_message", "room_state_full", "too_large", "wrong_sender"];

/** See the head of this file. */
export class Belongings {
  readonly #world: World;
  readonly #pace: Pace;
  readonly #encode: (message: Outgoing) => string | Uint8Array;
  readonly #tooLarge: (id: string, cause: unknown) => void;
  /** Entities that were moved and never spawned. */
  readonly #placed: Set<string> = new Set();
  /** Entities by the ids of the messages in which they were spawned. */
  readonly #spawns: Map<string, string> = new Map();
  #messages = 0;
  #sequence = 0;

  /** `encode` throws for a message that is too large; `tooLarge` is told of an entity that was made before the limit was known. */
  constructor(world: World, pace: Pace, encode: (message: Outgoing) => string | Uint8Array, tooLarge: (id: string, cause: unknown) => void) {
    this.#tooLarge = tooLarge;
    this.#world = world;
    this.#pace = pace;
    this.#encode = encode;
  }

  spawn(id: string, { template = "", components = {}, position, rotation }: Spawn): void {
    const known = this.#mine(id);
    const entity = {
      id,
      owner: this.#world.self,
      template,
      components: { ...components },
      position: position ? vector(position) : known?.position,
      rotation: rotation ? turned(rotation) : known?.rotation,
    };
    for (const message of spawning(entity)) this.#say(message);
    this.#placed.delete(id);
    this.#world.setOwn(id, entity);
    if (entity.position) this.#sendPosition(id);
  }

  update(id: string, components: Readonly<Record<string, Component>>): void {
    const known = this.#mine(id);
    if (!known) throw new Error(`This client has no entity ${id}.`);
    this.#say(updating(id, components));
    this.#world.setOwn(id, { components: { ...known.components, ...components } });
  }

  despawn(id: string): void {
    if (!this.#mine(id)) return;
    this.#say({ entityDespawn: { entityId: id } });
    this.#world.entities.delete(id);
    this.forget(id);
  }

  move(id: string, position: Place, rotation: Rotation | undefined): void {
    const known = this.#mine(id);
    this.#world.setOwn(id, { position: vector(position), rotation: rotation ? turned(rotation) : known?.rotation });
    if (!known) this.#placed.add(id);
    this.#sendPosition(id);
  }

  /** Returns what goes first over a new connection to a room with these entities, and sends positions when it is open. */
  restore(snapshots: readonly EntitySnapshot[]): { first: (string | Uint8Array)[]; sendPositions: () => void } {
    const { self, entities } = this.#world;
    const own = [...entities.values()].filter((entity) => this.#world.isOwn(entity));
    const { messages, moved } = repair(own, this.#placed, snapshots.filter(({ ownerId }) => ownerId === self));
    const first: (string | Uint8Array)[] = [];
    for (const message of messages) {
      try {
        first.push(this.#encode(this.#numbered(message)));
      } catch (cause) {
        const id = (message.entitySpawn ?? message.entityUpdate)?.entityId ?? "";
        this.#world.despawn(id, self);
        this.#tooLarge(id, cause);
      }
    }
    return {
      first,
      sendPositions: () => {
        for (const id of moved) if (entities.has(id)) this.#sendPosition(id);
      },
    };
  }

  /** The gateway has refused the message of this id. Returns the entity that was spawned in it. */
  refused(messageId: string, code: string): string | undefined {
    const id = this.#spawns.get(messageId);
    // The room does not have it, and would refuse it again.
    if (id !== undefined && FINAL_CODES.includes(code)) this.#world.despawn(id, this.#world.self);
    return id;
  }

  /** There is nothing more to send of the entity `id`. */
  forget(id: string): void {
    this.#placed.delete(id);
    this.#pace.drop(keyOf(id));
  }

  /** The connection is lost. */
  lost(): void {
    this.#spawns.clear();
  }

  /** Returns the entity `id` if it is this client's, nothing if there is none. Throws if it is another's. */
  #mine(id: string): Entity | undefined {
    const entity = this.#world.entities.get(id);
    if (entity && !this.#world.isOwn(entity)) throw new Error(`The entity ${id} belongs to ${entity.owner || "a worker"}.`);
    return entity;
  }

  /** Sends `message`; without a connection nothing, since `restore` makes it good. Throws where it is too large in any case. */
  #say(message: Outgoing): void {
    if (!this.#pace.isOpen) this.#encode(message);
    else this.#pace.push(this.#encode(this.#numbered(message)), false);
  }

  /** A spawn gets a number, so that its refusal can be told from others. */
  #numbered(message: Outgoing): Outgoing {
    if (!message.entitySpawn) return message;
    const messageId = String((this.#messages += 1));
    this.#spawns.set(messageId, message.entitySpawn.entityId);
    for (const old of this.#spawns.keys()) {
      if (this.#spawns.size <= SPAWNS_MAX) break;
      this.#spawns.delete(old);
    }
    return { ...message, messageId };
  }

  #sendPosition(id: string): void {
    this.#pace.newest(keyOf(id), MOVE_MS, () => {
      const { position, rotation } = this.#world.entities.get(id) ?? {};
      this.#sequence = (this.#sequence + 1) >>> 0;
      return this.#encode({ positionUpdate: { entityId: id, position, rotation, sequenceNumber: this.#sequence } });
    });
  }
}

function keyOf(entityId: string): string {
  return `move ${entityId}`;
}

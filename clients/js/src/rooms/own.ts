// This client's part of a room, and what it has to say so that the room shows it. Knows neither a connection nor a clock.

import type { EntitySnapshot, Outgoing } from "./wire.ts";
import { allComponents, type Component, type Entity, same, samePlace } from "./world.ts";

/** An entity and its newest position: what of it the room does not have. */
export interface Repair {
  /** Messages that go first, in order. */
  messages: Outgoing[];
  /** Ids of entities whose position is to be sent. */
  moved: string[];
}

/**
 * Returns what the room lacks of `own`, this client's entities, where it has `held`. Entities that it has beyond them are to go. Those in `placed`
 * were only moved, never spawned.
 */
export function repair(own: Iterable<Entity>, placed: ReadonlySet<string>, held: readonly EntitySnapshot[]): Repair {
  const rest = new Map(held.map((snapshot) => [snapshot.id, snapshot]));
  const [messages, moved]: [Outgoing[], string[]] = [[], []];
  for (const entity of own) {
    const { id, template, components, position, rotation } = entity;
    const snapshot = rest.get(id);
    rest.delete(id);
    if (!snapshot) {
      if (!placed.has(id)) messages.push(...spawning(entity));
      if (position) moved.push(id);
      continue;
    }
    const had = allComponents(snapshot);
    const isOther = snapshot.templateId !== template || Object.keys(had).some((name) => !Object.hasOwn(components, name));
    if (isOther) messages.push(...spawning(entity));
    else {
      const changed = Object.entries(components).filter(([name, value]) => !same(value, had[name]));
      if (changed.length > 0) messages.push(updating(id, Object.fromEntries(changed)));
    }
    const isThere = (!position || samePlace(position, snapshot.position)) && (!rotation || samePlace(rotation, snapshot.rotation));
    if (!isThere) moved.push(id);
  }
  for (const id of rest.keys()) messages.push({ entityDespawn: { entityId: id } });
  return { messages, moved };
}

/** The messages by which `entity` appears. */
export function spawning({ id, template, components }: Entity): Outgoing[] {
  const [text, bytes]: [Record<string, string>, Record<string, Uint8Array>] = [{}, {}];
  for (const [name, value] of Object.entries(components)) {
    if (typeof value === "string") text[name] = value;
    else bytes[name] = toBytes(value);
  }
  const messages: Outgoing[] = [{ entitySpawn: { entityId: id, templateId: template, components: text } }];
  if (Object.keys(bytes).length > 0) messages.push({ entityUpdate: { entityId: id, components: bytes } });
  return messages;
}

/** The message by which components of the entity `id` change. */
export function updating(id: string, components: Readonly<Record<string, Component>>): Outgoing {
  const bytes = Object.entries(components).map(([name, value]) => [name, toBytes(value)] as const);
  return { entityUpdate: { entityId: id, components: Object.fromEntries(bytes) } };
}

/** `value` as bytes of the plain kind: Node's `Buffer` has a JSON form of its own. */
export function toBytes(value: Component): Uint8Array {
  return typeof value === "string" ? new TextEncoder().encode(value) : new Uint8Array(value.buffer, value.byteOffset, value.byteLength);
}

// Members and entities of a room: whatever comes, the events tell exactly how the maps have changed.

import { expect, test } from "vitest";
import type { EntitySnapshot, PlayerSnapshot } from "../../src/rooms/wire.ts";
import { World, type WorldEvents } from "../../src/rooms/world.ts";

const ME = "me";
const CLIENTS = ["a", "b", "c"];
const ENTITIES = ["x", "y", "z", "w"];

/** Numbers in [0, 1) that are the same in every run. */
function numbers(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state * 1_664_525 + 1_013_904_223) % 2 ** 32;
    return state / 2 ** 32;
  };
}

/** What a program knows that has heard the events only. */
class Listener {
  readonly members: Map<string, string> = new Map();
  readonly entities: Map<string, { owner: string; template: string; components: Record<string, unknown>; x: number | undefined }> = new Map();
  readonly seen: string[] = [];

  hear<K extends keyof WorldEvents>(event: K, value: WorldEvents[K]): void {
    const { member, entity, components = {} } = value as Partial<WorldEvents["join"] & WorldEvents["update"]>;
    const id = member?.clientId ?? entity?.id ?? "";
    this.seen.push(`${event} ${id}`);
    // Entities of this client are its own matter. It hears of one that it has forgotten, or that another client has taken.
    if (entity?.owner === ME) return;
    const isKnown = this.members.has(id) || this.entities.has(id);
    switch (event) {
      case "join":
        if (isKnown) throw new Error(`${id} has joined twice.`);
        this.members.set(id, member?.name ?? "");
        return;
      case "presence":
        this.members.set(id, member?.name ?? "");
        break;
      case "leave":
        this.members.delete(id);
        break;
      case "spawn":
        if (entity) this.entities.set(id, { owner: entity.owner, template: entity.template, components: { ...entity.components }, x: this.entities.get(id)?.x ?? entity.position?.x });
        return;
      case "update":
        Object.assign(this.entities.get(id)?.components ?? {}, components);
        break;
      case "move": {
        const held = this.entities.get(id);
        if (held) held.x = entity?.position?.x;
        break;
      }
      case "despawn":
        this.entities.delete(id);
    }
    if (!isKnown) throw new Error(`${event} of ${id}, which is unknown.`);
  }
}

function others(world: World): unknown {
  return {
    members: [...world.members.values()].filter(({ clientId }) => clientId !== ME).map(({ clientId, name }) => [clientId, name]).sort(),
    entities: [...world.entities.values()].filter(({ owner }) => owner !== ME)
      .map(({ id, owner, template, components, position }) => [id, owner, template, { ...components }, position?.x]).sort(),
  };
}

function heard({ members, entities }: Listener): unknown {
  return {
    members: [...members].sort(),
    entities: [...entities].map(([id, { owner, template, components, x }]) => [id, owner, template, components, x]).sort(),
  };
}

test.each(Array.from({ length: 200 }, (_, seed) => seed))("what is told is what has changed (%i)", (seed) => {
  const random = numbers(seed);
  const pick = <T>(values: readonly T[]): T => values[Math.floor(random() * values.length)] as T;
  const place = (): { x: number; y: number; z: number } => ({ x: Math.floor(random() * 3) / 10, y: 0, z: 0 });
  const parts = (): Record<string, string> => Object.fromEntries(["p", "q"].filter(() => random() < 0.7).map((name) => [name, pick(["1", "2"])]));
  const listener = new Listener();
  const world = new World(ME, (event, value) => listener.hear(event, value));
  world.setSelf({ displayName: "Me", avatarUrl: "" }, true);

  /** A state as the gateway has it: every entity has an owner who is there. */
  const state = (): [PlayerSnapshot[], EntitySnapshot[]] => {
    const here = CLIENTS.filter(() => random() < 0.6);
    const players = [...here, ME].map((clientId) => ({ clientId, displayName: pick(["A", "B"]), avatarUrl: "" }));
    const entities = here.length === 0 ? [] : ENTITIES.filter(() => random() < 0.6).map((id) => ({
      id, ownerId: pick([...here, ME]), templateId: pick(["t", "u"]), components: parts(), binaryComponents: {}, position: random() < 0.7 ? place() : undefined,
    }));
    return [players, entities];
  };

  const actions = [
    () => world.replace(...state(), random() < 0.2)(),
    () => world.present(pick(CLIENTS), { displayName: pick(["A", "B"]), avatarUrl: "" }),
    () => world.leave(pick([...CLIENTS, ME])),
    () => world.spawn(pick(ENTITIES), pick(CLIENTS), pick(["t", "u"]), parts()),
    () => world.update(pick(ENTITIES), pick([...CLIENTS, ""]), parts()),
    () => world.despawn(pick(ENTITIES), pick(CLIENTS)),
    () => world.move(pick(ENTITIES), pick([...CLIENTS, ""]), place(), undefined),
    () => {
      const id = pick(ENTITIES);
      if (!world.entities.has(id) || world.isOwn(world.entities.get(id))) world.setOwn(id, { position: place() });
    },
  ];
  for (let step = 0; step < 60; step += 1) {
    pick(actions)();
    expect(heard(listener)).toEqual(others(world));
  }
  const [players, entities] = state();
  world.replace(players, entities, false)();
  listener.seen.length = 0;
  world.replace(players, entities, false)();
  expect(listener.seen).toEqual([]);
});

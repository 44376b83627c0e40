// Rooms against the real gateway, two instances of it, and Redis: all members see the same, over cuts and restarts.

import { afterAll, afterEach, beforeAll, describe, expect, test } from "vitest";
import { WebSocket } from "ws";
import type { StateChange } from "../src/index.ts";
import { binary } from "../src/rooms/binary.ts";
import { connectRoom, type Room, type RoomOptions } from "../src/rooms/index.ts";
import { Cable, Gateway, jwt, Redis, SECRET, stopAll, until } from "./support/machines.ts";
import { watch } from "./support/rooms.ts";

const settings = {
  WSPROXY_ENDPOINTS__ROOMS: "true",
  WSPROXY_RATE_LIMIT__MAX_REQUESTS: "0",
  WSPROXY_ROOMS__ENTITIES_MAX: "2000",
};
let redis: Redis;
let gateway: Gateway;
let other: Gateway;
let cable: Cable;
let open: Room[] = [];
let count = 0;

beforeAll(async () => {
  redis = await Redis.start();
  gateway = await Gateway.start(redis, settings);
  other = await Gateway.start(redis, settings);
  cable = await Cable.to(gateway.port);
});

afterAll(async () => {
  await cable?.end();
  await gateway?.stop();
  await other?.stop();
  await redis?.end();
  stopAll();
});

afterEach(() => {
  for (const room of open) room.close();
  open = [];
});

const id = (): string => `r-${(count += 1)}`;

/** A room that begins to connect. */
function begin(room: string, user: string, options: Partial<RoomOptions> = {}, via: { url: string } = gateway): Room {
  const made = connectRoom({
    url: via.url, room, name: user, clientId: `c-${user}`, WebSocket, backoff: { baseMs: 20, maxMs: 200 }, getToken: () => jwt(user), ...options,
  });
  open.push(made);
  return made;
}

/** A room that is open. */
async function enter(...args: Parameters<typeof begin>): Promise<Room> {
  const room = begin(...args);
  await room.opened();
  return room;
}

const reopened = (room: Room): Promise<void> => new Promise((resolve) => room.on("state", ({ state }) => state === "open" && resolve()));
const closed = (room: Room): Promise<StateChange> => new Promise((resolve) => room.on("state", (change) => change.state === "closed" && resolve(change)));

/** What two members agree on: all but the small differences of their forms. */
function picture({ members, entities }: Room): unknown {
  const people = [...members.values()].map(({ clientId, name, avatarUrl }) => [clientId, name, avatarUrl]).sort();
  const things = [...entities.values()].map(({ id, owner, template, components, position }) => {
    const sorted = Object.entries(components).map(([name, value]) => [name, typeof value === "string" ? value : [...value]]).sort();
    return [id, owner, template, sorted, position && [position.x, position.y, position.z].map(Math.fround)];
  });
  return { people, things: things.sort() };
}

const agree = (...rooms: Room[]): Promise<void> =>
  until("all members agree", () => new Set(rooms.map((room) => JSON.stringify(picture(room)))).size === 1).catch((error: unknown) => {
    throw new Error(`${error}\n${rooms.map((room) => JSON.stringify(picture(room))).join("\n")}`);
  });

test("members with text and binary messages, at two instances, see the same", async () => {
  const room = id();
  const [ada, bob] = [await enter(room, "ada"), await enter(room, "bob", { binary }, other)];
  await until("both are there", () => ada.members.size === 2 && bob.members.size === 2);
  const seen = [watch(ada), watch(bob)];
  ada.spawn("lamp", { template: "lamp", components: { color: "red", mesh: new Uint8Array([255, 0]) }, position: { x: 0.1, y: 2 } });
  bob.spawn("cube", { position: { x: 1, y: 1, z: 1 }, rotation: { x: 0, y: 0, z: 0, w: 1 } });
  ada.setPresence({ avatarUrl: "a.glb" });
  ada.update("lamp", { color: "blue" });
  ada.chat("hällo \ud83d\ude00");
  bob.send("dice", new Uint8Array([6, 255]));
  await until("the messages", () => seen[1]?.some((word) => word.startsWith("chat")) && seen[0]?.some((word) => word.startsWith("custom")));
  await agree(ada, bob);
  expect(seen[0]).toContain("custom c-bob dice 6,255");
  expect(seen[1]).toContain("chat c-ada hällo \ud83d\ude00 normal");
  const late = await Promise.all([enter(room, "cyd"), enter(room, "dan", { binary }, other)]);
  await agree(ada, bob, ...late);
  expect(late[0]?.entities.get("cube")?.rotation).toEqual({ x: 0, y: 0, z: 0, w: 1 });
  bob.despawn("cube");
  await agree(ada, bob, ...late);
  bob.close();
  await until("bob is gone", () => [ada, ...late].every(({ members }) => members.size === 3));
  await agree(ada, ...late);
});

test("a whisper reaches one client only", async () => {
  const room = id();
  const rooms = [await enter(room, "ada"), await enter(room, "bob", {}, other), await enter(room, "cyd", { binary })];
  const seen = rooms.map(watch);
  await until("all are there", () => rooms.every(({ members }) => members.size === 3));
  rooms[0]?.whisper("c-bob", "psst");
  rooms[0]?.send("secret", "x", { to: "c-cyd" });
  rooms[0]?.chat("end");
  await until("the end", () => seen.slice(1).every((words) => words.some((word) => word.includes("end"))));
  expect(seen[1]?.filter((word) => /^(chat|custom)/.test(word))).toEqual(["chat c-ada psst whisper", "chat c-ada end normal"]);
  expect(seen[2]?.filter((word) => /^(chat|custom)/.test(word))).toEqual(["custom c-ada secret 120", "chat c-ada end normal"]);
});

describe.each(["text", "binary"])("a lost connection, %s", (form) => {
  const codec = form === "binary" ? { binary } : {};

  test("is nothing that others see, and what changed meanwhile is made good", async () => {
    const room = id();
    const [ada, bob] = [await enter(room, "ada", codec, cable), await enter(room, "bob", {}, other)];
    ada.spawn("lamp", { template: "lamp", components: { color: "red" }, position: { x: 1, y: 0 } });
    ada.spawn("gone");
    ada.setPresence({ avatarUrl: "a.glb" });
    bob.spawn("cube", { position: { x: 1, y: 0 } });
    await agree(ada, bob);
    const [seenByAda, seenByBob] = [watch(ada), watch(bob)];
    cable.plugged = false;
    cable.cut();
    await until("it is lost", () => ada.state !== "open");
    ada.move("lamp", { x: 5, y: 0 });
    ada.update("lamp", { color: "blue" });
    ada.despawn("gone");
    ada.chat("while away");
    bob.move("cube", { x: 7, y: 0 });
    bob.spawn("new");
    cable.plugged = true;
    await reopened(ada);
    await until("the chat", () => seenByBob.some((word) => word.startsWith("chat")));
    await agree(ada, bob);
    expect(seenByBob.filter((word) => !word.startsWith("presence")).sort()).toEqual(["chat c-ada while away normal", "despawn gone", "move lamp 5", "update lamp color"].sort());
    expect(seenByAda.sort()).toEqual(["move cube 7", "spawn c-bob/new"]);
    expect(seenByBob.filter((word) => word.startsWith("presence"))).toEqual([]);
  });
});

test("a member that comes back at another instance was never away", async () => {
  const room = id();
  const [ada, bob, cyd] = [await enter(room, "ada", {}, cable), await enter(room, "bob"), await enter(room, "cyd", { binary }, other)];
  ada.spawn("lamp", { components: { color: "red" }, position: { x: 1, y: 2 } });
  await until("all are there", () => [ada, bob, cyd].every(({ members, entities }) => members.size === 3 && entities.size === 1));
  await agree(ada, bob, cyd);
  const seen = [watch(ada), watch(bob), watch(cyd)];
  try {
    cable.target = other.port;
    cable.cut();
    await reopened(ada);
    ada.move("lamp", { x: 3, y: 2 });
    bob.chat("still here");
    await until("the chat", () => seen[0]?.some((word) => word.startsWith("chat")));
    await until("the move", () => [bob, cyd].every(({ entities }) => entities.get("lamp")?.position?.x === 3));
    // The grace of the lost connection is over.
    await new Promise((resolve) => setTimeout(resolve, 6_000));
    await agree(ada, bob, cyd);
    expect(seen.map((words) => words.sort())).toEqual([["chat c-bob still here normal"], ["move lamp 3"], ["chat c-bob still here normal", "move lamp 3"]]);
  } finally {
    cable.target = gateway.port;
  }
});

test("members come back after a restart of their instance, with what they have", async () => {
  const room = id();
  const third = await Gateway.start(redis, { ...settings, WSPROXY_SERVER__SHUTDOWN_TIMEOUT: "10s" });
  try {
    const [ada, bob] = [await enter(room, "ada", {}, third), await enter(room, "bob", { binary })];
    ada.spawn("lamp", { template: "lamp", components: { color: "red" }, position: { x: 1, y: 2 } });
    await agree(ada, bob);
    await third.stop("SIGKILL");
    await until("it is lost", () => ada.state !== "open");
    const back = reopened(ada);
    await third.restart();
    await back;
    await agree(ada, bob);
    expect([bob.members.size, bob.entities.size]).toEqual([2, 1]);
  } finally {
    await third.stop("SIGKILL");
  }
});

test("an emptied Redis takes no member and no entity away", async () => {
  const room = id();
  const rooms = [await enter(room, "ada"), await enter(room, "bob", { binary }, other)];
  for (const [at, each] of rooms.entries()) {
    each.spawn(`e-${at}`, { template: "t", components: { n: String(at) }, position: { x: at, y: 0 } });
    each.setPresence({ avatarUrl: `${at}.glb` });
  }
  await agree(...(rooms as [Room, Room]));
  await until("both have both", () => rooms.every(({ members, entities }) => members.size === 2 && entities.size === 2));
  const seen = rooms.map(watch);
  await redis.command("FLUSHALL");
  await until("the members are back in Redis", async () => !(await redis.command("HLEN", `{room:${room}}:members`)).startsWith(":0"));
  await new Promise((resolve) => setTimeout(resolve, 3_000));
  const late = await enter(room, "cyd");
  await until("all are there", () => [...rooms, late].every(({ members, entities }) => members.size === 3 && entities.size === 2));
  await agree(...rooms, late);
  for (const words of seen) expect(words).toEqual(["join c-cyd"]);
});

test("a second client of the same id replaces the first, one of another user is refused", async () => {
  const room = id();
  const first = await enter(room, "ada");
  const end = closed(first);
  const second = await enter(room, "ada");
  expect(await end).toMatchObject({ code: 4001 });
  const thief = begin(room, "bob", { clientId: "c-ada" });
  expect(await closed(thief)).toMatchObject({ status: 409 });
  expect(second.state).toBe("open");
});

test("a token that does not open the room ends it", async () => {
  const claims = { rooms: ["lobby", "team-*"], name: "Ada of the token" };
  const refused = begin(id(), "ada", { getToken: () => jwt("ada", 60, SECRET, claims) });
  expect(await closed(refused)).toMatchObject({ status: 403, reason: "room_forbidden" });
  const allowed = await enter("team-1", "ada", { getToken: () => jwt("ada", 60, SECRET, claims) });
  expect(allowed.members.get("c-ada")?.name).toBe("Ada of the token");
});

test("a member changes its name, unless the token has it", async () => {
  const room = id();
  const [ada, bob] = [await enter(room, "ada"), await enter(room, "bob", { getToken: () => jwt("bob", 60, SECRET, { name: "Bob of the token" }) }, other)];
  await until("both are there", () => ada.members.size === 2 && bob.members.size === 2);
  bob.setPresence({ name: "Bobby", avatarUrl: "b.glb" });
  ada.setPresence({ name: "Countess" });
  await until("the new name", () => bob.members.get("c-ada")?.name === "Countess");
  await until("the avatar", () => ada.members.get("c-bob")?.avatarUrl === "b.glb");
  expect(ada.members.get("c-bob")?.name).toBe("Bob of the token");
  const late = await enter(room, "cyd", {}, other);
  expect([...late.members.values()].map(({ name }) => name).sort()).toEqual(["Bob of the token", "Countess", "cyd"]);
});

test.each(["text", "binary"])("a token is replaced on the open connection, %s", async (form) => {
  const reasons: string[] = [];
  const room = await enter(id(), "ada", {
    ...(form === "binary" ? { binary } : {}), getToken: ({ reason }) => (reasons.push(reason), jwt("ada", reason === "initial" ? 4 : 600)),
  });
  const states: StateChange[] = [];
  room.on("state", (change) => states.push(change));
  await new Promise((resolve) => room.on("refreshed", resolve));
  expect(reasons).toEqual(["initial", "refresh"]);
  expect(states).toEqual([]);
});

test("a burst keeps below the gateway's limit, and nothing of it is lost", async () => {
  const room = id();
  const [ada, bob] = [await enter(room, "ada"), await enter(room, "bob", { binary }, other)];
  const seen = watch(bob);
  const problems = watch(ada);
  for (let n = 0; n < 250; n += 1) {
    ada.chat(String(n));
    ada.move("cursor", { x: n, y: 0 });
  }
  await until("all has come", () => seen.some((word) => word === "chat c-ada 249 normal") && bob.entities.get("cursor")?.position?.x === 249);
  expect(seen.filter((word) => word.startsWith("chat"))).toEqual(Array.from({ length: 250 }, (_, n) => `chat c-ada ${n} normal`));
  expect(problems.filter((word) => word.startsWith("error"))).toEqual([]);
});

test("reliable messages come once and are acknowledged, so that none is sent again", async () => {
  const patient = await Gateway.start(redis, { ...settings, WSPROXY_ROOMS__ACK_INTERVAL: "1s" });
  let frames = 0;
  class Counting extends WebSocket {
    constructor(...args: ConstructorParameters<typeof WebSocket>) {
      super(...args);
      this.on("message", () => (frames += 1));
    }
  }
  try {
    const room = id();
    const own = { WebSocket: Counting };
    const rooms = [await enter(room, "ada"), await enter(room, "bob", own, patient), await enter(room, "cyd", { binary, ...own }, patient)];
    const seen = rooms.map(watch);
    await until("all are there", () => rooms.every(({ members }) => members.size === 3));
    for (let n = 0; n < 60; n += 1) rooms[0]?.chat(String(n), { reliable: true });
    rooms[0]?.send("dice", "six", { to: "c-cyd", reliable: true });
    await until("the last", () => seen[2]?.includes("custom c-ada dice 115,105,120") && seen[1]?.includes("chat c-ada 59 normal"));
    const before = frames;
    await new Promise((resolve) => setTimeout(resolve, 2_500));
    expect(frames).toBe(before);
    for (const words of seen.slice(1)) expect(words.filter((word) => word.startsWith("chat"))).toEqual(Array.from({ length: 60 }, (_, n) => `chat c-ada ${n} normal`));
  } finally {
    await patient.stop("SIGKILL");
  }
});

test("positions that change fast arrive with the newest", async () => {
  const room = id();
  const rooms = [await enter(room, "ada"), await enter(room, "bob", { binary }), await enter(room, "cyd", {}, other)];
  await until("all are there", () => rooms.every(({ members }) => members.size === 3));
  let told = 0;
  rooms[1]?.on("move", () => (told += 1));
  const since = Date.now();
  for (let n = 0; Date.now() - since < 1_000; n += 1) {
    for (const [at, each] of rooms.entries()) each.move(`cursor-${at}`, { x: n, y: at });
    await new Promise((resolve) => setTimeout(resolve, 4));
  }
  await agree(...rooms);
  expect(told).toBeLessThan(2 * 30);
  expect(told).toBeGreaterThan(10);
});

test("a large state comes in pages", async () => {
  const big = await Gateway.start(redis, { ...settings, WSPROXY_ROOMS__MESSAGES_PER_SECOND: "0" });
  try {
    const room = id();
    const ada = await enter(room, "ada", { queueMax: 2_000 }, big);
    const ids = Array.from({ length: 1_500 }, (_, n) => `e-${n}`);
    for (const each of ids) ada.spawn(each, { template: "t", components: { n: each } });
    const bob = await enter(room, "bob", { binary }, big);
    await until("bob has all", () => bob.entities.size === ids.length);
    const cyd = await enter(room, "cyd", {}, big);
    expect(cyd.entities.size).toBe(ids.length);
    await agree(ada, bob, cyd);
  } finally {
    await big.stop("SIGKILL");
  }
});

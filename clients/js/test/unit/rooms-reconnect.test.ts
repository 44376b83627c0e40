// Rooms that come back: the same member with the same entities, and events for what is different only.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { GiveUp, type StateChange } from "../../src/index.ts";
import type { Room, RoomOptions } from "../../src/rooms/index.ts";
import { FakeSocket } from "../support/fake-socket.ts";
import { closeAll, enter, entered, FORMS, hello, ME, say, sent, turn, watch } from "../support/rooms.ts";

beforeEach(() => {
  vi.useFakeTimers();
  FakeSocket.all = [];
});

afterEach(() => {
  closeAll();
  vi.useRealTimers();
});

const changesOf = (room: Room): StateChange[] => {
  const changes: StateChange[] = [];
  room.on("state", (change) => changes.push(change));
  return changes;
};

/** The network breaks, and the client is back before the gateway greets. */
async function back(): Promise<void> {
  FakeSocket.last.end(1006);
  await turn(500);
  FakeSocket.last.open();
}

const ada = { clientId: "c-ada", displayName: "Ada" };
const bob = { clientId: "c-bob", displayName: "Bob" };
const dot = { id: "dot", templateId: "dot", ownerId: "c-ada", components: { color: "red" }, position: { x: 0.1, y: 2 } };

describe.each(FORMS)("%s", (form) => {
  test("after a lost connection events tell the differences only", async () => {
    const room = await enter({ name: "Me" }, form);
    FakeSocket.last.open();
    const me = { clientId: ME, displayName: "Me" };
    hello({ players: [me, ada, bob], entities: [dot, { ...dot, id: "old" }, { ...dot, id: "b", ownerId: "c-bob" }] });
    const held = room.entities.get("dot");
    const seen = watch(room);
    await back();
    expect([room.members.size, room.entities.size]).toEqual([3, 3]);
    hello({
      players: [me, { ...ada, displayName: "Countess" }, { clientId: "c-new" }],
      entities: [{ ...dot, components: { color: "red", size: "2" }, position: { x: 5 } }, { ...dot, id: "new" }],
    });
    expect(seen).toEqual(["despawn old", "despawn b", "leave c-bob", "presence c-ada Countess", "join c-new", "update dot size", "move dot 5", "spawn c-ada/new"]);
    expect(room.entities.get("dot")).toBe(held);
    seen.length = 0;
    await back();
    hello({
      players: [me, { ...ada, displayName: "Countess" }, { clientId: "c-new" }],
      entities: [{ ...dot, components: { color: "red", size: "2" }, position: { x: 5 } }, { ...dot, id: "new" }],
    });
    expect(seen).toEqual([]);
    expect(sent()).toEqual([]);
  });

  test("the same client id comes back, without a word where the room has everything", async () => {
    const room = await entered({ name: "Me" }, form);
    room.spawn("dot", { template: "cube", components: { color: "red", mesh: new Uint8Array([255]) }, position: { x: 0.1, y: 0.2 } });
    room.setPresence({ avatarUrl: "a.glb", position: { x: 0.1, y: 0 } });
    await back();
    expect(FakeSocket.last.url.searchParams.get("client_id")).toBe(ME);
    const mine = { id: "dot", templateId: "cube", ownerId: ME, components: { color: "red" }, binaryComponents: { mesh: "/w==" } };
    hello({
      players: [{ clientId: ME, displayName: "Me" }],
      entities: [{ ...mine, position: { x: 0.1, y: 0.2 } }],
    });
    await turn(1_000);
    expect(sent()).toEqual([]);
  });

  test("what the room does not have any more is sent again", async () => {
    const room = await entered({ name: "Me" }, form);
    const seen = watch(room);
    room.spawn("dot", { template: "cube", components: { color: "red", mesh: new Uint8Array([255]) }, position: { x: 1, y: 0 } });
    room.move("cursor", { x: 2, y: 0 });
    room.spawn("bare");
    await back();
    hello({ players: [ada] });
    await turn(1_000);
    const position = (x: number): object => (form === "text" ? { x, y: 0, z: 0 } : { x });
    expect(sent()).toEqual([
      { messageId: "3", entitySpawn: expect.objectContaining({ entityId: "dot", templateId: "cube", components: { color: "red" } }) },
      { entityUpdate: { entityId: "dot", components: { mesh: "/w==" } } },
      { messageId: "4", entitySpawn: expect.objectContaining({ entityId: "bare" }) },
      { positionUpdate: { entityId: "dot", position: position(1), sequenceNumber: expect.any(Number) } },
      { positionUpdate: { entityId: "cursor", position: position(2), sequenceNumber: expect.any(Number) } },
    ]);
    expect(seen).toEqual(["join c-ada"]);
    expect([...room.entities.keys()]).toEqual(["dot", "cursor", "bare"]);
  });

  test("what changed without a connection is sent as it is now", async () => {
    const room = await entered({}, form);
    for (const id of ["a", "b", "c"]) room.spawn(id, { template: "t", components: { n: "1" }, position: { x: 0, y: 0 } });
    FakeSocket.last.end(1006);
    room.move("a", { x: 1, y: 0 });
    room.move("a", { x: 2, y: 0 });
    room.update("b", { n: "2" });
    room.despawn("c");
    room.spawn("d");
    room.chat("later");
    room.setPresence({ name: "Me" });
    await turn(500);
    FakeSocket.last.open();
    const mine = (id: string): object => ({ id, templateId: "t", ownerId: ME, components: { n: "1" }, position: {} });
    hello({ entities: ["a", "b", "c"].map(mine), players: [{ clientId: ME, displayName: "Me" }] });
    await turn(1_000);
    expect(sent()).toEqual([
      { entityUpdate: { entityId: "b", components: { n: "Mg==" } } },
      { messageId: "4", entitySpawn: expect.objectContaining({ entityId: "d" }) },
      { entityDespawn: { entityId: "c" } },
      { chatMessage: { message: "later" } },
      { positionUpdate: expect.objectContaining({ entityId: "a", position: expect.objectContaining({ x: 2 }) }) },
    ]);
  });

  test("own entities of an earlier life of the page are there, and can be removed", async () => {
    const room = await enter({}, form);
    const seen = watch(room);
    FakeSocket.last.open();
    hello({ entities: [{ ...dot, ownerId: ME }] });
    expect(seen).toEqual([`spawn ${ME}/dot initial`]);
    room.despawn("dot");
    expect(sent()).toEqual([{ entityDespawn: { entityId: "dot" } }]);
  });
});

test("a worker's entities outlive a lost connection, since no state has them", async () => {
  const room = await entered();
  say({ entitySpawn: { entityId: "sun", templateId: "sun" } });
  say({ positionUpdate: { entityId: "sun", position: { x: 1 } } });
  const seen = watch(room);
  await back();
  hello({});
  expect(seen).toEqual([]);
  expect(room.entities.get("sun")).toMatchObject({ owner: "", template: "sun", position: { x: 1, y: 0, z: 0 } });
});

test("what was spawned before the first connection is sent with it", async () => {
  const room = await enter();
  room.spawn("dot", { position: { x: 1, y: 1 } });
  room.move("cursor", { x: 1, y: 1 });
  room.chat("first");
  FakeSocket.last.open();
  expect(sent()).toEqual([]);
  hello({ entities: [] });
  expect(sent().map((message) => Object.keys(message)[0])).toEqual(["entitySpawn", "chatMessage", "positionUpdate", "positionUpdate"]);
});

test("the gateway's word on the client id holds", async () => {
  const room = await enter();
  room.spawn("dot");
  FakeSocket.last.open();
  hello({}, { assignedClientId: "c-other" });
  expect([room.clientId, room.entities.get("dot")?.owner, [...room.members.keys()]]).toEqual(["c-other", "c-other", ["c-other"]]);
  await back();
  expect(FakeSocket.last.url.searchParams.get("client_id")).toBe("c-other");
});

test("messages that wait have a bound", async () => {
  const room = await enter({ queueMax: 2 });
  room.chat("1");
  room.chat("2");
  expect(() => room.chat("3")).toThrow("Too many messages");
  FakeSocket.last.open();
  hello({});
  expect(sent().length).toBe(2);
});

test("a presence that changes while the gateway greets is sent", async () => {
  const room = await enter({ name: "Me" });
  FakeSocket.last.open();
  room.setPresence({ avatarUrl: "a.glb" });
  hello({});
  expect(sent()).toEqual([{ presenceEvent: { eventType: "UPDATE", data: { displayName: "Me", avatarUrl: "a.glb" } } }]);
});

test("a second whole state replaces the first", async () => {
  const room = await entered();
  const seen = watch(room);
  const changes = changesOf(room);
  hello({ players: [ada] });
  hello({ players: [] });
  expect(seen).toEqual(["join c-ada", "leave c-ada"]);
  expect(changes).toEqual([]);
});

test("silence is asked about, and ends the connection with a code that is no leave", async () => {
  const room = await entered();
  await turn(25_000);
  expect(sent()).toEqual([{ type: 255 }]);
  FakeSocket.last.say({ type: 255 });
  await turn(30_000);
  expect(sent().length).toBe(2);
  await turn(5_000);
  expect(FakeSocket.all[0]?.closed).toEqual({ code: 4000, reason: "reconnecting" });
  expect(["waiting", "connecting"]).toContain(room.state);
});

test("no greeting in time is a failure", async () => {
  const room = await enter({ connectTimeoutMs: 1_000 });
  const changes = changesOf(room);
  FakeSocket.last.open();
  await turn(1_000);
  expect(changes[0]).toMatchObject({ state: "waiting", reason: "no connection in time" });
  expect(FakeSocket.last.closed?.code).toBe(4000);
});

describe("tokens", () => {
  const base64 = (value: object): string => btoa(JSON.stringify(value)).replace(/=+$/, "");
  const jwt = (seconds: number): string => {
    const now = Math.floor(Date.now() / 1000);
    return `${base64({ alg: "HS256" })}.${base64({ sub: "u", iat: now, exp: now + seconds })}.x`;
  };

  test("reconnects use the token at hand, until it is refused or nearly over", async () => {
    const reasons: string[] = [];
    await entered({ getToken: ({ reason }) => (reasons.push(reason), jwt(3600)) });
    await back();
    hello({});
    expect(reasons).toEqual(["initial"]);
    await turn(10_000);
    FakeSocket.last.end(4401, "credential expired");
    await turn(0);
    expect(reasons).toEqual(["initial", "expired"]);
    FakeSocket.last.end(1006, "", "Unexpected server response: 403");
    await turn(500);
    expect(reasons).toEqual(["initial", "expired", "rejected"]);
    FakeSocket.last.open();
    hello({});
    vi.setSystemTime(Date.now() + 3_595_000);
    await back();
    await turn(1000);
    expect(reasons.length).toBe(4);
  });

  test("a token is replaced before it expires", async () => {
    const reasons: string[] = [];
    const room = await entered({ getToken: ({ reason }) => (reasons.push(reason), jwt(300)) });
    const refreshed: number[] = [];
    room.on("refreshed", ({ expiresAt }) => refreshed.push(expiresAt));
    const alive = setInterval(() => FakeSocket.last.say({ type: 255 }), 5_000);
    await turn(239_000);
    expect(reasons).toEqual(["initial"]);
    await turn(1_500);
    clearInterval(alive);
    expect(reasons).toEqual(["initial", "refresh"]);
    const asked = sent().at(-1);
    expect(asked).toMatchObject({ type: "refresh" });
    say({ custom: { name: "refreshed", data: btoa("1") } });
    expect(refreshed[0]).toBeGreaterThan(Date.now() + 290_000);
    await back();
    expect(FakeSocket.last.protocols[1]).toBe(`bearer.${asked.token}`);
  });

  test("a refresh without an answer, a refused one and a failing one are tried again", async () => {
    let fails = false;
    const reasons: string[] = [];
    const room = await entered({
      getToken: ({ reason }) => {
        reasons.push(reason);
        if (fails) throw new Error("down");
        return jwt(130);
      },
    });
    const seen = watch(room);
    const alive = setInterval(() => FakeSocket.last.say({ type: 255 }), 5_000);
    await turn(70_500);
    say({ error: { code: "invalid_token", message: "m" } });
    await turn(11_000);
    fails = true;
    await turn(11_000);
    clearInterval(alive);
    expect(reasons).toEqual(["initial", "refresh", "refresh", "refresh"]);
    expect(seen).toEqual(["error invalid_token", "error refresh"]);
  });
});

describe("the rule of what is final", () => {
  interface Row { name: string; code: number; reason: string; advice: string; outcome: string; status: number }
  const table = JSON.parse(readFileSync(fileURLToPath(new URL("../../../../spec/finality.json", import.meta.url)), "utf8")) as Record<"closes" | "tokens", Row[]>;

  async function room(options: Partial<RoomOptions> = {}): Promise<{ reasons: string[]; changes: StateChange[] }> {
    const reasons: string[] = [];
    const made = await enter({ getToken: ({ reason }) => (reasons.push(reason), "t"), ...options });
    const changes = changesOf(made);
    await turn();
    return { reasons, changes };
  }

  async function done({ reasons, changes }: { reasons: string[]; changes: StateChange[] }): Promise<string> {
    const change = changes.find(({ state }) => state === "waiting" || state === "closed");
    if (change?.state === "closed") {
      await turn(1_000_000);
      expect(changes.at(-1)).toBe(change);
      return "final";
    }
    if (change?.delayMs === 0) {
      await turn(0);
      expect(["rejected", "expired"]).toContain(reasons[1]);
      return "credentials";
    }
    return (change?.delayMs ?? 0) > 1000 ? "slow" : "retry";
  }

  test.each(table.closes)("closed: $name ($code)", async ({ code, reason, advice }) => {
    const made = await room();
    FakeSocket.last.open();
    hello({});
    FakeSocket.last.end(code, reason);
    expect(await done(made)).toBe(advice);
  });

  test.each([400, 401, 403, 404, 409, 426, 429, 500, 502, 503, 504])("only the status is seen: %i", async (status) => {
    const made = await room();
    FakeSocket.last.end(1006, "", `Unexpected server response: ${status}`);
    const expected = [401, 403].includes(status) ? "credentials" : [429, 503].includes(status) ? "slow" : "retry";
    expect(await done(made)).toBe(expected);
  });

  test.each(table.tokens)("tokens: $name", async ({ outcome, advice }) => {
    const outcomes: Record<string, () => unknown> = {
      token: () => "t",
      gives_up: () => Promise.reject(new GiveUp("signed out")),
      throws: () => Promise.reject({ any: "thing" }),
      silent: () => new Promise(() => undefined),
    };
    const given = outcome === "no_token" ? [undefined, null, "", {}, 7].map((value) => () => value) : [outcomes[outcome]];
    for (const getToken of given) {
      const changes: StateChange[] = [];
      const { connectRoom } = await import("../../src/rooms/index.ts");
      const made = connectRoom({ url: "https://g.test", room: "r", WebSocket: FakeSocket, random: () => 0.5, getToken: getToken as RoomOptions["getToken"] & object });
      made.on("state", (change) => changes.push(change));
      await turn();
      if (outcome === "silent") await turn(15_000);
      if (advice === "open") expect(FakeSocket.all.length).toBe(1);
      else expect(await done({ reasons: [], changes })).toBe(advice);
      made.close();
    }
  });

  test("in development mode there is no other credential", async () => {
    const made = await room({ userId: "u", getToken: undefined as never });
    FakeSocket.last.end(1006, "", "Unexpected server response: 403");
    expect(await done(made)).toBe("final");
  });

  test("it gives up after the time that the application sets", async () => {
    const made = await room({ giveUpAfterMs: 60_000 });
    for (let n = 0; n < 200 && made.changes.at(-1)?.state !== "closed"; n += 1) {
      FakeSocket.last.end();
      await turn(1_000);
    }
    expect(made.changes.at(-1)).toMatchObject({ state: "closed", reason: "There was no connection for 60000 ms." });
  });
});

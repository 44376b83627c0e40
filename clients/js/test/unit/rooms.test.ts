// A room against a scripted gateway, by a clock of the test's own, in text and in binary messages.

import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { connectRoom } from "../../src/rooms/index.ts";
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

const ada = { clientId: "c-ada", displayName: "Ada" };
const dot = { id: "dot", templateId: "dot", ownerId: "c-ada", components: { color: "red" }, position: { x: 0.5, y: 2 } };
const join = (client: string, name = ""): object => ({ sender: client, presenceEvent: { clientId: client, eventType: "JOIN", data: { displayName: name } } });
const leave = (client: string): object => ({ sender: client, presenceEvent: { clientId: client, eventType: "LEAVE" } });
const place = (entityId: string, x: number): object => ({ entityId, position: { x } });

test("the token is in the subprotocol, the client's id and name are in the URL", async () => {
  await enter({ name: "Ada L", url: "https://gateway.test/base/" });
  expect(FakeSocket.last.url.href).toBe("wss://gateway.test/base/ws/lobby?client_id=c-me&display_name=Ada+L");
  expect(FakeSocket.last.protocols).toEqual(["wsproxy.v1", "bearer.t"]);
});

test("development mode needs no token", async () => {
  await enter({ userId: "u-1" });
  expect(FakeSocket.last.url.searchParams.get("user_id")).toBe("u-1");
  expect(FakeSocket.last.protocols).toEqual(["wsproxy.v1"]);
  const options = { url: "https://gateway.test", room: "lobby", WebSocket: FakeSocket };
  expect(() => connectRoom(options)).toThrow("either getToken or userId");
  expect(() => connectRoom({ ...options, getToken: () => "t", userId: "u" })).toThrow("either getToken or userId");
});

test("each room has a client id of its own, which it keeps", async () => {
  const [one, other] = [1, 2].map(() => connectRoom({ url: "https://g.test", room: "r", userId: "u", WebSocket: FakeSocket }));
  expect(one?.clientId).toMatch(/^[\da-z]{10,30}$/);
  expect(one?.clientId).not.toBe(other?.clientId);
  one?.close();
  await turn();
  expect(FakeSocket.all.length).toBe(1);
  other?.close();
});

describe.each(FORMS)("%s", (form) => {
  test("the room is open when its whole state is here", async () => {
    const room = await enter({ name: "Me" }, form);
    const seen = watch(room);
    const opened = room.opened();
    FakeSocket.last.open();
    expect(FakeSocket.last.sent.length).toBe(1);
    hello({ players: [ada, { clientId: ME, displayName: "Me" }] }, { more: true });
    expect([room.state, room.members.size]).toEqual(["connecting", 1]);
    say(join("c-bob", "Bob"));
    hello({ entities: [dot] });
    await opened;
    expect([room.state, room.connectionId, room.clientId]).toEqual(["open", "k-1", ME]);
    expect(seen).toEqual(["join c-ada initial", "spawn c-ada/dot initial", "join c-bob"]);
    expect([...room.members.values()].map(({ clientId, name }) => `${clientId} ${name}`)).toEqual(["c-me Me", "c-ada Ada", "c-bob Bob"]);
    expect(room.entities.get("dot")).toMatchObject({ owner: "c-ada", template: "dot", components: { color: "red" }, position: { x: 0.5, y: 2, z: 0 } });
    expect(sent()).toEqual([]);
  });

  test("the hello names features and presence", async () => {
    await enter({ name: "Me", presence: { avatarUrl: "a.glb", position: { x: 1, y: 2 }, avatar: { height: 2 } } }, form);
    FakeSocket.last.open();
    const { all } = FakeSocket;
    const raw = all[0]?.sent[0];
    if (form === "binary") return expect(raw).toBeInstanceOf(Uint8Array);
    return expect(raw).toEqual({
      clientHello: {
        clientId: ME, displayName: "Me", version: 1, features: ["batch", "acks"],
        presence: { displayName: "Me", avatarUrl: "a.glb", avatarConfig: { height: 2 }, position: { x: 1, y: 2, z: 0 } },
      },
    });
  });

  test("others come, change and go, and what they have goes with them", async () => {
    const room = await entered({}, form);
    const seen = watch(room);
    say(join("c-ada", "Ada"));
    say(join("c-ada", "Ada"));
    const member = room.members.get("c-ada");
    say({ sender: "c-ada", presenceEvent: { clientId: "c-ada", eventType: "UPDATE", data: { displayName: "Countess" } } });
    expect(room.members.get("c-ada")).toBe(member);
    say({ sender: "c-ada", entitySpawn: { entityId: "dot", templateId: "dot", components: { color: "red" } } });
    say({ sender: "c-ada", entityUpdate: { entityId: "dot", components: { color: btoa("blue"), mesh: "/w==" } } });
    say({ sender: "c-ada", positionUpdate: place("dot", 1) });
    say({ sender: "c-ada", positionUpdate: place("dot", 1) });
    say({ sender: "c-ada", positionUpdate: place("cursor", 2) });
    expect(room.entities.get("dot")?.components).toEqual({ color: "blue", mesh: new Uint8Array([255]) });
    say({ sender: "c-ada", entityDespawn: { entityId: "dot" } });
    say({ sender: "c-ada", entityDespawn: { entityId: "dot" } });
    say(leave("c-ada"));
    say(leave("c-ada"));
    expect(seen).toEqual([
      "join c-ada", "presence c-ada Countess", "spawn c-ada/dot", "update dot color,mesh", "move dot 1", "spawn c-ada/cursor", "move cursor 2",
      "despawn dot", "despawn cursor", "leave c-ada",
    ]);
    expect([room.members.size, room.entities.size]).toEqual([1, 0]);
  });

  test("a batch moves others' entities, and own entries of it are skipped", async () => {
    const room = await entered({}, form);
    room.move("mine", { x: 9, y: 9 });
    const seen = watch(room);
    const entries = [{ sender: ME, update: place("mine", 1) }, { sender: "c-ada", update: place("dot", 2) }, { sender: "c-bob", update: place("x", 3) }];
    say({ positionBatch: { entries, timestamp: "1" } });
    expect(seen).toEqual(["spawn c-ada/dot", "move dot 2", "spawn c-bob/x", "move x 3"]);
    expect(room.entities.get("mine")?.position).toEqual({ x: 9, y: 9, z: 0 });
  });

  test("chat and messages of an application's own kinds", async () => {
    const room = await entered({}, form);
    const seen = watch(room);
    say(join("c-ada", "Ada"));
    const names: unknown[] = [];
    room.on("chat", ({ member }) => names.push(member?.name));
    room.onCustom("dice", (data) => names.push(data.length));
    say({ sender: "c-ada", chatMessage: { message: "hello" } });
    say({ sender: "c-ada", to: ME, chatMessage: { message: "psst", type: "WHISPER" } });
    say({ chatMessage: { message: "from a worker", type: "SHOUT" } });
    say({ sender: "c-ada", custom: { name: "dice", data: "AQL/" } });
    say({ sender: "c-ada", custom: { name: "other" } });
    say({ sender: ME, chatMessage: { message: "an earlier connection's" } });
    expect(seen.slice(1)).toEqual([
      "chat c-ada hello normal", "chat c-ada psst whisper", "chat  from a worker shout", "custom c-ada dice 1,2,255", "custom c-ada other ",
    ]);
    expect(names).toEqual(["Ada", "Ada", undefined, 3]);
  });

  test("what a client says is slim", async () => {
    const room = await entered({}, form);
    room.spawn("dot", { template: "cube", components: { color: "red", mesh: Buffer.from([255, 1]) }, position: { x: 0.5, y: 1 } });
    room.update("dot", { color: "blue" });
    room.chat("hello");
    room.whisper("c-ada", "psst", { reliable: true });
    room.send("dice", "six");
    room.send("dice", Buffer.from([6]), { to: "c-ada" });
    room.despawn("dot");
    room.setPresence({ name: "Me", hostClientId: "c-ada" });
    expect(sent()).toEqual([
      { messageId: "1", entitySpawn: { entityId: "dot", templateId: "cube", components: { color: "red" } } },
      { entityUpdate: { entityId: "dot", components: { mesh: "/wE=" } } },
      { positionUpdate: { entityId: "dot", position: form === "text" ? { x: 0.5, y: 1, z: 0 } : { x: 0.5, y: 1 }, sequenceNumber: 1 } },
      { entityUpdate: { entityId: "dot", components: { color: "Ymx1ZQ==" } } },
      { chatMessage: { message: "hello" } },
      { to: "c-ada", reliable: true, chatMessage: { message: "psst", type: "WHISPER" } },
      { custom: { name: "dice", data: "c2l4" } },
      { to: "c-ada", custom: { name: "dice", data: "Bg==" } },
      { entityDespawn: { entityId: "dot" } },
      { presenceEvent: { eventType: "UPDATE", data: { displayName: "Me", hostClientId: "c-ada" } } },
    ]);
  });

  test("reliable messages are told once and acknowledged together", async () => {
    const room = await entered({}, form);
    const seen = watch(room);
    const text = (seq: number): object => ({ sender: "c-ada", reliable: true, seq: String(seq), chatMessage: { message: String(seq) } });
    for (const seq of [1, 2, 4, 2]) say(text(seq));
    say({ ...join("c-bob"), reliable: true, seq: "1795871806413021" });
    expect(sent()).toEqual([]);
    await turn(100);
    say(text(4));
    say(text(3));
    await turn(100);
    await turn(1_000);
    expect(seen.map((word) => word.split(" ")[2])).toEqual(["1", "2", "4", undefined, "3"]);
    expect(sent()).toEqual([{ ack: { seq: "2", more: ["4"] } }, { ack: { seq: "4" } }]);
  });

  test("messages of later kinds and other dialects are ignored", async () => {
    const room = await entered({}, form);
    const seen = watch(room);
    FakeSocket.last.say({ type: 255, messageId: "ping-1", timestamp: 1, payload: null });
    FakeSocket.last.sayRaw("no JSON");
    FakeSocket.last.sayRaw('{"sender":"c-ada","someKind":{}}');
    FakeSocket.last.sayRaw('{"sender":"c-ada","custom":{"name":"x","data":"%"},"seq":"x"}');
    FakeSocket.last.sayRaw(new Uint8Array([255, 0, 1]).buffer);
    FakeSocket.last.sayRaw(new ArrayBuffer(0));
    expect(seen).toEqual([]);
    expect(room.state).toBe("open");
  });
});

test("an entity of another, a position that is no number, and a closed room are errors", async () => {
  const room = await entered();
  say({ sender: "c-ada", entitySpawn: { entityId: "dot" } });
  for (const action of [() => room.move("dot", { x: 1, y: 1 }), () => room.spawn("dot"), () => room.update("dot", {}), () => room.despawn("dot")]) {
    expect(action).toThrow("The entity dot belongs to c-ada.");
  }
  expect(() => room.update("absent", {})).toThrow("no entity absent");
  expect(() => room.move("mine", { x: Number.NaN, y: 0 })).toThrow("finite");
  expect(() => room.move("mine", { x: 0, y: 0 }, { x: 0, y: 0, z: 0 } as never)).toThrow("finite");
  expect(room.entities.has("mine")).toBe(false);
  room.close();
  expect(FakeSocket.last.closed).toEqual({ code: 1000, reason: "" });
  for (const action of [() => room.chat("x"), () => room.move("mine", { x: 1, y: 1 }), () => room.setPresence({})]) expect(action).toThrow("closed");
  await expect(room.opened()).rejects.toThrow("closed: 1000");
});

test("a refused spawn is undone", async () => {
  const room = await entered();
  const seen = watch(room);
  room.spawn("a");
  room.spawn("b");
  say({ error: { code: "room_state_full", message: "m", messageId: "2" } });
  say({ error: { code: "wrong_sender", message: "m" } });
  expect(seen).toEqual(["despawn b", "error room_state_full b", "error wrong_sender"]);
  expect([...room.entities.keys()]).toEqual(["a"]);
});

test("an entity that another has spawned at the same time is the other's", async () => {
  const room = await entered();
  room.spawn("a");
  const seen = watch(room);
  say({ sender: "c-ada", entitySpawn: { entityId: "a", templateId: "t" } });
  say({ error: { code: "wrong_sender", message: "m", messageId: "1" } });
  expect(seen).toEqual(["despawn a", "spawn c-ada/a", "error wrong_sender a"]);
  expect(room.entities.get("a")?.owner).toBe("c-ada");
});

test("an entity that was made before the limit was known goes, if it is too large", async () => {
  const room = await enter();
  const seen = watch(room);
  room.spawn("a", { components: { text: "x".repeat(300) }, position: { x: 1, y: 1 } });
  room.spawn("b");
  FakeSocket.last.open();
  hello({}, { limits: { messageBytesMax: 200 } });
  expect(seen).toEqual(["despawn a", "error too_large a"]);
  expect(sent()).toEqual([{ messageId: "2", entitySpawn: { entityId: "b", templateId: "", components: {} } }]);
  expect(() => room.update("b", { text: "x".repeat(300) })).toThrow("at most 200 bytes");
});

test("a spawn that failed for another reason stays, and goes out with the next connection", async () => {
  const room = await entered();
  room.spawn("a");
  say({ error: { code: "bus_unavailable", message: "m", messageId: "1" } });
  expect(room.entities.has("a")).toBe(true);
});

test("the position of an entity that another has taken is not sent", async () => {
  const room = await entered();
  room.move("a", { x: 1, y: 1 });
  room.move("a", { x: 2, y: 1 });
  say({ sender: "c-ada", entitySpawn: { entityId: "a" } });
  await turn(1_000);
  expect(sent().length).toBe(1);
});

test("the own name is the one that the gateway shows", async () => {
  const room = await enter({ name: "Me" });
  const name = (): string | undefined => room.members.get(ME)?.name;
  expect(name()).toBe("Me");
  FakeSocket.last.open();
  hello({ players: [{ clientId: ME, displayName: "Ada of the token" }] });
  room.setPresence({ avatarUrl: "a.glb" });
  expect(name()).toBe("Ada of the token");
  room.setPresence({ name: "Other" });
  expect(name()).toBe("Other");
});

test("a handler that throws keeps nothing from the others", async () => {
  const room = await entered();
  const seen = watch(room);
  room.on("join", () => {
    throw new Error("no");
  });
  say(join("c-ada"));
  say(join("c-bob"));
  await turn();
  expect(seen).toEqual(["join c-ada", "join c-bob", "error handler", "error handler"]);
});

test("a message beyond the gateway's limit is refused here", async () => {
  const room = await enter();
  FakeSocket.last.open();
  hello({}, { limits: { messageBytesMax: 200 } });
  expect(room.limits).toMatchObject({ messageBytesMax: 200 });
  expect(() => room.chat("ä".repeat(100))).toThrow("at most 200 bytes");
  room.chat("a".repeat(100));
  expect(sent().length).toBe(1);
});

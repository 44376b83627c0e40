// A program with the built package; compiled with the types of browsers, and without any platform's.

import { Agent, AgentReplaced, Agents, ToolError } from "../../dist/agents/index.js";
import { connectEvents, connectSession, GiveUp, type Session } from "../../dist/index.js";
import { connectRoom, type Entity, type Member, type Room } from "../../dist/rooms/index.js";

declare const Socket: new (url: string, protocols: string[]) => {
  binaryType: string;
  readonly protocol: string;
  addEventListener(type: string, listener: (event: any) => void): void;
  send(data: any): void;
  close(code?: number, reason?: string): void;
};

export const session: Session<{ type: "token"; text: string } | { type: "done" }> = connectSession({
  url: "https://gateway.example",
  agent: "demo",
  session: "s-1",
  WebSocket: Socket,
  sendRate: { perSecond: 10, burst: 20 },
  getToken: ({ reason, signal }) => {
    if (signal.aborted) throw new GiveUp(reason);
    return "token";
  },
});
session.onType("token", ({ text }) => text.length);
session.on("historyLost", ({ reason }) => reason);

export const events = connectEvents<{ task: { id: number } }>({ url: { href: "https://gateway.example/ws" }, getToken: () => "t" });
events.onType("task", ({ data }) => data.id.toFixed());

export const agent: Agent = new Agent("https://gateway.example", { userId: "u-1", secret: async () => "s", WebSocket: Socket });
agent.tool("read_file", async ({ path }: { path: string }, { signal, progress, deadline }) => {
  progress(1, 2, path);
  return signal.aborted ? null : [path, deadline];
});
agent.run().catch((error: unknown) => error instanceof AgentReplaced && error.code);

export const agents: Agents = new Agents({ href: "https://gateway.example" }, { apiKey: "key" });
agents.call<string>("u-1", "read_file", { path: "x" }, { timeoutMs: 1, onProgress: ({ total }) => total?.toFixed() }).then(
  (text) => text.length,
  (error: unknown) => error instanceof ToolError && error.requestId,
);

export const room: Room = connectRoom({ url: { href: "https://gateway.example" }, room: "lobby", getToken: ({ reason }) => reason, WebSocket: Socket, name: "Ada" });
room.on("join", ({ member, initial }) => (initial ? member.name : member.clientId));
room.on("move", ({ entity }) => entity.position?.x.toFixed());
room.on("update", ({ components }) => Object.values(components).map((value) => (typeof value === "string" ? value : value.byteLength)));
room.onCustom("dice", (data, { member }) => [data[0], member?.name]);
room.opened().then(() => {
  room.spawn("dot", { template: "dot", components: { color: "red", mesh: new Uint8Array(1) }, position: { x: 1, y: 2 } });
  room.move("dot", { x: 1, y: 2, z: 3 }, { x: 0, y: 0, z: 0, w: 1 });
  room.send("dice", "six", { to: "c-1", reliable: true });
  room.setPresence({ name: "Ada", avatar: { height: 2 } });
});
export const names: string[] = [...room.members.values()].map((member: Member) => member.name);
export const entity: Entity | undefined = room.entities.get("dot");
// @ts-expect-error The maps are the room's own.
room.members.clear();

// The same with what browsers give.

import { Agent, Agents } from "../../dist/agents/index.js";
import { connectSession } from "../../dist/index.js";
import { binary } from "../../dist/rooms/binary.js";
import { connectRoom, type Room } from "../../dist/rooms/index.js";

const abort = new AbortController();
export const session = connectSession({
  url: new URL("https://gateway.example/demo/ws/s-1"),
  WebSocket,
  fetch,
  signal: abort.signal,
  getToken: async ({ signal }) => (await fetch("/tokens/s-1", { method: "POST", signal })).text(),
});
export const agent: Agent = new Agent(new URL("https://gateway.example"), { userId: "u", secret: "s", signal: abort.signal }).tool(
  "fetch",
  async ({ url }: { url: string }, { signal }) => (await fetch(url, { signal })).text(),
);
export const answer: Promise<string> = new Agents("https://gateway.example", { apiKey: "k", fetch }).call("u", "fetch", {}, { signal: abort.signal });
export const room: Room = connectRoom({
  url: new URL("https://gateway.example"),
  room: "lobby",
  binary,
  signal: abort.signal,
  getToken: async ({ signal }) => (await fetch("/token", { method: "POST", signal })).text(),
});

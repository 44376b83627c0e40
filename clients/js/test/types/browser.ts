// The same with what browsers give.

import { connectSession } from "../../dist/index.js";

const abort = new AbortController();
export const session = connectSession({
  url: new URL("https://gateway.example/demo/ws/s-1"),
  WebSocket,
  fetch,
  signal: abort.signal,
  getToken: async ({ signal }) => (await fetch("/tokens/s-1", { method: "POST", signal })).text(),
});

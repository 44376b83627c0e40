// The WebSocket transport: credentials through the subprotocol, positions in the envelope where it was agreed on.

import type { Frame, Target, Transport, TransportEvents } from "./transport.ts";

/** The used part of a WebSocket: that of browsers, of Node 22 and later, and of the package `ws` fit. */
export interface WebSocketLike {
  binaryType: string;
  readonly protocol: string;
  readonly bufferedAmount?: number;
  addEventListener(type: string, listener: (event: any) => void): void;
  send(data: any): void;
  close(code?: number, reason?: string): void;
}

/** Makes a WebSocket. */
export type WebSocketConstructor = new (url: string, protocols: string[]) => WebSocketLike;

const ENVELOPE = "wsproxy.id.v1";
const ID_MAX = 128;
/** A failed handshake is told by `error` and then `close`; by `error` alone in Node 22, so that the other one is not waited for longer. */
export const CLOSE_MS = 100;

/** The subprotocol that carries `token`: plain where the header allows all its characters, else in base64url. */
export function bearer(token: string): string {
  if (/^[\w!#$%&'*+.^`|~-]+$/.test(token)) return `bearer.${token}`;
  const bytes = String.fromCharCode(...new TextEncoder().encode(token));
  return `bearer64.${btoa(bytes).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "")}`;
}

/** Takes the position off a message in the envelope: `<position or empty>\n<payload>`. */
export function unwrap(body: string | Uint8Array): Frame {
  const text = typeof body === "string";
  const end = text ? body.indexOf("\n") : body.indexOf(10);
  // No id is longer: this is a message without envelope.
  if (end < 0 || end > ID_MAX) return { body };
  const id = text ? body.slice(0, end) : new TextDecoder().decode(body.subarray(0, end));
  const payload = text ? body.slice(end + 1) : body.subarray(end + 1);
  return { id, body: payload };
}

/** Opens a WebSocket. */
export function openWebSocket(Socket: WebSocketConstructor, target: Target, events: TransportEvents): Transport {
  const protocols = ["wsproxy.v1"];
  if (target.token !== "") protocols.push(bearer(target.token));
  if (target.envelope) protocols.unshift(ENVELOPE);
  const url = new URL(target.url);
  url.protocol = url.protocol.replace("http", "ws");
  const socket = new Socket(url.href, protocols);
  socket.binaryType = "arraybuffer";

  let opened = false;
  let over = false;
  let status: number | undefined;
  let asked: number | undefined;
  let closed: ((isClean: boolean) => void) | undefined;
  socket.addEventListener("open", () => {
    if (over) return;
    opened = true;
    events.opened();
  });
  socket.addEventListener("message", ({ data }: { data: string | ArrayBuffer }) => {
    if (over) return;
    const body = typeof data === "string" ? data : new Uint8Array(data);
    events.frame(socket.protocol === ENVELOPE ? unwrap(body) : { body });
  });
  const ended = ({ code, reason, wasClean }: { code: number; reason: string; wasClean?: boolean }): void => {
    // The gateway answers with the same code and no reason. Any other close is its own, after which it has read nothing.
    if (over) return closed?.(wasClean === true && code === asked && reason === "");
    over = true;
    events.ended({ code, reason, opened, ...(status && !opened ? { status, refusal: "unknown" } : {}) });
  };
  socket.addEventListener("error", (event: { message?: unknown }) => {
    // Browsers say nothing about a refused handshake; the package `ws` gives the status in this sentence.
    status = Number(/server response: (\d{3})/.exec(String(event.message))?.[1]) || undefined;
    if (!opened) setTimeout(() => over || ended({ code: 1006, reason: "" }), CLOSE_MS);
  });
  socket.addEventListener("close", ended);
  target.whenRefused?.(socket, (end) => {
    if (over) return;
    over = true;
    events.ended(end);
  });
  return {
    kind: "websocket",
    send: (data) => socket.send(data),
    unsent: () => socket.bufferedAmount ?? 0,
    close(code, reason, whenClosed) {
      closed ??= whenClosed;
      if (over) return;
      over = true;
      asked = code;
      try {
        socket.close(code, reason);
      } catch {
        socket.close();
      }
    },
  };
}

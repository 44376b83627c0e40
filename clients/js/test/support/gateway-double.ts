// A scripted gateway: real sockets, and every word of it said by the test.

import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { type WebSocket, WebSocketServer } from "ws";
import type { Connection, Received } from "../../src/index.ts";

/** Arrived items, in order, for the next reader. */
export class Inbox<T> {
  readonly #items: T[] = [];
  readonly #waiting: ((item: T) => void)[] = [];

  put(item: T): void {
    const next = this.#waiting.shift();
    if (next) next(item);
    else this.#items.push(item);
  }

  get size(): number {
    return this.#items.length;
  }

  next(ms = 5_000): Promise<T> {
    const item = this.#items.shift();
    if (item !== undefined) return Promise.resolve(item);
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => reject(new Error(`Nothing came within ${ms} ms.`)), ms);
      this.#waiting.push((item) => {
        clearTimeout(timer);
        resolve(item);
      });
    });
  }
}

/** One connection of a client. */
export class Peer {
  readonly url: URL;
  readonly offered: string[];
  readonly said: Inbox<any> = new Inbox();
  readonly ended: Promise<number>;
  readonly #socket: WebSocket;

  constructor(socket: WebSocket, request: IncomingMessage) {
    this.#socket = socket;
    this.url = new URL(request.url ?? "", "ws://gateway");
    this.offered = (request.headers["sec-websocket-protocol"] ?? "").split(/, */);
    socket.on("message", (data, binary) => this.said.put(binary ? data : JSON.parse(String(data))));
    this.ended = new Promise((resolve) => socket.on("close", resolve));
  }

  get lastEventId(): string | null {
    return this.url.searchParams.get("last_event_id");
  }

  say(...messages: unknown[]): void {
    for (const message of messages) this.#socket.send(JSON.stringify(message));
  }

  sayRaw(data: string | Uint8Array): void {
    this.#socket.send(data);
  }

  close(code: number, reason = ""): void {
    this.#socket.close(code, reason);
  }

  drop(): void {
    this.#socket.terminate();
  }
}

/** A stream of server-sent events that a client asked for. */
export interface Listener {
  request: IncomingMessage;
  response: ServerResponse;
  url: URL;
}

export class GatewayDouble {
  readonly peers: Inbox<Peer> = new Inbox();
  readonly listeners: Inbox<Listener> = new Inbox();
  /** HTTP status with which WebSockets are refused; 0: they are not. */
  refuse = 0;
  refused = 0;
  /** Body and further headers of such a refusal. */
  refusal = { body: "", headers: "" };
  /** Which subprotocol is selected, if it was offered. */
  protocol = "wsproxy.v1";
  readonly #http: Server;
  readonly #sockets: WebSocketServer;

  static async start(): Promise<GatewayDouble> {
    const double = new GatewayDouble();
    await new Promise<void>((resolve) => double.#http.listen(0, "127.0.0.1", resolve));
    return double;
  }

  private constructor() {
    this.#sockets = new WebSocketServer({
      noServer: true,
      handleProtocols: (offered) => (offered.has(this.protocol) ? this.protocol : "wsproxy.v1"),
    });
    this.#http = createServer((request, response) => {
      this.listeners.put({ request, response, url: new URL(request.url ?? "", "http://gateway") });
    });
    this.#http.on("upgrade", (request, socket, head) => {
      if (this.refuse) {
        this.refused += 1;
        const { body, headers } = this.refusal;
        socket.end(`HTTP/1.1 ${this.refuse} Refused\r\n${headers}Connection: close\r\nContent-Length: ${body.length}\r\n\r\n${body}`);
        return;
      }
      this.#sockets.handleUpgrade(request, socket, head, (ws) => this.peers.put(new Peer(ws, request)));
    });
  }

  get url(): string {
    return `http://127.0.0.1:${(this.#http.address() as AddressInfo).port}`;
  }

  async stop(): Promise<void> {
    for (const socket of this.#sockets.clients) socket.terminate();
    this.#http.closeAllConnections();
    await new Promise((resolve) => this.#http.close(resolve));
  }
}

/** Resolves with the next `count` messages; several may come in one turn of the event loop. */
export function messages<M>(connection: Connection<M>, count: number): Promise<Received<M>[]> {
  const came: Received<M>[] = [];
  return new Promise((resolve) => {
    const off = connection.on("message", (received) => {
      if (came.push(received) < count) return;
      off();
      resolve(came);
    });
  });
}

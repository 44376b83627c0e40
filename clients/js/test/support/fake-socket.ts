// A WebSocket without a network: tests play the gateway, and time is what they say it is.

import type { WebSocketLike } from "../../src/websocket.ts";

export class FakeSocket implements WebSocketLike {
  static all: FakeSocket[] = [];
  static get last(): FakeSocket {
    const last = FakeSocket.all.at(-1);
    if (!last) throw new Error("No client has connected.");
    return last;
  }

  binaryType = "";
  protocol = "wsproxy.v1";
  /** Bytes that have not left. */
  bufferedAmount = 0;
  sent: unknown[] = [];
  closed: { code: number | undefined; reason: string | undefined } | undefined;
  readonly url: URL;
  readonly protocols: string[];
  readonly #listeners: Map<string, (event: unknown) => void> = new Map();

  constructor(url: string, protocols: string[]) {
    this.url = new URL(url);
    this.protocols = protocols;
    FakeSocket.all.push(this);
  }

  addEventListener(type: string, listener: (event: unknown) => void): void {
    this.#listeners.set(type, listener);
  }

  send(data: string | Uint8Array): void {
    this.sent.push(typeof data === "string" ? JSON.parse(data) : data);
  }

  close(code?: number, reason?: string): void {
    this.closed ??= { code, reason };
  }

  // The gateway's side.

  open(protocol = "wsproxy.v1"): this {
    this.protocol = protocol;
    this.#listeners.get("open")?.({});
    return this;
  }

  say(message: unknown): void {
    this.sayRaw(JSON.stringify(message));
  }

  sayRaw(data: string | ArrayBuffer): void {
    this.#listeners.get("message")?.({ data });
  }

  end(code = 1006, reason = "", error?: string, wasClean = false): void {
    if (error) this.#listeners.get("error")?.({ message: error });
    this.#listeners.get("close")?.({ code, reason, wasClean });
  }

  /** Fails as in Node 22: there is an error, and no close. */
  fail(): void {
    this.#listeners.get("error")?.({ message: "Received network error or non-101 status code." });
  }

  /** Answers the client's close frame. */
  answerClose(): void {
    this.#listeners.get("close")?.({ ...this.closed, wasClean: true });
  }
}

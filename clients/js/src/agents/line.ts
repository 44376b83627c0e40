// One WebSocket between an agent and the gateway: its credential travels as a subprotocol, its messages are JSON.

import type { End } from "../advice.ts";
import { isObject, type JsonObject, parse } from "../messages.ts";
import type { SendRate } from "../outbox.ts";
import { whenRefused } from "../refused.ts";
import { bearer, CLOSE_MS, type WebSocketConstructor } from "../websocket.ts";
import type { Line } from "./calls.ts";

/** What a line tells. Nothing comes after `ended`. */
export interface LineEvents {
  message(message: JsonObject): void;
  ended(end: End): void;
}

const PROTOCOL = "wsproxy.agent.v2";
/** Above this the gateway reads too slowly. */
const UNSENT_MAX = 4 * 1024 * 1024;
const UNSENT_PAUSE_MS = 50;

/** An open or opening WebSocket. */
export class AgentLine implements Line {
  readonly #socket: InstanceType<WebSocketConstructor>;
  readonly #events: LineEvents;
  #isOpen = false;
  #isOver = false;
  readonly #rate: Required<SendRate>;
  /** Number of messages that may be sent at once, and when that was reckoned. */
  #tokens: number;
  #filledAt: number = Date.now();

  constructor(Socket: WebSocketConstructor, url: string, secret: string, { perSecond = 900, burst = 1000 }: SendRate, events: LineEvents) {
    this.#rate = { perSecond, burst };
    this.#tokens = burst;
    this.#events = events;
    const socket = new Socket(url, [PROTOCOL, "wsproxy.v1", bearer(secret)]);
    this.#socket = socket;
    let status: number | undefined;
    socket.addEventListener("open", () => (this.#isOpen = true));
    socket.addEventListener("message", ({ data }: { data: unknown }) => {
      const message = typeof data === "string" ? parse(data) : undefined;
      if (!this.#isOver && isObject(message)) events.message(message);
    });
    socket.addEventListener("error", (event: { message?: unknown }) => {
      status = Number(/server response: (\d{3})/.exec(String(event.message))?.[1]) || undefined;
      if (!this.#isOpen) setTimeout(() => ended({ code: 1006, reason: "" }), CLOSE_MS);
    });
    const ended = ({ code, reason }: { code: number; reason: string }): void => {
      this.#end({ code, reason, opened: this.#isOpen, ...(status && !this.#isOpen ? { status, refusal: "unknown" } : {}) });
    };
    socket.addEventListener("close", ended);
    whenRefused(socket, (end) => this.#end(end));
  }

  /** True where the gateway speaks the second version of the protocol: progress, cancelling, deadlines. */
  get hearsProgress(): boolean {
    return this.#socket.protocol === PROTOCOL;
  }

  pauseMs(reserve = 0): number {
    if ((this.#socket.bufferedAmount ?? 0) > UNSENT_MAX) return UNSENT_PAUSE_MS;
    const { perSecond, burst } = this.#rate;
    const now = Date.now();
    // A clock that was set back earns nothing.
    this.#tokens = Math.min(burst, this.#tokens + (Math.max(now - this.#filledAt, 0) / 1000) * perSecond);
    this.#filledAt = now;
    const lack = 1 + burst * reserve - this.#tokens;
    return lack > 0 ? Math.ceil((lack / perSecond) * 1000) : 0;
  }

  send(message: string): void {
    if (!this.#isOpen || this.#isOver) return;
    this.#tokens -= 1;
    this.#socket.send(message);
  }

  /** Leaves the connection; `ended` is not called. */
  close(code = 1000, reason = ""): void {
    this.#isOver = true;
    try {
      this.#socket.close(code, reason);
    } catch {
      this.#socket.close();
    }
  }

  #end(end: End): void {
    if (this.#isOver) return;
    this.#isOver = true;
    this.#events.ended(end);
  }
}

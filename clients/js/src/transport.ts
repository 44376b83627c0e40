// What carries messages: the seam between the connection's rules and WebSocket or server-sent events.

import type { End } from "./advice.ts";
import type { Data } from "./outbox.ts";

/** One message as it came. */
export interface Frame {
  /** Text, or bytes of a binary message. */
  body: string | Uint8Array;
  /** Its position, where the transport carries it beside messages: empty for one without history. Else it is in the message. */
  id?: string;
}

/** What a transport tells. Nothing follows `ended`, nor anything after `Transport.close`. */
export interface TransportEvents {
  /** It is open: everything that is published from now on arrives. */
  opened(): void;
  /** A message came. */
  frame(frame: Frame): void;
  /** Something came that is no message, but proves that the other side lives. */
  alive(): void;
  /** The position at which the stream begins, without a message. */
  position(id: string): void;
  /** It is over. */
  ended(end: End): void;
}

/** An open, or opening, transport. */
export interface Transport {
  /** Which one it is. */
  readonly kind: "websocket" | "sse";
  /** Gives `data` to the network; only where `kind` is `websocket`. */
  send(data: Data): void;
  /** How many bytes of what was sent have not left this machine. */
  unsent(): number;
  /**
   * Ends it; nothing is told any more but `closed`, when the other side has answered, or never will. With `isClean` it has read
   * everything that was sent.
   */
  close(code: number, reason: string, closed?: (isClean: boolean) => void): void;
}

/** What is needed to open one. */
export interface Target {
  /** Where, with the query that resumes, without credentials. */
  url: string;
  /** The credential. */
  token: string;
  /** Whether to offer `wsproxy.id.v1`. */
  envelope: boolean;
}

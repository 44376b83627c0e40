// Transports of messages: the seam between the connection's rules and WebSocket or server-sent events.

import type { End } from "./advice.ts";
import type { Data } from "./outbox.ts";

/** One message as it came. */
export interface Frame {
  /** Text, or bytes of a binary message. */
  body: string | Uint8Array;
  /** Its position, where the transport carries it beside messages: empty for one without history. Else it is in the message. */
  id?: string;
}

/** Events of a transport. None follows `ended` or `Transport.close`. */
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
  /** Number of sent bytes that have not left this machine. */
  unsent(): number;
  /**
   * Ends it; nothing is told any more but `closed`, when the other side has answered, or never will. With `isClean` it has read
   * everything that was sent.
   */
  close(code: number, reason: string, closed?: (isClean: boolean) => void): void;
}

/** Arguments for opening a transport. */
export interface Target {
  /** The address, with the query that resumes, without credentials. */
  url: string;
  /** The credential; empty where none is needed. */
  token: string;
  /** Offers `wsproxy.id.v1`. */
  envelope: boolean;
  /** Reads the answer to a refused handshake, where the platform shows it: `whenRefused`. */
  whenRefused?: (socket: object, ended: (end: End) => void) => void;
}

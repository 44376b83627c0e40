// A second connection beside the open one, which takes over when it is open too; knows nothing of what either carries.

import type { End } from "./advice.ts";
import type { Transport } from "./transport.ts";

/** Events of a transport that is being opened. */
export interface Opening {
  /** It is open, after so long. */
  opened: (handshakeMs: number) => void;
  /** It is over. */
  ended: (end: End) => void;
}

/** Options of a spare: its opening, and its callbacks. */
export interface SpareOptions {
  /** After this time it has failed. */
  timeoutMs: number;
  /** Gets what it needs; answers what opens it, or nothing where it cannot be. */
  prepare: () => Promise<((opening: Opening) => Transport) | undefined>;
  /** It is open, and no spare any more. */
  opened: (transport: Transport, handshakeMs: number) => void;
  /** It never was. */
  failed: () => void;
  /** It was open, and is over. */
  ended: (end: End) => void;
}

interface Attempt {
  transport?: Transport;
  timer?: ReturnType<typeof setTimeout>;
}

/** Invariant: at most one at a time; nothing follows `drop`. */
export class Spare {
  #current: Attempt | undefined;

  /** True while a spare is being opened. */
  get isOpening(): boolean {
    return this.#current !== undefined;
  }

  /** Opens one, unless one is being opened. */
  async open({ timeoutMs, prepare, opened, failed, ended }: SpareOptions): Promise<void> {
    if (this.#current) return;
    const me: Attempt = {};
    this.#current = me;
    const fail = (): void => {
      if (this.#current !== me) return;
      this.drop();
      failed();
    };
    me.timer = setTimeout(fail, timeoutMs);
    try {
      const connect = await prepare();
      if (this.#current !== me) return;
      if (!connect) return fail();
      me.transport = connect({
        opened: (handshakeMs) => {
          clearTimeout(me.timer);
          this.#current = undefined;
          if (me.transport) opened(me.transport, handshakeMs);
        },
        ended: (end) => (this.#current === me ? fail() : ended(end)),
      });
    } catch {
      fail();
    }
  }

  /** Gives up the one that is being opened. */
  drop(): void {
    clearTimeout(this.#current?.timer);
    this.#current?.transport?.close(1000, "");
    this.#current = undefined;
  }
}

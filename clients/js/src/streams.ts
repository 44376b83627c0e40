// Token streams: one text merged from what opened it, what was appended, and snapshots, in whatever order they come.

import { Emitter } from "./emitter.ts";
import { type JsonObject, number, text } from "./messages.ts";

/** Outcome of a stream. */
export type Outcome = "finish" | "error" | "cancelled";

/** The error with which a stream ended. */
export interface StreamFailure {
  /** Such as `worker_lost`: the worker was heard of no more. */
  code: string;
  /** The same for people. */
  message: string;
}

/** Events of a stream. */
export interface TokenStreamEvents {
  /** The text, the state or both have changed. `delta` is what was added; nothing where the text was replaced. */
  update: { text: string; delta: string | undefined };
  /** It has ended, with everything that belongs to it. */
  end: { outcome: Outcome; text: string };
}

/** Appends that came too early are kept up to this many; the rest comes with a snapshot, or never. */
const EARLY_MAX = 1_000;

/** One token stream of a session. Loop over it to get the whole text so far whenever it has changed. */
export class TokenStream extends Emitter<TokenStreamEvents> implements AsyncIterable<string> {
  /** The worker's name of it. */
  readonly id: string;
  readonly #stop: (id: string) => void;
  readonly #early: Map<number, string> = new Map();
  #text = "";
  #seq = 0;
  #last = 0;
  #state: "unknown" | "open" | Outcome = "unknown";
  #meta: unknown;
  #error: StreamFailure | undefined;
  #told = false;
  #abandoned = false;

  constructor(id: string, stop: (id: string) => void) {
    super();
    this.id = id;
    this.#stop = stop;
  }

  /** All text so far. */
  get text(): string {
    return this.#text;
  }

  /** The number of the last append that is part of the text. */
  get seq(): number {
    return this.#seq;
  }

  /** `unknown` until something of it came, `open`, or how it ended. */
  get state(): "unknown" | "open" | Outcome {
    return this.#state;
  }

  /** Metadata that the worker gave at the opening. */
  get meta(): unknown {
    return this.#meta;
  }

  /** The error with which it ended. */
  get error(): StreamFailure | undefined {
    return this.#error;
  }

  /** True where it has ended. */
  get ended(): boolean {
    return this.#state !== "unknown" && this.#state !== "open";
  }

  /** True where text is known to be missing: possible only after `historyLost`, until a snapshot comes. */
  get incomplete(): boolean {
    return this.#early.size > 0 || this.#last > this.#seq;
  }

  /** Asks the worker to stop. It answers, sooner or later, with the end of the stream. */
  stop(): void {
    if (!this.ended) this.#stop(this.id);
  }

  /** Resolves when it has ended; rejects when the session is closed before. */
  async finished(): Promise<this> {
    while (!this.ended) {
      if (this.#abandoned) throw new Error("The session is closed.");
      await this.once("update");
    }
    return this;
  }

  /** The whole text so far, again at every change, until it or the session ends; a slow consumer gets only the newest. */
  async *[Symbol.asyncIterator](): AsyncIterator<string> {
    let shown: string | undefined;
    for (;;) {
      if (this.#text !== shown && this.#state !== "unknown") yield (shown = this.#text);
      else if (this.ended || this.#abandoned) return;
      else await this.once("update");
    }
  }

  /** The session is closed: nothing more comes. */
  abandon(): void {
    this.#abandoned = true;
    this.#report(this.emit("update", { text: this.#text, delta: "" }));
  }

  /** Takes a message of this stream. */
  take(message: JsonObject): void {
    this.#abandoned = false;
    const before = this.#text;
    const state = this.#state;
    switch (message["type"]) {
      case "stream_open":
        // After a snapshot it may come once more, out of the history.
        if (this.#state === "unknown") this.#state = "open";
        this.#meta ??= message["meta"];
        break;
      case "stream_append":
        this.#append(number(message["seq"]) ?? 0, text(message["text"]) ?? "");
        break;
      case "stream_snapshot":
        this.#snapshot(message);
        break;
      case "stream_end":
        this.#last = Math.max(this.#last, number(message["seq"]) ?? 0);
        this.#end(message["outcome"], message["error"]);
        break;
    }
    this.#tell(before, state);
  }

  #append(seq: number, text: string): void {
    if (this.#state === "unknown") this.#state = "open";
    if (this.#early.size < EARLY_MAX) this.#early.set(seq, text);
    this.#last = Math.max(this.#last, seq);
    this.#join();
  }

  /** Takes from what came early what fits now, and drops what is part of the text already. */
  #join(): void {
    for (const seq of this.#early.keys()) if (seq <= this.#seq) this.#early.delete(seq);
    for (let next = this.#early.get(this.#seq + 1); next !== undefined; next = this.#early.get(this.#seq + 1)) {
      this.#text += next;
      this.#seq += 1;
      this.#early.delete(this.#seq);
    }
  }

  #snapshot(message: JsonObject): void {
    if (message["meta"] !== undefined) this.#meta = message["meta"];
    // It replaces everything, be it older: then Redis was rolled back, and the worker goes on from there.
    this.#text = text(message["text"]) ?? "";
    this.#seq = this.#last = number(message["seq"]) ?? 0;
    this.#early.clear();
    this.#state = "open";
    if (message["state"] === "open") this.#told = false;
    else this.#end(message["state"], message["error"]);
  }

  #end(outcome: unknown, error: unknown): void {
    if (this.ended) return;
    this.#state = outcome === "finish" || outcome === "cancelled" ? outcome : "error";
    if (this.#state !== "error") return;
    const { code, message } = (error ?? {}) as Partial<StreamFailure>;
    this.#error = { code: code ?? "error", message: message ?? "" };
  }

  #tell(before: string, state: string): void {
    if (this.#text !== before || this.#state !== state) {
      const delta = this.#text.startsWith(before) ? this.#text.slice(before.length) : undefined;
      this.#report(this.emit("update", { text: this.#text, delta }));
    }
    if (this.ended && !this.#told) {
      this.#told = true;
      this.#report(this.emit("end", { outcome: this.#state as Outcome, text: this.#text }));
    }
  }

  #report(work: Promise<void> | undefined): void {
    // Handlers that throw must not keep the session from its next message.
    work?.catch((error: unknown) => console.error(error));
  }
}

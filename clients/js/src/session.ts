// The session endpoint: its tokens, any messages both ways, token streams.

import { Connection } from "./connection.ts";
import type { Grant } from "./contract.ts";
import type { JsonObject } from "./messages.ts";
import { text } from "./messages.ts";
import type { ConnectionOptions, CredentialRequest } from "./options.ts";
import type { Address } from "./platform.ts";
import { TokenStream } from "./streams.ts";

/**
 * A token, alone or with the session that it opens. It opens one connection or event stream, once; where it begins with `sse.`,
 * any number of event streams until it expires, and no WebSocket.
 */
export type SessionToken =
  | string
  | {
      /** The token. */
      token: string;
      /** Path, or whole URL, of the session; instead of `agent` and `session`. */
      path?: string;
      /** The agent; default: that of the options. */
      agent?: string;
      /** The session; default: that of the options. */
      session?: string;
    };

/** Options of a session. */
export interface SessionOptions extends ConnectionOptions {
  /** The gateway, such as `https://gateway.example`; or, without `agent` and `session`, the whole URL of the session. */
  url: Address;
  /** The agent's id. */
  agent?: string;
  /** The session's id. */
  session?: string;
  /**
   * Gets a fresh token from your backend; called before every connection or event stream, since each opens only one. With the
   * token of an event stream (`sse.…`) only these are opened, whatever carries other connections. Throw a `GiveUp` where there will
   * be none any more; anything else that is thrown is tried again.
   */
  getToken: (request: CredentialRequest) => SessionToken | Promise<SessionToken>;
}

/** Prefix of tokens that open event streams only, any number of them until they expire. */
const EVENT_STREAM_PREFIX = "sse.";
/** Upper bound of remembered token streams that have ended and that the application does not hold. */
const STREAMS_MAX = 64;

/** A session with a worker: what came is delivered once and in order, over any number of connections. */
export class Session<M = unknown> extends Connection<M> {
  readonly #options: SessionOptions;
  readonly #streams: Map<string, TokenStream> = new Map();

  /** Begins to connect; see {@link connectSession}. */
  constructor(options: SessionOptions) {
    super(options);
    this.#options = options;
    this.on("state", ({ state }) => {
      if (state === "closed") for (const stream of this.#streams.values()) stream.abandon();
    });
  }

  /** The token stream `id`, whether anything of it has come or not. */
  stream(id: string): TokenStream {
    let stream = this.#streams.get(id);
    if (!stream) {
      stream = new TokenStream(id, (stream) => this.send({ type: "stream_stop", stream }));
      this.#streams.set(id, stream);
      for (const [old, { ended }] of this.#streams) {
        if (this.#streams.size <= STREAMS_MAX) break;
        if (ended) this.#streams.delete(old);
      }
    }
    return stream;
  }

  /** The token streams that were heard of, oldest first. */
  get streams(): TokenStream[] {
    return [...this.#streams.values()].filter(({ state }) => state !== "unknown");
  }

  /** Calls `handler` with every token stream when it is heard of first. Answers a function that ends it. */
  onStream(handler: (stream: TokenStream) => unknown): () => void {
    return this.on("stream", handler);
  }

  protected override async authorize(request: CredentialRequest): Promise<Grant> {
    const given = (await this.#options.getToken(request)) as SessionToken | null | undefined;
    const {
      token,
      path,
      agent = this.#options.agent,
      session = this.#options.session,
    }: Partial<Exclude<SessionToken, string>> = typeof given === "string" ? { token: given } : (given ?? {});
    if (typeof token !== "string" || token === "") throw new Error("getToken gave no token.");
    const eventStream = token.startsWith(EVENT_STREAM_PREFIX);
    if (path !== undefined) return { token, url: new URL(path, this.base).href, eventStream };
    const url = new URL(this.base);
    if (agent !== undefined && session !== undefined) {
      url.pathname = `${url.pathname.replace(/\/$/, "")}/${encodeURIComponent(agent)}/ws/${encodeURIComponent(session)}`;
    }
    return { token, url: url.href, eventStream };
  }

  protected override get greeting(): string {
    return "opened";
  }

  protected override notice(message: JsonObject, id: string | undefined): boolean {
    // The gateway's own, and with the position at which several of them stand.
    if (message["type"] === "stream_snapshot") return this.consume(message);
    return super.notice(message, id);
  }

  protected override consume(message: JsonObject): boolean {
    const id = text(message["stream"]);
    if (id === undefined || !/^stream_(open|append|end|snapshot)$/.test(String(message["type"]))) return false;
    // A worker may use a name again when the old stream is held no longer.
    if (message["type"] === "stream_open" && this.#streams.get(id)?.ended) this.#streams.delete(id);
    const stream = this.stream(id);
    const fresh = stream.state === "unknown";
    // The handler comes first, so that what it attaches to the stream hears of this very message.
    if (fresh) this.tell("stream", stream);
    stream.take(message);
    return true;
  }

  protected override renewed(): void {
    this.#streams.clear();
  }
}

/**
 * Opens a session. `M` is what the worker sends.
 *
 * ```ts
 * const session = connectSession<{ type: "token"; text: string } | { type: "done" }>({
 *   url: "https://gateway.example", agent: "demo", session: "s-1",
 *   getToken: async ({ signal }) => (await fetch("/tokens/s-1", { method: "POST", signal })).json(),
 * });
 * session.onType("token", ({ text }) => output.append(text));
 * session.send({ type: "prompt", text: "Hello" });
 * ```
 */
export function connectSession<M = unknown>(options: SessionOptions): Session<M> {
  return new Session<M>(options);
}

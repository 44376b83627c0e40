// Calls tools on users' agents over the gateway's HTTP API, from a server: the API key may not be in a page.

import { fullJitter } from "../backoff.ts";
import { type JsonObject, parse } from "../messages.ts";
import type { Address, FetchLike, ResponseLike, SignalLike } from "../platform.ts";
import { CallError, callError } from "./errors.ts";
import type { Progress } from "./progress.ts";
import { failure, readReply, type Reply } from "./reply.ts";

/** Options of a caller. */
export interface AgentsOptions {
  /** An API key with the scope `agents`. */
  apiKey: string;
  /** The fetch to use. Default: the global one. */
  fetch?: FetchLike;
  /** A source of numbers in [0, 1). Default `Math.random`. */
  random?: () => number;
}

/** Options of one call. */
export interface CallOptions {
  /** Time for the whole call, further tries included. Default 30 s. */
  timeoutMs?: number;
  /**
   * Id of the call (letters, digits and `-_.~@+=|`). The gateway that holds the agent runs it once, however often it is sent; so a call
   * whose answer was lost, or whose agent went away, is sent again.
   */
  idempotencyKey?: string;
  /** W3C trace context, which the agent gets. */
  traceparent?: string;
  /** Called with the progress that the tool tells. What it throws ends the call. */
  onProgress?: (progress: Progress) => void;
  /** Cancels the call when aborted. */
  signal?: SignalLike;
}

const TIMEOUT_MS = 30_000;
/** The gateway ends a call in time; where it does not, this much later it counts as unreachable. */
const BACKSTOP_MS = 5_000;
/** A proxy may end an answer that is silent for a minute; an event stream has a comment every 15 s. */
const SILENT_MS = 30_000;
const PAUSE_MS = 250;
const PAUSE_MAX_MS = 5_000;
const NEVER_SENT: readonly string[] = ["ECONNREFUSED", "ENOTFOUND", "EAI_AGAIN", "UND_ERR_CONNECT_TIMEOUT"];

/**
 * Calls tools on users' agents.
 *
 * ```ts
 * const agents = new Agents("https://gateway.example", { apiKey });
 * const text = await agents.call<string>("u-1", "read_file", { path: "notes.txt" }, { timeoutMs: 30_000 });
 * ```
 */
export class Agents {
  readonly #base: string;
  readonly #options: AgentsOptions;

  constructor(url: Address, options: AgentsOptions) {
    const { href } = new URL(typeof url === "string" ? url : url.href);
    this.#base = href.endsWith("/") ? href : `${href}/`;
    this.#options = options;
  }

  /**
   * Calls a tool on the agent of `user` and resolves with its result. Rejects with a {@link CallError}: `ToolError`, `AgentOffline`,
   * `AgentGone`, `AgentBusy`, `CallTimeout`, `CallCancelled`, `CallDuplicate`, or another code. What was certainly not done, or has an
   * `idempotencyKey`, is tried again within `timeoutMs`.
   */
  async call<R = any>(user: string, tool: string, params: unknown = {}, options: CallOptions = {}): Promise<R> {
    const deadline = Date.now() + (options.timeoutMs ?? TIMEOUT_MS);
    for (let attempt = 0; ; attempt += 1) {
      const reply = await this.#try(user, { tool, params }, deadline, options);
      if ("result" in reply) return reply.result as R;
      const jitterMs = fullJitter(attempt, PAUSE_MS, PAUSE_MAX_MS, this.#options.random ?? Math.random);
      const pauseMs = Math.max(reply.retryAfterMs, jitterMs);
      if (!reply.error.retryable || Date.now() + pauseMs >= deadline) throw reply.error;
      await pause(pauseMs, options.signal);
    }
  }

  /** Cancels a call by its idempotency key, from any process. Its caller gets a `CallCancelled`, or the result that came first. */
  async cancel(user: string, idempotencyKey: string): Promise<void> {
    await this.#ask("DELETE", `${checkId(user)}/calls/${checkId(idempotencyKey)}`);
  }

  /** True where an agent of the user is connected now; a call may find it otherwise. */
  async isConnected(user: string): Promise<boolean> {
    return this.#ask("GET", checkId(user));
  }

  async #try(user: string, call: JsonObject, deadline: number, options: CallOptions): Promise<Reply> {
    const { idempotencyKey, traceparent, onProgress, signal } = options;
    const abort = new AbortController();
    const leftMs = Math.max(deadline - Date.now(), 1);
    const isSlow = leftMs > SILENT_MS || onProgress !== undefined;
    const timer = setTimeout(() => abort.abort(timedOut(idempotencyKey)), leftMs + BACKSTOP_MS);
    const release = onAbort(signal, () => abort.abort(cancelled(idempotencyKey)));
    const tell = (progress: Progress): void => {
      try {
        onProgress?.(progress);
      } catch (error) {
        abort.abort(error);
        throw error;
      }
    };
    try {
      const response = await this.#fetch(`${checkId(user)}/calls`, {
        method: "POST",
        headers: {
          ...this.#headers,
          "Content-Type": "application/json",
          Accept: isSlow ? "text/event-stream" : "application/json",
          ...(idempotencyKey === undefined ? {} : { "Idempotency-Key": checkId(idempotencyKey) }),
          ...(traceparent === undefined ? {} : { traceparent }),
        },
        body: JSON.stringify({ ...call, timeout_ms: leftMs }),
        signal: abort.signal,
      });
      return await readReply(response, idempotencyKey, tell);
    } catch (error) {
      if (abort.signal.aborted) throw abort.signal.reason;
      return { error: lost(error, idempotencyKey), retryAfterMs: 0 };
    } finally {
      clearTimeout(timer);
      release();
      // An answer that was not read to its end is given up.
      abort.abort();
    }
  }

  /** Sends a request without a body; true where it succeeds, false where the gateway does not know what it names. */
  async #ask(method: string, path: string): Promise<boolean> {
    try {
      const response = await this.#fetch(path, { method, headers: this.#headers, signal: AbortSignal.timeout(TIMEOUT_MS) });
      const body = parse(await response.text());
      if (response.ok) return true;
      const error = failure(body, response.status, undefined);
      if (response.status !== 404 || error.code === "outcome_unknown") throw error;
      return false;
    } catch (error) {
      throw error instanceof CallError ? error : lost(error, undefined);
    }
  }

  get #headers(): Record<string, string> {
    return { Authorization: `Bearer ${this.#options.apiKey}` };
  }

  #fetch(path: string, init: object): Promise<ResponseLike> {
    const fetcher = this.#options.fetch ?? ((...a: Parameters<typeof fetch>) => fetch(...a));
    return fetcher(`${this.#base}api/v1/agents/${path}`, init);
  }
}

/** `id` where it is one: any other would change the path. */
function checkId(id: string): string {
  if (/^[\w\-.~@+=|]{1,128}$/.test(id) && id !== "." && id !== "..") return encodeURIComponent(id);
  const message = `${JSON.stringify(id)} is no id: 1 to 128 letters, digits and -_.~@+=|.`;
  throw callError({ code: "bad_id", message, retryable: false });
}

/** The error of a try without an answer. */
function lost(error: unknown, requestId: string | undefined): CallError {
  if (error instanceof CallError) return error;
  const cause = (error as { cause?: { code?: unknown; message?: unknown } } | null)?.cause;
  const wasNeverSent = typeof cause?.code === "string" && NEVER_SENT.includes(cause.code);
  const code = wasNeverSent ? "unreachable" : "outcome_unknown";
  const message = `The gateway did not answer: ${cause?.message ?? error}`;
  return callError({ code, message, retryable: wasNeverSent || requestId !== undefined, requestId });
}

function cancelled(requestId: string | undefined): CallError {
  return callError({ code: "cancelled", message: "The caller has cancelled the call.", retryable: false, requestId });
}

function timedOut(requestId: string | undefined): CallError {
  return callError({ code: "timeout", message: "The gateway did not answer in time.", retryable: false, requestId });
}

/** Calls `abort` when the signal is aborted, at once if it is. Answers a function that ends that. */
function onAbort(signal: SignalLike | undefined, abort: () => void): () => void {
  if (signal?.aborted) abort();
  signal?.addEventListener("abort", abort);
  return () => (signal as { removeEventListener?(type: string, listener: () => void): void } | undefined)?.removeEventListener?.("abort", abort);
}

function pause(ms: number, signal: SignalLike | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(done, ms);
    const release = onAbort(signal, () => {
      clearTimeout(timer);
      reject(cancelled(undefined));
    });
    function done(): void {
      release();
      resolve();
    }
  });
}

// The calls that run on an agent: bounded in number, each with a signal that ends it. Knows nothing of WebSockets.

import { isObject, type JsonObject, number, text } from "../messages.ts";
import type { Signal } from "../platform.ts";
import { Answers } from "./answers.ts";

/** A connection to the gateway, as calls see it. */
export interface Line {
  /** True where the gateway hears progress. */
  readonly hearsProgress: boolean;
  /**
   * The milliseconds until a message may be sent: the gateway closes connections that send too many, and one that reads too slowly must
   * not fill the memory. `reserve` is the share of what may be sent at once that stays for others.
   */
  pauseMs(reserve?: number): number;
  /** Sends a message; once the connection has ended, nowhere. */
  send(message: string): void;
}

/** What a tool gets beside its parameters. */
export interface CallContext {
  /** Id of the call: the caller's Idempotency-Key, where it gave one. */
  readonly requestId: string;
  /** Name of the tool. */
  readonly tool: string;
  /** Time of this machine (`Date.now()`) at which the gateway gives the call up, where it told it. */
  readonly deadline: number | undefined;
  /** W3C trace context of the call, where the caller gave one. */
  readonly traceparent: string | undefined;
  /** Aborted when no caller waits for the result any more: the call was cancelled, its time is over, or the connection has ended. */
  readonly signal: Signal;
  /** Tells the caller how far the work is. At most 20 of these a second are sent, the newest of all. */
  progress(progress: number, total?: number, message?: string): void;
}

/** A tool: returns, or promises, its result, which becomes JSON. What it throws is the call's error. */
export type Tool<P = any> = (params: P, context: CallContext) => unknown;

/** The end of a call on this agent. */
export interface Ended {
  requestId: string;
  tool: string;
  /** `cancelled`: no caller waited for the result any more. */
  outcome: "result" | "error" | "cancelled";
  /** Run time, without the time in which it waited for its turn. */
  executionMs: number;
  /** The thrown value. */
  error?: unknown;
}

/** Bounds of the calls of an agent. */
export interface CallLimits {
  /** Calls that run at the same time. */
  running: number;
  /** Calls that wait for their turn. */
  waiting: number;
  /** Bytes of one response. */
  bytes: number;
}

interface Call {
  /** The connection over which it came last, which gets the response. */
  line: Line;
  /** Tells it from another call of the same id. */
  body: string;
  requestId: string;
  tool: string;
  params: unknown;
  deadline: number | undefined;
  traceparent: string | undefined;
  abort: AbortController;
}

const PROGRESS_PAUSE_MS = 50;
/** Responses come before progress. */
const PROGRESS_RESERVE = 0.5;
/** Levels of a message that the gateway reads. */
const DEPTH_MAX = 128;
/** Characters of an error's message that are sent. */
const ERROR_MAX = 16 * 1024;

/** Invariant: no more than `limits.running` tools run, over all connections, and no more than `limits.waiting` calls wait. */
export class Calls {
  readonly #tools: ReadonlyMap<string, Tool>;
  readonly #limits: CallLimits;
  readonly #ended: (end: Ended) => void;
  readonly #answers: Answers = new Answers();
  readonly #running: Set<Call> = new Set();
  #waiting: Call[] = [];
  /** Called when no call runs or waits any more; there while the agent is ending. */
  #idle: (() => void) | undefined;

  constructor(tools: ReadonlyMap<string, Tool>, limits: CallLimits, ended: (end: Ended) => void) {
    this.#tools = tools;
    this.#limits = limits;
    this.#ended = ended;
  }

  /** Takes a `tool_call` of the gateway. */
  take(line: Line, message: JsonObject): void {
    const { requestId, tool, params = {} } = message;
    if (typeof requestId !== "string" || typeof tool !== "string") return;
    const left = number(message["deadlineMs"]);
    const call: Call = {
      line, requestId, tool, params,
      body: JSON.stringify([tool, params]),
      deadline: left === undefined ? undefined : Date.now() + left,
      traceparent: text(message["traceparent"]),
      abort: new AbortController(),
    };
    const answer = this.#answers.find(requestId, call.body, Date.now());
    if (answer !== undefined) return void respond(call, answer);
    if (this.#idle) return this.#refuse(call, "The agent is ending.");
    if (!this.#tools.has(tool)) return this.#refuse(call, `There is no tool ${JSON.stringify(tool)} on this agent.`);
    if (this.#waiting.length >= this.#limits.waiting) return this.#refuse(call, "Too many calls wait on this agent.");
    this.#waiting.push(call);
    this.#next();
  }

  /** Takes a `tool_cancel` of the gateway. */
  cancel(line: Line, message: JsonObject): void {
    const reason = text(message["reason"]) ?? "The call was cancelled.";
    this.#abort((call) => call.line === line && call.requestId === message["requestId"], reason);
  }

  /** Ends the calls of a connection that has ended: no caller waits for their results. */
  end(line: Line): void {
    this.#abort((call) => call.line === line, "The connection has ended.");
  }

  /** Takes no further calls; resolves when those that are here have ended, or when `begin` takes calls again. */
  drain(): Promise<void> {
    return new Promise((resolve) => {
      this.#idle = resolve;
      this.#next();
    });
  }

  /** Takes calls again. */
  begin(): void {
    this.#idle?.();
    this.#idle = undefined;
  }

  #abort(isMeant: (call: Call) => boolean, reason: string): void {
    for (const call of this.#waiting.filter(isMeant)) this.#tell(call, "cancelled", 0);
    this.#waiting = this.#waiting.filter((call) => !isMeant(call));
    for (const call of this.#running) if (isMeant(call)) call.abort.abort(new Error(reason));
  }

  #next(): void {
    // A call that came again waits until its first run has ended, whose answer is then its own.
    const isRunning = ({ requestId }: Call): boolean => [...this.#running].some((other) => other.requestId === requestId);
    while (this.#running.size < this.#limits.running) {
      const place = this.#waiting.findIndex((call) => !isRunning(call));
      const [call] = place < 0 ? [] : this.#waiting.splice(place, 1);
      if (!call) break;
      const answer = this.#answers.find(call.requestId, call.body, Date.now());
      if (answer !== undefined) {
        void respond(call, answer);
        continue;
      }
      this.#running.add(call);
      void this.#run(call).finally(() => {
        this.#running.delete(call);
        this.#next();
      });
    }
    if (this.#running.size === 0 && this.#waiting.length === 0) this.#idle?.();
  }

  async #run(call: Call): Promise<void> {
    const { requestId, tool, deadline, traceparent, abort } = call;
    const teller = new Teller(call);
    const since = Date.now();
    let answer: Pick<Ended, "outcome" | "error">;
    let response: string;
    try {
      const progress: CallContext["progress"] = (done, total, message) => teller.tell(done, total, message);
      const context = { requestId, tool, deadline, traceparent, signal: abort.signal as Signal, progress };
      const result = (await (this.#tools.get(tool) as Tool)(call.params, context)) ?? null;
      response = this.#response(call, true, result, null, Date.now() - since);
      answer = { outcome: "result" };
    } catch (error) {
      response = this.#response(call, false, null, explain(error), Date.now() - since);
      answer = { outcome: "error", error };
    }
    const executionMs = Date.now() - since;
    teller.end();
    // The error of a tool that was told to stop is no answer: when the call comes again, it runs again.
    if (answer.outcome === "result" || !abort.signal.aborted) this.#answers.keep(requestId, call.body, response, Date.now());
    if (await respond(call, response)) this.#tell(call, answer.outcome, executionMs, answer.error);
    else this.#tell(call, "cancelled", executionMs);
  }

  #refuse(call: Call, reason: string): void {
    void respond(call, this.#response(call, false, null, reason, 0));
    this.#tell(call, "error", 0, new Error(reason));
  }

  #tell({ requestId, tool }: Call, outcome: Ended["outcome"], executionMs: number, error?: unknown): void {
    this.#ended({ requestId, tool, outcome, executionMs, ...(error === undefined ? {} : { error }) });
  }

  /** Throws where a result is no JSON, or so large that the gateway would end the connection and with it every call. */
  #response({ requestId }: Call, success: boolean, result: unknown, error: string | null, executionTime: number): string {
    const response = JSON.stringify({ type: "tool_response", requestId, success, result, error, executionTime });
    const { bytes } = this.#limits;
    if (depth(response) > DEPTH_MAX) throw new Error(`The result is nested too deeply: ${DEPTH_MAX} levels are allowed.`);
    // A character takes three bytes at most, so that most responses need not be encoded to be measured.
    if (!success || response.length * 3 <= bytes) return response;
    const size = new TextEncoder().encode(response).length;
    if (size > bytes) throw new Error(`The result is too large: ${size} bytes, and ${bytes} are allowed.`);
    return response;
  }
}

/** Sends the progress of one call, at most 20 times a second, and the newest always. */
class Teller {
  readonly #call: Call;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #newest: object | undefined;
  #isOver = false;

  constructor(call: Call) {
    this.#call = call;
  }

  /** Takes progress. What is no progress is left out: the gateway closes connections that send a lot of it. */
  tell(progress: unknown, total: unknown, message: unknown): void {
    if (this.#isOver || !Number.isFinite(progress)) return;
    this.#newest = {
      progress,
      ...(Number.isFinite(total) ? { total } : {}),
      ...(typeof message === "string" ? { message } : {}),
    };
    if (this.#timer === undefined) this.#send();
  }

  /** Sends what waits: nothing may come after the response. */
  end(): void {
    this.#isOver = true;
    clearTimeout(this.#timer);
    this.#send();
    clearTimeout(this.#timer);
  }

  #send(): void {
    const { line, requestId, abort } = this.#call;
    const newest = this.#newest;
    this.#newest = this.#timer = undefined;
    if (!newest || !line.hearsProgress || abort.signal.aborted) return;
    const wait = line.pauseMs(PROGRESS_RESERVE);
    if (wait > 0) this.#newest = newest;
    else line.send(JSON.stringify({ type: "tool_progress", requestId, ...newest }));
    this.#timer = setTimeout(() => this.#send(), Math.max(wait, PROGRESS_PAUSE_MS));
  }
}

/** Sends a response when it is its turn; false where no caller waits for it any more. */
async function respond({ line, abort }: Call, response: string): Promise<boolean> {
  for (let ms = line.pauseMs(); ms > 0; ms = line.pauseMs()) {
    await pause(ms);
    if (abort.signal.aborted) break;
  }
  if (!abort.signal.aborted) line.send(response);
  return !abort.signal.aborted;
}

/** Number of levels of arrays and objects in valid JSON. */
function depth(json: string): number {
  let [level, deepest, isText] = [0, 0, false];
  for (let at = 0; at < json.length; at += 1) {
    const char = json[at];
    if (isText && char === "\\") at += 1;
    else if (char === '"') isText = !isText;
    else if (isText) continue;
    else if (char === "[" || char === "{") deepest = Math.max(deepest, (level += 1));
    else if (char === "]" || char === "}") level -= 1;
  }
  return deepest;
}

function explain(error: unknown): string {
  const message = isObject(error) || error instanceof Error ? text((error as { message?: unknown }).message) : undefined;
  return (message || String(error)).slice(0, ERROR_MAX);
}

function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

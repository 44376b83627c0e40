// The gateway's answer to a call over HTTP: a JSON object, or events of which the last is that object. Knows no request.

import { isObject, type JsonObject, number, parse, text } from "../messages.ts";
import type { ResponseLike } from "../platform.ts";
import { SseParser } from "../sse-parser.ts";
import { type CallError, callError } from "./errors.ts";
import type { Progress } from "./progress.ts";

/** What came of one try: the tool's result, or an error and the least time to wait before another try. */
export type Reply = { result: unknown } | { error: CallError; retryAfterMs: number };

/** Reads the answer to a call of this id, where it has one. Rejects where the answer breaks off. */
export async function readReply(
  response: ResponseLike,
  requestId: string | undefined,
  onProgress: (progress: Progress) => void,
): Promise<Reply> {
  const isStream = response.headers.get("Content-Type")?.startsWith("text/event-stream");
  const body = isStream ? await readEvents(response, onProgress) : parse(await response.text());
  if (isObject(body) && body["outcome"] === "response") {
    if (body["success"] === true) return { result: body["result"] };
    const message = text(body["error"]) ?? "The tool has failed.";
    const id = text(body["request_id"]) ?? requestId;
    return { error: callError({ code: "tool_error", message, retryable: false, status: response.status, requestId: id }), retryAfterMs: 0 };
  }
  const seconds = Number(response.headers.get("Retry-After"));
  return { error: failure(body, response.status, requestId), retryAfterMs: seconds > 0 ? seconds * 1000 : 0 };
}

/** The error in a body of the gateway. Anything else is that of a program in between, behind which the call may have been made. */
export function failure(body: unknown, status: number, requestId: string | undefined): CallError {
  const { error, request_id } = isObject(body) ? body : ({} as JsonObject);
  const id = text(request_id) ?? requestId;
  const { code, message, retryable } = isObject(error) ? error : ({} as JsonObject);
  if (typeof code === "string") {
    return callError({ code, message: text(message) ?? code, retryable: retryable === true, status, requestId: id });
  }
  const stranger = `Something that is not the gateway has answered with HTTP ${status}.`;
  return callError({ code: "outcome_unknown", message: stranger, retryable: requestId !== undefined, status, requestId: id });
}

/** Reads events up to the result, which it returns. */
async function readEvents(response: ResponseLike, onProgress: (progress: Progress) => void): Promise<unknown> {
  let result: unknown;
  const parser = new SseParser(({ type, data = "" }) => {
    const value = parse(data);
    if (type === "result") result = value;
    else if (type === "progress" && isObject(value)) {
      onProgress({ progress: number(value["progress"]) ?? 0, total: number(value["total"]), message: text(value["message"]) });
    }
  });
  const decoder = new TextDecoder();
  const reader = response.body?.getReader();
  while (result === undefined) {
    const { done, value } = (await reader?.read()) ?? { done: true };
    if (done) throw new Error("The answer ended without a result.");
    parser.push(decoder.decode(value, { stream: true }));
  }
  return result;
}

// The answer to a refused handshake, which of all WebSockets only those of the package `ws` show: its body tells the gateway's own refusal from
// that of a program in between.

import { type End, parseRefusal } from "./advice.ts";

/** The used part of the answer. */
interface Answer {
  statusCode?: number;
  headers: Record<string, string | string[] | undefined>;
  on(event: string, listener: (chunk: unknown) => void): unknown;
}

interface Telling {
  on?: (event: string, listener: (request: unknown, answer: Answer) => void) => void;
  close(): void;
}

const BODY_MAX = 16 * 1024;

/** Calls `ended` when the handshake of `socket` is refused and the answer has been read, if this socket shows it. */
export function whenRefused(socket: object, ended: (end: End) => void): void {
  const telling = socket as Telling;
  telling.on?.("unexpected-response", (_, answer) => {
    let body = "";
    const done = (): void => {
      const refusal = parseRefusal(body);
      const seconds = Number(answer.headers["retry-after"]);
      ended({
        code: 1006,
        reason: refusal?.code ?? `HTTP ${answer.statusCode}`,
        opened: false,
        status: answer.statusCode ?? 0,
        ...(refusal ? { refusal } : {}),
        ...(seconds > 0 ? { retryAfterMs: seconds * 1000 } : {}),
      });
      telling.close();
    };
    answer.on("data", (chunk) => {
      if (body.length < BODY_MAX) body += String(chunk);
    });
    answer.on("end", done);
    answer.on("error", done);
  });
}

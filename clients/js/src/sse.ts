// The transport of server-sent events, for networks that let no WebSocket through: downstream only, read with fetch, since
// an EventSource can neither send a header nor tell why it was refused.

import { type End, parseRefusal } from "./advice.ts";
import type { FetchLike, ResponseLike } from "./platform.ts";
import { SseParser } from "./sse-parser.ts";
import type { Target, Transport, TransportEvents } from "./transport.ts";

/** Opens a stream of server-sent events. */
export function openSse(
  fetcher: FetchLike,
  target: Target,
  tokenIn: "header" | "query",
  events: TransportEvents,
): Transport {
  const abort = new AbortController();
  let opened = false;
  const end = (what: Partial<End>): void => {
    if (abort.signal.aborted) return;
    abort.abort();
    events.ended({ code: 1006, reason: "", opened, ...what });
  };

  const read = async (): Promise<void> => {
    const url = new URL(target.url);
    url.protocol = url.protocol.replace("ws", "http");
    const headers: Record<string, string> = { Accept: "text/event-stream" };
    if (tokenIn === "header") headers["Authorization"] = `Bearer ${target.token}`;
    else url.searchParams.set("token", target.token);
    const response = await fetcher(url.href, { headers, cache: "no-store", signal: abort.signal });
    if (!response.ok || !response.body || !response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
      return end(await refused(response));
    }
    if (abort.signal.aborted) return;
    opened = true;
    events.opened();
    const parser = new SseParser(({ type, data, id }) => {
      if (abort.signal.aborted) return;
      if (type === "close") return end(parseClose(data));
      if (data === undefined) return id ? events.position(id) : undefined;
      events.frame({ body: data, id: id ?? "" });
    });
    const decoder = new TextDecoder();
    const reader = response.body.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return end({});
      events.alive();
      parser.push(decoder.decode(value, { stream: true }));
    }
  };
  read().catch((error: unknown) => end({ reason: String(error) }));

  return {
    kind: "sse",
    send: () => undefined,
    unsent: () => 0,
    close: () => abort.abort(),
  };
}

async function refused(response: ResponseLike): Promise<Partial<End>> {
  const seconds = Number(response.headers.get("Retry-After"));
  const refusal = response.ok ? undefined : parseRefusal(await response.text().catch(() => ""));
  return {
    // Something that answers well, but with no events, is no gateway.
    status: response.ok ? 406 : response.status,
    reason: refusal?.code ?? `HTTP ${response.status}`,
    ...(refusal ? { refusal } : {}),
    ...(seconds > 0 ? { retryAfterMs: seconds * 1000 } : {}),
  };
}

function parseClose(data = "{}"): Partial<End> {
  try {
    const { code = 1006, reason = "" } = JSON.parse(data) as Partial<End>;
    return { code, reason };
  } catch {
    return {};
  }
}

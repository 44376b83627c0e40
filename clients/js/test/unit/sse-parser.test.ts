// The format of server-sent events, in any division into chunks.

import { expect, test } from "vitest";
import { type SseEvent, SseParser } from "../../src/sse-parser.ts";

const STREAM = 'id: 5-0\n\n:\n\nid: 5-1\ndata: {"a":1}\n\ndata: one\ndata:two\ndata\n\nretry: 10\r\nevent: close\r\ndata: {"code":1012}\r\n\r\ndata: last\r\r';
const EVENTS: SseEvent[] = [
  { type: "message", data: undefined, id: "5-0" },
  { type: "message", data: '{"a":1}', id: "5-1" },
  { type: "message", data: "one\ntwo\n", id: undefined },
  { type: "close", data: '{"code":1012}', id: undefined },
  { type: "message", data: "last", id: undefined },
];

function parse(chunks: string[]): SseEvent[] {
  const events: SseEvent[] = [];
  const parser = new SseParser((event) => events.push(event));
  // The line feed that the last carriage return may wait for.
  for (const chunk of [...chunks, ":\n"]) parser.push(chunk);
  return events;
}

test("every division into two chunks, and into single characters, gives the same events", () => {
  expect(parse([...STREAM])).toEqual(EVENTS);
  for (let at = 0; at <= STREAM.length; at += 1) {
    expect(parse([STREAM.slice(0, at), STREAM.slice(at)])).toEqual(EVENTS);
  }
});

test("what is incomplete at the end is no event", () => {
  expect(parse(["data: half"])).toEqual([]);
});

// Token streams: the merged text, whatever comes twice, too early or not at all.

import { expect, test } from "vitest";
import { TokenStream } from "../../src/streams.ts";

const PIECES = ["The ", "quick ", "brown ", "fox", "."];
const WHOLE = PIECES.join("");
const open = { type: "stream_open", stream: "a", meta: { model: "m" } };
const append = (seq: number): Record<string, unknown> => ({ type: "stream_append", stream: "a", seq, text: PIECES[seq - 1] });
const end = { type: "stream_end", stream: "a", outcome: "finish", seq: PIECES.length };
const snapshot = (seq: number, state = "open"): Record<string, unknown> => ({
  type: "stream_snapshot", stream: "a", state, seq, text: PIECES.slice(0, seq).join(""), meta: { model: "m" },
});

function merged(...messages: Record<string, unknown>[]): TokenStream {
  const stream = new TokenStream("a", () => undefined);
  for (const message of messages) stream.take(message);
  return stream;
}

function* orders<T>(items: T[]): Generator<T[]> {
  if (items.length < 2) return yield items;
  for (const [at, item] of items.entries()) {
    for (const rest of orders(items.toSpliced(at, 1))) yield [item, ...rest];
  }
}

test("in order", () => {
  const stream = merged(open, ...PIECES.map((_, at) => append(at + 1)), end);
  expect(stream).toMatchObject({ text: WHOLE, state: "finish", seq: 5, meta: { model: "m" }, incomplete: false });
});

test("every order of appends, with a duplicate of each, gives the same text", () => {
  for (const order of orders([1, 2, 3, 4, 5])) {
    const stream = merged(open, ...order.flatMap((seq) => [append(seq), append(seq)]));
    expect([order, stream.text, stream.incomplete]).toEqual([order, WHOLE, false]);
  }
});

test("whatever came before a snapshot, and from wherever the stream goes on behind it, the text is the same", () => {
  const replay = [open, ...PIECES.map((_, at) => append(at + 1)), end];
  for (let known = 0; known <= replay.length; known += 1) {
    for (let seq = 0; seq <= PIECES.length; seq += 1) {
      for (let from = 0; from <= seq; from += 1) {
        const stream = merged(...replay.slice(0, known), snapshot(seq), ...replay.slice(from + 1));
        expect([known, seq, from, stream.text, stream.state, stream.incomplete]).toEqual([known, seq, from, WHOLE, "finish", false]);
      }
    }
  }
});

test("after a rollback the stream goes on from the older snapshot, with another text and another end", async () => {
  const stream = merged(open, append(1), append(2), { ...end, seq: 2 });
  const ended = stream.once("end");
  stream.take(snapshot(1));
  expect([stream.text, stream.state]).toEqual(["The ", "open"]);
  stream.take({ ...append(2), text: "slow" });
  stream.take({ ...end, seq: 2, outcome: "cancelled" });
  expect(await ended).toEqual({ outcome: "cancelled", text: "The slow" });
});

test("a snapshot of a stream that has ended is all there is to know", () => {
  const stream = merged({ ...snapshot(5, "error"), error: { code: "worker_lost", message: "gone" } });
  expect(stream).toMatchObject({ text: WHOLE, state: "error", error: { code: "worker_lost", message: "gone" } });
});

test("missing text is never skipped in silence", () => {
  const stream = merged(open, append(1), append(3));
  expect(stream).toMatchObject({ text: "The ", incomplete: true });
  stream.take(end);
  expect(stream).toMatchObject({ text: "The ", state: "finish", incomplete: true });
  stream.take(snapshot(5, "finish"));
  expect(stream).toMatchObject({ text: WHOLE, incomplete: false });
});

test("handlers hear what was added, and of the end once", () => {
  const stream = new TokenStream("a", () => undefined);
  const heard: unknown[] = [];
  stream.on("update", ({ delta }) => heard.push(delta));
  stream.on("end", ({ outcome }) => heard.push(outcome));
  for (const message of [open, append(1), append(1), append(3), append(2), append(4), append(5), end, end]) stream.take(message);
  expect(heard).toEqual(["", "The ", "quick brown ", "fox", ".", "", "finish"]);
});

test("a replaced text has no delta", () => {
  const stream = merged(open, append(1));
  const heard: unknown[] = [];
  stream.on("update", (update) => heard.push(update));
  stream.take({ type: "stream_snapshot", stream: "a", state: "open", seq: 9, text: "Other" });
  expect(heard).toEqual([{ text: "Other", delta: undefined }]);
});

test("a loop sees the newest text and ends with the stream", async () => {
  const stream = new TokenStream("a", () => undefined);
  const seen: string[] = [];
  const loop = (async () => {
    for await (const text of stream) seen.push(text);
  })();
  for (const message of [open, append(1), append(2)]) stream.take(message);
  await Promise.resolve();
  await new Promise((resolve) => setImmediate(resolve));
  for (const message of [append(3), append(4), append(5), end]) stream.take(message);
  await loop;
  expect(seen.at(-1)).toBe(WHOLE);
  expect(seen).toContain("The quick ");
  expect((await stream.finished()).state).toBe("finish");
});

test("a handler that is added while handlers are called begins with the next event", () => {
  const stream = new TokenStream("a", () => undefined);
  let calls = 0;
  stream.on("update", () => {
    if (calls === 0) stream.on("update", () => (calls += 10));
    calls += 1;
  });
  stream.take(open);
  expect(calls).toBe(1);
  stream.take(append(1));
  expect(calls).toBe(12);
});

test("only a stream that has not ended is stopped", () => {
  const asked: string[] = [];
  const stream = new TokenStream("a", (id) => asked.push(id));
  stream.take(open);
  stream.stop();
  stream.take({ ...end, outcome: "cancelled" });
  stream.stop();
  expect([asked, stream.state]).toEqual([["a"], "cancelled"]);
});

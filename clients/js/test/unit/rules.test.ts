// Rules without a network: backoff, credentials in a subprotocol, the envelope, positions, the set of recent ids.

import { expect, test } from "vitest";
import { Answers } from "../../src/agents/answers.ts";
import { fullJitter } from "../../src/backoff.ts";
import { isBehind, position } from "../../src/messages.ts";
import { Recent } from "../../src/recent.ts";
import { bearer, unwrap } from "../../src/websocket.ts";

test("backoff doubles up to the cap, and jitter covers all of it", () => {
  for (const [attempt, whole] of [[0, 500], [1, 1000], [2, 2000], [6, 30_000], [5000, 30_000]] as const) {
    expect(fullJitter(attempt, 500, 30_000, () => 0)).toBe(0);
    expect(fullJitter(attempt, 500, 30_000, () => 0.5)).toBe(whole / 2);
    expect(fullJitter(attempt, 500, 30_000, () => 1 - 2 ** -53)).toBeLessThanOrEqual(whole);
  }
});

test("tokens go plainly where the header allows it, else in base64url", () => {
  expect(bearer("eyJhbGciOi.eyJz_-X.c2ln")).toBe("bearer.eyJhbGciOi.eyJz_-X.c2ln");
  expect(bearer("a b/c=")).toBe("bearer64.YSBiL2M9");
  expect(bearer("ÿ€")).toBe(`bearer64.${Buffer.from("ÿ€").toString("base64url")}`);
});

test("the envelope carries an id or none, around text and bytes", () => {
  expect(unwrap("5-1\nhello\nworld")).toEqual({ id: "5-1", body: "hello\nworld" });
  expect(unwrap("\n{}")).toEqual({ id: "", body: "{}" });
  expect(unwrap(Uint8Array.of(53, 45, 49, 10, 0, 255))).toEqual({ id: "5-1", body: Uint8Array.of(0, 255) });
  expect(unwrap('{"type":"opened"}')).toEqual({ body: '{"type":"opened"}' });
  expect(unwrap(`${"x".repeat(200)}\n`)).toEqual({ body: `${"x".repeat(200)}\n` });
});

test("positions are compared as numbers, other ids not at all", () => {
  expect(isBehind("9-0-000000ff", "10-0-000000aa")).toBe(true);
  expect(isBehind("10-2-000000aa", "10-10-000000aa")).toBe(true);
  expect(isBehind("10-10-000000aa", "10-10-000000bb")).toBe(false);
  expect(isBehind("18446744073709551615-1-000000aa", "18446744073709551614-2-000000aa")).toBe(false);
  expect(isBehind("order-7", "10-10-000000aa")).toBe(false);
  // Of the version before.
  expect(isBehind("9-0-000000aa", "10-0")).toBe(true);
});

test("a position has three parts and nothing else is one", () => {
  for (const id of ["1732190000000-0-5d2c0f6a", "1-0-00000000", "18446744073709551615-7-0a1b2c3d"]) expect(position(id)).toBe(id);
  for (const id of ["", "0", "0-0", "1-0", "0-1-00000000", "01-0-00000000", "1-00-00000000", "1-0-0", "1-0-0000000A", "1-0-00000000 ", 7, null]) {
    expect(position(id)).toBe(undefined);
  }
});

test("only the newest ids are remembered", () => {
  const recent = new Recent(2);
  for (const id of ["a", "b", "c"]) recent.add(id);
  expect(["a", "b", "c"].map((id) => recent.has(id))).toEqual([false, true, true]);
  recent.delete("c");
  expect(recent.has("c")).toBe(false);
});

test("an agent remembers its newest answers, within their bounds", () => {
  const answers = new Answers();
  for (let n = 0; n < 70; n += 1) answers.keep(`q-${n}`, "body", `${n}`, n);
  expect(["q-5", "q-6", "q-69"].map((id) => answers.find(id, "body", 70))).toEqual([undefined, "6", "69"]);
  expect(answers.find("q-69", "another body", 70)).toBe(undefined);
  expect(answers.find("q-69", "body", 600_069)).toBe(undefined);
  answers.keep("long", "body", "x".repeat(4 * 1024 * 1024 - 4), 71);
  expect([answers.find("q-69", "body", 71), answers.find("long", "body", 71)?.length]).toEqual([undefined, 4 * 1024 * 1024 - 4]);
  answers.keep("too long", "body", "x".repeat(5 * 1024 * 1024), 72);
  expect(answers.find("too long", "body", 72)).toBe(undefined);
  // An id that comes again counts once.
  for (const id of ["other", "same", "same"]) answers.keep(id, "body", "x".repeat(1.5 * 1024 * 1024), 73);
  expect(answers.find("other", "body", 73)).toBeDefined();
});

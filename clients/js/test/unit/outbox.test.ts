// Messages on their way up, by a clock of the test's own.

import { expect, test } from "vitest";
import { Outbox } from "../../src/outbox.ts";

function takeAll(outbox: Outbox, now: number): unknown[] {
  const taken: unknown[] = [];
  while (outbox.pause(now) === 0) taken.push(outbox.take(now));
  return taken;
}

function filled(...data: string[]): Outbox {
  const outbox = new Outbox(10);
  outbox.opened(0);
  for (const each of data) outbox.push(each);
  return outbox;
}

test("a burst, then the rate, and never more than both allow", () => {
  const outbox = new Outbox(1000, { perSecond: 10, burst: 3 });
  outbox.opened(0);
  for (let n = 0; n < 100; n += 1) outbox.push(String(n));
  expect(takeAll(outbox, 0)).toEqual(["0", "1", "2"]);
  expect(outbox.pause(0)).toBe(100);
  expect(takeAll(outbox, 100)).toEqual(["3"]);
  expect(takeAll(outbox, 60_000)).toEqual(["4", "5", "6"]);
  // The library's own messages count; and a clock that is set back earns nothing.
  outbox.spend(60_000);
  expect([outbox.pause(60_000), outbox.pause(0)]).toEqual([200, 200]);
  expect(takeAll(outbox, 100)).toEqual([]);
});

test("only so many wait", () => {
  const outbox = new Outbox(2);
  outbox.push("a");
  expect(outbox.isFull).toBe(false);
  outbox.push("b");
  expect(outbox.isFull).toBe(true);
  // Messages that are sent again take no place in the queue.
  takeAll(outbox, 0);
  outbox.lost(-1, 0);
  expect(outbox.isFull).toBe(false);
  outbox.push("c");
  outbox.push("d");
  expect(outbox.isFull).toBe(true);
  takeAll(outbox, 0);
  expect(outbox.isFull).toBe(false);
});

test("a lost connection puts back what was sent after a time, and what never left, in order", () => {
  const outbox = filled("a", "b");
  takeAll(outbox, 0);
  outbox.push("c");
  takeAll(outbox, 100);
  outbox.push("d");
  expect(outbox.lost(50, 0)).toBe(1);
  expect(takeAll(outbox, 200)).toEqual(["c", "d"]);
  // These bytes are those of "c" with its head, and one of "bü".
  const stuck = filled("a", "bü", "c");
  takeAll(stuck, 0);
  expect(stuck.lost(Infinity, 16)).toBe(2);
  expect(takeAll(stuck, 0)).toEqual(["bü", "c"]);
});

test("what has arrived is forgotten", () => {
  const outbox = filled("a");
  takeAll(outbox, 0);
  outbox.push("b");
  takeAll(outbox, 10);
  outbox.arrived(5);
  expect(outbox.lost(-1, 0)).toBe(1);
  expect(takeAll(outbox, 20)).toEqual(["b"]);
});

test("what is in doubt holds everything back until it is known", () => {
  for (const arrived of [true, false]) {
    const outbox = filled("a");
    takeAll(outbox, 0);
    outbox.doubt(outbox.lost(-1, 0));
    outbox.push("b");
    expect(outbox.pause(0)).toBe(undefined);
    outbox.settle(arrived);
    expect(takeAll(outbox, 0)).toEqual(arrived ? ["b"] : ["a", "b"]);
  }
});

test("the memory of what was sent is bounded", () => {
  const outbox = new Outbox(5000, { burst: 5000 });
  outbox.opened(0);
  for (let n = 0; n < 5000; n += 1) outbox.push(String(n));
  takeAll(outbox, 0);
  expect(outbox.lost(-1, 0)).toBe(1024);
  outbox.opened(0);
  expect(takeAll(outbox, 0)[0]).toBe("3976");
});

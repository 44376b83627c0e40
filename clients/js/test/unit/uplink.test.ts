// Messages that are sent again after a sleep, by a clock of the test's own.

import { afterEach, beforeEach, expect, test, vi } from "vitest";
import type { Transport } from "../../src/transport.ts";
import { Uplink } from "../../src/uplink.ts";
import { AwakeClock, watchWake } from "../../src/wake.ts";

let sent: unknown[] = [];
let unwatch = (): void => undefined;

beforeEach(() => {
  vi.useFakeTimers();
  sent = [];
});

afterEach(() => {
  unwatch();
  vi.useRealTimers();
});

const transport = (): Transport => ({
  kind: "websocket", send: (data) => void sent.push(data), unsent: () => 0, close: (_code, _reason, closed) => closed?.(false),
});
const sleep = (ms: number): unknown => vi.setSystemTime(Date.now() + ms);
const broken = { code: 1006, reason: "" };

function opened(): Uplink {
  const clock = new AwakeClock();
  unwatch = watchWake(clock, () => undefined);
  const uplink = new Uplink({}, clock);
  uplink.opened(transport(), 50);
  return uplink;
}

/** The messages that a further connection repeats. */
function again(uplink: Uplink): unknown[] {
  sent = [];
  uplink.opened(transport(), 50);
  return sent;
}

test("only time awake counts, and a clock that was set changes nothing", () => {
  const clock = new AwakeClock();
  unwatch = watchWake(clock, () => undefined);
  vi.advanceTimersByTime(20_000);
  expect([clock.now(), clock.sleptAt]).toEqual([20_000, -Infinity]);
  sleep(600_000);
  expect([clock.now(), clock.sleptAt]).toEqual([20_000, 20_000]);
  sleep(-600_000);
  expect(clock.now()).toBe(20_000);
  vi.advanceTimersByTime(5_000);
  expect(clock.now()).toBe(25_000);
  // A hidden page, whose timers come once a minute.
  sleep(60_000);
  expect([clock.now(), clock.sleptAt]).toEqual([30_000, 20_000]);
});

test.each([["broken", 16_000], ["left", 121_000]] as const)("a connection that is %s has delivered what is old, but not for a sleep", (how, ms) => {
  const end = (uplink: Uplink): void => (how === "broken" ? uplink.lost(broken) : uplink.leave(1000, ""));
  const awake = opened();
  awake.push("old");
  vi.advanceTimersByTime(ms);
  end(awake);
  expect(again(awake)).toEqual([]);
  unwatch();

  const asleep = opened();
  asleep.push("under way");
  sleep(600_000);
  // Found out late.
  vi.advanceTimersByTime(ms);
  end(asleep);
  expect(again(asleep)).toEqual(["under way"]);
});

test("what came a round trip after the sleep ends the doubt", () => {
  const uplink = opened();
  uplink.push("under way");
  sleep(600_000);
  uplink.heard();
  vi.advanceTimersByTime(400);
  uplink.heard();
  uplink.push("later");
  vi.advanceTimersByTime(100);
  uplink.heard();
  uplink.lost(broken);
  expect(again(uplink)).toEqual(["later"]);
});

test("a close frame that waited while the machine slept is no proof either", () => {
  const uplink = opened();
  uplink.push("under way");
  sleep(600_000);
  uplink.lost({ code: 1012, reason: "instance restarting" });
  expect(again(uplink)).toEqual(["under way"]);
});

test("what is sent again after a sleep is bounded", () => {
  const uplink = new Uplink({ sendRate: { perSecond: Infinity } });
  uplink.opened(transport(), 50);
  for (let n = 0; n < 2000; n += 1) uplink.push(String(n));
  sleep(600_000);
  uplink.lost(broken);
  expect(again(uplink).length).toBe(1024);
});

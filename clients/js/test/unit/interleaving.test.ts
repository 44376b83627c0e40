// Any interleaving of publishes, cuts at any place, and losses: the exact sequence, or an explicit loss where it has a hole.

import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { connectSession } from "../../src/index.ts";
import { FakeSocket } from "../support/fake-socket.ts";

beforeEach(() => {
  vi.useFakeTimers();
  FakeSocket.all = [];
});
afterEach(() => void vi.useRealTimers());

/** Numbers in [0, 1) that are the same for the same seed. */
function chance(seed: number): () => number {
  let state = seed + 1;
  return () => {
    state = (state * 48_271) % 2_147_483_647;
    return state / 2_147_483_647;
  };
}

/** A log that forgets, and a connection that delivers as far as it is told to. */
class Log {
  readonly entries: number[] = [];
  kept = 0;

  /** The frames of a gateway for a client that comes with this position. */
  answer(position: string): string[] {
    const newest = this.entries.length;
    const hello = `\n${JSON.stringify({ type: "opened", connection_id: "c", event_id: `${newest}-0-000000aa` })}`;
    if (position === "") return [hello];
    const after = Number(position.split("-")[0]);
    if (after < this.kept) {
      return [hello, `\n${JSON.stringify({ type: "error", code: "history_lost", reason: "trimmed", event_id: `${newest}-0-000000aa` })}`];
    }
    const missed = this.entries.slice(after).map((n) => this.frame(n));
    return [`\n${JSON.stringify({ type: "resumed", count: missed.length, last_event_id: position })}`, ...missed];
  }

  frame(n: number): string {
    return `${n}-0-000000aa\n${JSON.stringify({ n })}`;
  }
}

test("what a client hears is the exact sequence, or says where it is not", { timeout: 60_000 }, async () => {
  for (let seed = 0; seed < 300; seed += 1) await play(seed);
});

async function play(seed: number): Promise<void> {
  const random = chance(seed);
  const log = new Log();
  const session = connectSession<{ n: number }>({
    url: "https://gateway.test/a/ws/b", getToken: () => "t", WebSocket: FakeSocket, transport: "websocket", random, backoff: { maxMs: 1000 },
  });
  const heard: (number | "lost")[] = [];
  session.on("message", ({ data }) => heard.push(data.n));
  session.on("historyLost", () => heard.push("lost"));
  // With a position from the start, so that there is something to be exact about.
  await vi.advanceTimersByTimeAsync(0);
  let frames = log.answer("");
  const connect = (): void => void FakeSocket.last.open("wsproxy.id.v1");
  connect();
  FakeSocket.last.sayRaw(frames.shift() as string);

  const deliver = (count: number): void => {
    for (const frame of frames.splice(0, count)) FakeSocket.last.sayRaw(frame);
  };
  const reconnect = async (): Promise<void> => {
    FakeSocket.last.end();
    await vi.advanceTimersByTimeAsync(1000);
    frames = log.answer(FakeSocket.last.url.searchParams.get("last_event_id") ?? "");
    connect();
  };
  for (let step = 0; step < 60; step += 1) {
    const what = random();
    if (what < 0.5) {
      log.entries.push(log.entries.length + 1);
      frames.push(log.frame(log.entries.length));
    } else if (what < 0.75) {
      deliver(Math.floor(random() * 4));
    } else if (what < 0.8 && frames.length > 0) {
      // The bus delivers at least once, too.
      frames.unshift(frames[0] as string);
    } else if (what < 0.95) {
      await reconnect();
    } else {
      log.kept = Math.floor(random() * (log.entries.length + 1));
    }
  }
  log.kept = Math.min(log.kept, log.entries.length);
  await reconnect();
  deliver(1000);
  session.close();

  let last = 0;
  let isLost = false;
  for (const entry of heard) {
    if (entry === "lost") {
      isLost = true;
      continue;
    }
    expect(entry).toBeGreaterThan(last);
    if (!isLost) expect([seed, entry]).toEqual([seed, last + 1]);
    [last, isLost] = [entry, false];
  }
  if (!isLost) expect([seed, last]).toEqual([seed, log.entries.length]);
}

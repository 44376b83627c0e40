// Refused handshakes of rooms over the package `ws`, which shows the body: spec/finality.json, row by row.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { afterAll, afterEach, beforeAll, expect, test } from "vitest";
import { WebSocket } from "ws";
import type { StateChange } from "../../src/index.ts";
import { connectRoom, type Room, type RoomOptions } from "../../src/rooms/index.ts";
import { GatewayDouble } from "../support/gateway-double.ts";

interface Row { name: string; status: number; body: string; advice: string }
const table = JSON.parse(readFileSync(fileURLToPath(new URL("../../../../spec/finality.json", import.meta.url)), "utf8")) as { handshakes: Row[] };
let gateway: GatewayDouble;
let room: Room;

beforeAll(async () => {
  gateway = await GatewayDouble.start();
});

afterEach(() => room.close());
afterAll(() => gateway.stop());

/** The first wait or end of a room that is refused. */
function outcome(status: number, body: string, headers = "", options: Partial<RoomOptions> = {}): Promise<StateChange> {
  gateway.refuse = status;
  gateway.refusal = { body, headers };
  room = connectRoom({ url: gateway.url, room: "lobby", WebSocket, random: () => 0.5, ...(options.userId ? {} : { getToken: () => "t" }), ...options });
  return new Promise((resolve) => room.on("state", (change) => (change.state === "connecting" ? undefined : resolve(change))));
}

function done({ state, delayMs = 0 }: StateChange): string {
  if (state === "closed") return "final";
  return delayMs === 0 ? "credentials" : delayMs > 1_000 ? "slow" : "retry";
}

test.each(table.handshakes.filter(({ status }) => status >= 400))("refused handshake: $name ($status)", async ({ status, body, advice }) => {
  expect(done(await outcome(status, body))).toBe(advice);
});

test("the gateway's code is the reason, and Retry-After the least wait", async () => {
  const change = await outcome(429, '{"error":"Rate limit exceeded","message":"Rate limit exceeded. Try again in 7 seconds."}', "Retry-After: 7\r\n");
  expect(change).toMatchObject({ state: "waiting", status: 429 });
  expect(change.delayMs).toBeGreaterThanOrEqual(7_000);
  room.close();
  const body = '{"error":{"code":"room_forbidden","message":"m","retryable":false}}';
  expect(await outcome(403, body)).toMatchObject({ state: "closed", status: 403, reason: "room_forbidden" });
});

test("in development mode there is no other credential, but a program in between may refuse", async () => {
  const body = '{"error":{"code":"missing_credentials","message":"m","retryable":false}}';
  expect(done(await outcome(401, body, "", { userId: "u" }))).toBe("final");
  room.close();
  expect(done(await outcome(401, "<html>", "", { userId: "u" }))).toBe("retry");
});

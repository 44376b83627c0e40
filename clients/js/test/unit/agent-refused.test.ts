// Refused handshakes of agents over the package `ws`, which shows the body: the gateway's own refusal is told from that of a program in between.

import { afterEach, beforeEach, expect, test } from "vitest";
import { WebSocket } from "ws";
import { Agent, type AgentEnded } from "../../src/agents/index.ts";
import type { StateChange } from "../../src/index.ts";
import { GatewayDouble } from "../support/gateway-double.ts";

let gateway: GatewayDouble;
let agent: Agent;

beforeEach(async () => {
  gateway = await GatewayDouble.start();
});

afterEach(async () => {
  agent.close();
  await gateway.stop();
});

const own = (code: string, retryable = false): string => JSON.stringify({ error: { code, message: "m", retryable } });

/** What comes first: the end of the agent, or a wait. */
function outcome(status: number, body: string, headers = ""): Promise<AgentEnded | StateChange> {
  gateway.refuse = status;
  gateway.refusal = { body, headers };
  agent = new Agent(gateway.url, { userId: "u-1", secret: "s", WebSocket, backoff: { baseMs: 10, maxMs: 20 } });
  return new Promise((resolve) => {
    agent.on("state", (change) => change.state === "waiting" && resolve(change));
    agent.run().catch(resolve);
  });
}

test.each([
  [401, "missing_credentials", "AgentRefused"],
  [403, "invalid_credentials", "AgentRefused"],
  [409, "replaced", "AgentReplaced"],
  [400, "bad_request", "AgentEnded"],
])("the gateway's own %s %s ends the agent", async (status, code, name) => {
  expect(await outcome(status, own(code))).toMatchObject({ name, status, reason: code });
});

test.each([401, 403, 404, 409])("a %s of a program in between is tried again", async (status) => {
  expect(await outcome(status, "<html>Forbidden</html>")).toMatchObject({ state: "waiting", reason: `HTTP ${status}`, status });
});

test("Retry-After of the gateway is kept", async () => {
  const change = await outcome(429, own("flapping", true), "Retry-After: 7\r\n");
  expect(change).toMatchObject({ state: "waiting", status: 429 });
  expect((change as StateChange).delayMs).toBeGreaterThanOrEqual(7000);
});

test("it connects when the gateway lets it in", async () => {
  await outcome(503, own("draining", true), "Retry-After: 1\r\n");
  gateway.refuse = 0;
  const peer = await gateway.peers.next();
  expect(peer.url.href).toBe("ws://gateway/?userId=u-1");
  peer.say({ type: "connected", userId: "u-1", timestamp: 1, serverId: "s" });
  await new Promise<void>((resolve) => agent.on("state", ({ state }) => state === "open" && resolve()));
});

// A plain relay of users' agents on Node, as one writes it: `ws` for the sockets, ioredis for commands and answers, pg for
// credentials and a row of each call. It fences nothing, bounds nothing, and ends no call of an agent that is gone.
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [port, redisUrl, databaseUrl, modules] = process.argv.slice(2);
const require = createRequire(pathToFileURL(modules + "/"));
const { WebSocketServer } = require("ws");
const Redis = require("ioredis");
const { Pool } = require("pg");

const subscriber = new Redis(redisUrl);
const commands = new Redis(redisUrl, { enableAutoPipelining: true });
const database = new Pool({ connectionString: databaseUrl, max: 20 });
const agents = new Map();
const calls = new Map();
const serverId = "relay";

subscriber.on("message", (channel, text) => {
  const user = channel.split(":")[1];
  const call = JSON.parse(text);
  calls.set(call.requestId, call);
  agents.get(user)?.send(JSON.stringify({ type: "tool_call", requestId: call.requestId, tool: call.tool, params: call.params }));
});

function onMessage(user, data) {
  const message = JSON.parse(data);
  const agent = agents.get(user);
  if (message.type === "heartbeat") {
    agent?.send(JSON.stringify({ type: "heartbeat_ack", timestamp: Date.now() }));
    commands.set(`agent:${user}:server`, serverId, "EX", 120);
    return;
  }
  if (message.type !== "tool_response") return;
  const { requestId, success, result, error, executionTime } = message;
  const call = calls.get(requestId);
  calls.delete(requestId);
  const answer = { userId: user, success, result, error, executionTime, requestId };
  commands.publish(call?.replyTo ?? `response:${requestId}`, JSON.stringify(answer));
  database.query(
    "INSERT INTO tool_execution_logs (user_id, request_id, tool_name, params, result, success, error, execution_time_ms) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
    [user, requestId, call?.tool ?? "unknown", call?.params ?? {}, JSON.stringify(result ?? null), success, error ?? null, executionTime],
  ).catch(() => {});
}

const server = createServer((request, response) => response.end("ok"));
const acceptor = new WebSocketServer({ noServer: true, perMessageDeflate: false });

server.on("upgrade", async (request, raw, head) => {
  const user = new URL(request.url, "http://relay").searchParams.get("userId");
  const secret = request.headers.authorization?.slice("Bearer ".length);
  const found = await database.query("SELECT 1 FROM agent_credentials WHERE user_id = $1 AND shared_secret = $2", [user, secret]);
  if (!found.rowCount) return raw.end("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n");
  await subscriber.subscribe(`agent:${user}:commands`);
  commands.set(`agent:${user}:server`, serverId, "EX", 120);
  acceptor.handleUpgrade(request, raw, head, (socket) => {
    agents.set(user, socket);
    socket.send(JSON.stringify({ type: "connected", userId: user, timestamp: Date.now(), serverId }));
    socket.on("message", (data) => onMessage(user, data));
    socket.on("error", () => {});
    socket.on("close", () => {
      if (!agents.delete(user)) return;
      subscriber.unsubscribe(`agent:${user}:commands`);
      commands.del(`agent:${user}:server`);
    });
  });
});

server.listen({ port: Number(port), host: "127.0.0.1", backlog: 4096 });

// The same relay on Node: `ws` for the sockets, ioredis for the bus, a set of sockets per channel.
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [port, redisUrl, modules] = process.argv.slice(2);
const require = createRequire(pathToFileURL(modules + "/"));
const { WebSocketServer } = require("ws");
const Redis = require("ioredis");

const subscriber = new Redis(redisUrl);
const publisher = new Redis(redisUrl, { enableAutoPipelining: true });
const sockets = new Map();

subscriber.on("messageBuffer", (channel, message) => {
  for (const socket of sockets.get(channel.toString()) ?? []) {
    socket.send(message, { binary: false });
  }
});

const server = createServer((request, response) => response.end("ok"));
const acceptor = new WebSocketServer({ noServer: true, perMessageDeflate: false });

server.on("upgrade", async (request, raw, head) => {
  const session = request.url.split("/").pop();
  const down = `session:${session}:down`;
  let members = sockets.get(down);
  if (!members) sockets.set(down, (members = new Set()));
  await subscriber.subscribe(down);
  acceptor.handleUpgrade(request, raw, head, (socket) => {
    members.add(socket);
    socket.on("message", (data) => publisher.publish(`session:${session}:up`, data));
    socket.on("error", () => {});
    socket.on("close", () => {
      members.delete(socket);
      if (members.size === 0 && sockets.delete(down)) subscriber.unsubscribe(down);
    });
  });
});

server.listen({ port: Number(port), host: "127.0.0.1", backlog: 4096 });

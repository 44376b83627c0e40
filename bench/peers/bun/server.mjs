// The same relay on Bun: a topic of `Bun.serve` per channel, and Bun's Redis client for the bus.
import { RedisClient } from "bun";

const [port, redisUrl] = process.argv.slice(2);
const subscriber = new RedisClient(redisUrl);
const publisher = new RedisClient(redisUrl);
await Promise.all([subscriber.connect(), publisher.connect()]);
const members = new Map();

const server = Bun.serve({
  port: Number(port),
  hostname: "127.0.0.1",
  async fetch(request, server) {
    const { pathname } = new URL(request.url);
    if (pathname === "/health") return new Response("ok");
    const session = pathname.split("/").pop();
    const down = `session:${session}:down`;
    if (!members.has(down)) members.set(down, { count: 0, ready: subscriber.subscribe(down, (message) => server.publish(down, message)) });
    const member = members.get(down);
    member.count += 1;
    await member.ready;
    if (!server.upgrade(request, { data: { session, down } })) return new Response("", { status: 400 });
  },
  websocket: {
    perMessageDeflate: false,
    open: (socket) => socket.subscribe(socket.data.down),
    message: (socket, message) => void publisher.publish(`session:${socket.data.session}:up`, message),
    close(socket) {
      const { down } = socket.data;
      const member = members.get(down);
      if (member && --member.count === 0 && members.delete(down)) void subscriber.unsubscribe(down);
    },
  },
});

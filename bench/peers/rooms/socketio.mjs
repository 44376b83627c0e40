// Rooms on Node with Socket.IO, as its documentation has them: each member joins its room, and each move goes to all others.
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [port, modules] = process.argv.slice(2);
const require = createRequire(pathToFileURL(modules + "/"));
const { Server } = require("socket.io");

const server = createServer((request, response) => response.end("ok"));
const io = new Server(server, { transports: ["websocket"], perMessageDeflate: false });

io.on("connection", (socket) => {
  const { room } = socket.handshake.query;
  socket.join(room);
  socket.on("move", (move) => socket.to(room).emit("move", move));
});

server.listen({ port: Number(port), host: "127.0.0.1", backlog: 4096 });

// Rooms on Bun with its own topics: each member subscribes to its room, and each message goes to all others as it came.
const port = Number(process.argv[2]);

Bun.serve({
  port,
  hostname: "127.0.0.1",
  fetch(request, server) {
    const { pathname } = new URL(request.url);
    if (pathname === "/health") return new Response("ok");
    if (server.upgrade(request, { data: { room: pathname } })) return;
    return new Response("", { status: 400 });
  },
  websocket: {
    perMessageDeflate: false,
    open: (socket) => socket.subscribe(socket.data.room),
    message: (socket, message) => socket.publish(socket.data.room, message),
  },
});

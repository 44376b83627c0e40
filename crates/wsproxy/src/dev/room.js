// A member of a room, as plain JSON over a WebSocket: the least that a client needs. The JavaScript package does more.

import { call, FINAL, protocols } from "./common.js";

const RETRY_FIRST_MS = 150;
const RETRY_MAX_MS = 5000;
const MOVE_MS = 50; // 20 positions a second, the newest.
const PING_MS = 1000;
// The gateway answers it with the same, and tells no other member.
const PING = '{"type":255}';

export class Member {
  members = new Map(); // Who is here, by client id: { name }.
  entities = new Map(); // What is here, by entity id: { owner, components, position }.
  state = "connecting"; // open, away, connecting, closed
  graceMs = 5000;
  wasOpen = false;
  lostAt = 0; // When the connection was lost; 0 while there is one.
  #socket = null;
  #attempt = 0; // A number for each attempt to connect: only the newest counts.
  #tries = 0;
  #retryTimer = 0;
  #awayMs = 0;
  #pages = null; // The state of the room, while it comes in several messages.
  #moveTimer = 0;
  #isMoved = false;
  #sequence = 0;
  #pingTimer = 0;
  #pingedAt = 0;

  // `tell(event, details)` hears everything that happens.
  constructor({ room, name, color, tell }) {
    Object.assign(this, { room, name, color, tell });
    const id = Math.random().toString(36).slice(2, 10);
    this.userId = `guest-${id}`;
    // The gateway knows a member that comes back by this id.
    this.clientId = `${name.toLowerCase()}-${id}`;
    this.dot = `dot-${this.clientId}`;
    this.position = null;
  }

  async join() {
    clearTimeout(this.#retryTimer);
    const attempt = ++this.#attempt;
    this.#set("connecting");
    let issued;
    try {
      issued = await call("/dev/rooms/member", { body: { user_id: this.userId } });
    } catch (error) {
      if (attempt !== this.#attempt) return;
      // Without an answer the browser has no text to show.
      return this.#retry(error instanceof TypeError ? "The gateway does not answer. Is “wsproxy dev” still running?" : error.message);
    }
    if (attempt !== this.#attempt) return;
    this.graceMs = issued.leave_grace_ms;
    const query = new URLSearchParams({ user_id: this.userId, client_id: this.clientId, display_name: this.name });
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const url = `${scheme}://${location.host}/ws/${encodeURIComponent(this.room)}?${query}`;
    const socket = new WebSocket(url, issued.token ? protocols(issued.token) : []);
    this.#socket = socket;
    socket.onopen = () => this.#send({ clientHello: { version: 1, features: ["batch"] } });
    socket.onmessage = ({ data }) => { if (socket === this.#socket) this.#received(JSON.parse(data)); };
    socket.onclose = ({ code, reason }) => { if (socket === this.#socket) this.#closed(code, reason); };
  }

  // A goodbye: the others see it at once.
  leave() {
    clearTimeout(this.#retryTimer);
    this.#attempt += 1;
    const socket = this.#socket;
    this.#gone();
    socket?.close(1000);
    Object.assign(this, { wasOpen: false, lostAt: 0 });
    this.#set("closed", { code: 1000, reason: "" });
  }

  // The gateway drops the connection without a close frame; this member comes back after `awayMs`.
  async kill(awayMs) {
    this.#awayMs = awayMs;
    try {
      const { cut } = await call("/dev/rooms/cut", { body: { room_id: this.room, client_id: this.clientId } });
      if (cut === 0) throw new Error("The gateway knows no connection of this member.");
    } catch (error) {
      this.#awayMs = 0;
      this.tell("error", { message: error.message });
    }
  }

  say(message) {
    this.#send({ chatMessage: { message } });
  }

  // The newest position is sent at once, or when 50 ms have passed since the last one.
  move(position) {
    this.position = position;
    this.#isMoved = true;
    if (this.#moveTimer === 0) this.#sendMove();
  }

  #sendMove() {
    this.#moveTimer = 0;
    if (!this.#isMoved || this.state !== "open") return;
    this.#isMoved = false;
    this.#sequence += 1;
    this.tell("sent", { sequence: this.#sequence });
    this.#send({ positionUpdate: { entityId: this.dot, position: this.position, sequenceNumber: this.#sequence } });
    this.#moveTimer = setTimeout(() => this.#sendMove(), MOVE_MS);
  }

  #send(message) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }

  #received(message) {
    if (message.type === 255) return this.#pong();
    if (message.serverHello) return this.#hello(message.serverHello);
    if (this.#pages) return this.#pages.held.push(message);
    this.#take(message);
  }

  // The whole room. A large one comes in several messages, all but the last with `more`.
  #hello({ initialState: { players = [], entities = [] } = {}, more }) {
    this.#pages ??= { players: [], entities: [], held: [] };
    this.#pages.players.push(...players);
    this.#pages.entities.push(...entities);
    if (more) return;
    const pages = this.#pages;
    this.#pages = null;
    const before = this.members;
    this.members = new Map(pages.players.map(({ clientId, displayName }) => [clientId, { name: displayName }]));
    this.entities = new Map(pages.entities.map(({ id, ownerId, components, position }) => [id, { owner: ownerId, components, position }]));
    const away = this.lostAt ? performance.now() - this.lostAt : 0;
    const isBack = this.wasOpen;
    Object.assign(this, { wasOpen: true, lostAt: 0 });
    this.#tries = 0;
    // A room that has kept this member has kept its dot, too.
    if (!this.entities.has(this.dot)) this.#spawn();
    this.#set("open", { isBack, away, before });
    if (this.#isMoved) this.#sendMove();
    for (const message of pages.held) this.#take(message);
    this.#ping();
  }

  #spawn() {
    const { color } = this;
    this.#send({ entitySpawn: { entityId: this.dot, templateId: "cursor", components: { color } } });
    if (this.position) this.#isMoved = true;
  }

  #take({ sender = "", ...message }) {
    const { presenceEvent, entitySpawn, entityUpdate, entityDespawn, positionUpdate, positionBatch, chatMessage, error } = message;
    if (presenceEvent) return this.#presence(presenceEvent);
    if (chatMessage) return this.tell("chat", { from: sender, text: chatMessage.message ?? "" });
    if (error) return this.tell("error", error);
    // A batch is the same for all, so this member's own positions are in it.
    const moves = positionBatch?.entries ?? (positionUpdate ? [{ sender, update: positionUpdate }] : []);
    for (const { sender: from = "", update } of moves) {
      const entity = this.entities.get(update.entityId);
      if (!entity || from === this.clientId) continue;
      entity.position = update.position ?? {};
      this.tell("move", { id: update.entityId, entity, from, sequence: update.sequenceNumber });
    }
    if (entitySpawn) {
      const { entityId: id, components } = entitySpawn;
      const entity = { owner: sender, components };
      this.entities.set(id, entity);
      this.tell("spawn", { id, entity });
    }
    if (entityUpdate) {
      const entity = this.entities.get(entityUpdate.entityId);
      if (entity) entity.components = { ...entity.components, ...entityUpdate.components };
      this.tell("spawn", { id: entityUpdate.entityId, entity });
    }
    if (entityDespawn) {
      this.entities.delete(entityDespawn.entityId);
      this.tell("despawn", { id: entityDespawn.entityId });
    }
  }

  // JSON leaves out what is zero, and a join is.
  #presence({ clientId, eventType = "JOIN", data }) {
    if (clientId === this.clientId) return;
    const name = data?.displayName ?? this.members.get(clientId)?.name;
    if (eventType === "LEAVE") this.members.delete(clientId);
    else this.members.set(clientId, { name });
    this.tell(eventType.toLowerCase(), { clientId, name });
  }

  #ping() {
    clearTimeout(this.#pingTimer);
    // A hidden page is not looked at, and its timers are late.
    if (document.hidden) {
      this.#pingTimer = setTimeout(() => this.#ping(), PING_MS);
      return;
    }
    this.#pingedAt = performance.now();
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(PING);
  }

  #pong() {
    this.tell("latency", { ms: performance.now() - this.#pingedAt });
    this.#pingTimer = setTimeout(() => this.#ping(), PING_MS);
  }

  #gone() {
    clearTimeout(this.#pingTimer);
    clearTimeout(this.#moveTimer);
    this.#moveTimer = 0;
    this.#socket = this.#pages = null;
  }

  #closed(code, reason) {
    this.#gone();
    if (FINAL.has(code) && code !== 4401) {
      Object.assign(this, { wasOpen: false, lostAt: 0 });
      return this.#set("closed", { code, reason });
    }
    this.#retry();
  }

  #retry(why) {
    this.lostAt ||= performance.now();
    clearTimeout(this.#retryTimer);
    if (this.#awayMs > 0) {
      const ms = this.#awayMs;
      this.#awayMs = 0;
      this.#retryTimer = setTimeout(() => this.join(), ms);
      return this.#set("away", { until: performance.now() + ms });
    }
    const ceiling = Math.min(RETRY_MAX_MS, RETRY_FIRST_MS * 2 ** this.#tries++);
    // Jitter: the clients of a restarted instance must not come back in step.
    this.#retryTimer = setTimeout(() => this.join(), ceiling * (0.5 + Math.random() / 2));
    this.#set("connecting", { why, tries: this.#tries });
  }

  #set(state, details = {}) {
    this.state = state;
    this.tell("state", details);
  }
}

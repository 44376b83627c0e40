// The page of rooms: one or two members, each in a window of its own, shown with what it sees of the others.

import { byId, call, CODES, element, field, fill, seconds } from "./common.js";
import { Member } from "./room.js";

const AWAY_MS = 2000; // Long enough for a person to see it, and less than the grace.
const LINES_MAX = 100;
const FLIGHTS_MAX = 200;
const SHOWN = 20; // Newest measurements that a shown median is made of.
const KEY_STEP = 0.04;
const NAMES = "Ada Ben Cleo Dan Eva Finn Gwen Hugo Iris Jonas Kim Leo Mia Nils Olga Paul Rosa Sam Tess Uma Vera Will Yara Zoe".split(" ");
// White letters can be read on each of them.
const COLORS = ["#3450d6", "#b3261e", "#0b7a5a", "#8a3ab9", "#a8540a", "#0e6f93", "#b0246f", "#56606f"];

const query = new URLSearchParams(location.search);
const room = /^[\w.~-]{1,128}$/.test(query.get("room") ?? "") ? query.get("room") : "lobby";
const windows = [];
// When a position left, by its sender and number: the windows of one page have one clock.
const flights = new Map();

class Window {
  #logged = 0;

  constructor({ name, color }) {
    this.view = byId("window").content.cloneNode(true).firstElementChild;
    this.dots = new Map();
    this.leaves = new Map(); // Number of leaves that this window has seen, by client id.
    this.latencies = { trip: [], flight: [] };
    this.member = new Member({ room, name, color, tell: (event, details) => this[`on_${event}`](details) });
    const { view, member } = this;
    view.dataset.client = member.clientId;
    view.setAttribute("aria-label", `${name}'s window`);
    this.part("name").textContent = name;
    this.part("client").textContent = member.clientId;
    this.part("swatch").style.background = color;
    this.part("kill").onclick = () => this.kill();
    this.part("leave").onclick = () => this.toggle();
    this.part("stage").onpointermove = (event) => this.point(event);
    this.part("stage").onpointerdown = (event) => this.point(event);
    this.part("stage").onkeydown = (event) => this.step(event);
    this.part("form").onsubmit = (event) => this.say(event);
  }

  part(name) {
    return this.view.querySelector(`.${name}`);
  }

  // ---- what the person does ----

  point({ clientX, clientY }) {
    const { left, top, width, height } = this.part("stage").getBoundingClientRect();
    this.move((clientX - left) / width, (clientY - top) / height);
  }

  step(event) {
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    if (dx === 0 && dy === 0) return;
    event.preventDefault();
    const { x, y } = this.member.position ?? { x: 0.5, y: 0.5 };
    this.move(x + dx * KEY_STEP, y + dy * KEY_STEP);
  }

  move(x, y) {
    if (this.member.state === "closed") return;
    done("move");
    const inside = (value) => Math.min(1, Math.max(0, value));
    this.member.move({ x: inside(x), y: inside(y) });
    this.place(this.member.dot, this.member.position);
  }

  say(event) {
    event.preventDefault();
    const text = this.part("say").value.trim();
    if (!text || this.member.state !== "open") return;
    this.member.say(text);
    this.log("chat", this.member.clientId, text);
    this.part("say").value = "";
    done("chat");
  }

  kill() {
    done("kill");
    this.part("kill").disabled = true;
    this.member.kill(AWAY_MS);
  }

  toggle() {
    if (this.member.state === "closed") return this.member.join();
    done("leave");
    this.member.leave();
  }

  // ---- what the room tells ----

  on_state({ isBack, away, before, until, code, reason, why, tries }) {
    const { state, members, clientId, graceMs } = this.member;
    this.view.dataset.state = state;
    this.part("status").dataset.state = state;
    this.part("status-text").textContent = { open: "in the room", away: "cut off", connecting: "connecting", closed: "left" }[state];
    this.part("kill").disabled = this.part("send").disabled = state !== "open";
    this.part("leave").textContent = state === "closed" ? "Join" : "Leave";
    clearInterval(this.countdown);
    // From here on the other windows look at whether this member leaves.
    if (state === "away" || tries === 1) for (const other of windows) other.leaves.delete(clientId);
    switch (state) {
      case "open":
        this.greet(before);
        if (this === windows[0]) shell();
        return isBack ? this.back(away) : this.tell("open", `You are ${this.member.name}. Move the pointer in the field: every other window shows it.`);
      case "away":
        this.log("own", clientId, "The connection is cut: no goodbye was said.");
        this.countdown = setInterval(() => this.count(until), 200);
        return this.count(until);
      case "closed":
        this.clear();
        this.list();
        this.log("own", clientId, code === 1000 ? "You left." : `You are out: ${code}, ${reason || CODES[code] || "without a reason"}.`);
        if (code === 1000) return this.tell("closed", "You said goodbye, so the others saw you leave at once.");
        return this.tell("error", `The room was closed for you: ${code}, ${reason || CODES[code] || "without a reason"}. Join comes back.`);
      default:
        if (why) return this.tell("error", `${why} Trying again.`);
        if (tries > 2) return this.tell("error", "The gateway does not let us in. Trying again.");
        if (members.size === 0) return this.tell("wait", "Joining the room …");
        if (tries) this.tell("wait", `The connection is lost. Coming back; you stay in the room for ${seconds(graceMs)}.`);
    }
  }

  count(until) {
    const left = Math.max(0, until - performance.now());
    this.tell("away", "You are cut off. The others see you in your place.", `Back in ${seconds(left)}.`);
  }

  // The room as it is now, with the differences to what this window has shown.
  greet(before = new Map()) {
    const { members, entities, clientId } = this.member;
    this.clear();
    for (const [id, entity] of entities) this.on_spawn({ id, entity });
    if (this.member.position) this.place(this.member.dot, this.member.position);
    if (before.size === 0) {
      const others = members.size - 1;
      this.log("own", clientId, `You joined “${room}”: ${others === 0 ? "no other is" : others === 1 ? "one other is" : `${others} others are`} here.`);
    } else {
      for (const [id, { name }] of before) if (!members.has(id)) this.on_leave({ clientId: id, name });
      for (const [id, { name }] of members) if (!before.has(id)) this.on_join({ clientId: id, name });
    }
    this.list();
  }

  // Says what the other windows of this page have seen, and not what they should have seen.
  back(away) {
    const { clientId, graceMs } = this.member;
    this.log("own", clientId, `You are back after ${seconds(away)}, with the same client_id.`);
    const witnesses = windows.filter((other) => other !== this && other.member.state === "open");
    const sawIt = witnesses.length > 0 ? witnesses.some(({ leaves }) => leaves.has(clientId)) : away > graceMs;
    const back = `Back after ${seconds(away)}, as the same member.`;
    if (sawIt) return this.tell("lost", `${back} The others saw you leave and join: the gateway waits ${seconds(graceMs)} for a member, or was started anew.`);
    this.tell("resumed", `${back} ${witnesses.length > 0 ? "The other window saw no leave and no join." : "The others see no leave and no join."}`);
  }

  on_join({ clientId, name }) {
    this.log("join", clientId, `${name || clientId} is here.`);
    this.list();
  }

  on_update() {
    this.list();
  }

  on_leave({ clientId, name }) {
    this.leaves.set(clientId, (this.leaves.get(clientId) ?? 0) + 1);
    this.log("leave", clientId, `${name || clientId} left.`);
    this.list();
  }

  on_chat({ from, text }) {
    this.log("chat", from, text);
  }

  on_error({ code, message }) {
    this.log("error", "", [code, message].filter(Boolean).join(": "));
    this.part("kill").disabled = this.member.state !== "open";
  }

  on_spawn({ id, entity }) {
    if (!entity || id === this.member.dot) return;
    this.dots.get(id)?.remove();
    this.dots.delete(id);
    if (entity.position) this.place(id, entity.position);
    this.list();
  }

  on_move({ id, entity, from, sequence }) {
    this.place(id, entity.position);
    const key = `${from} ${sequence}`;
    if (!flights.has(key)) return;
    this.measured("flight", performance.now() - flights.get(key));
  }

  on_sent({ sequence }) {
    flights.set(`${this.member.clientId} ${sequence}`, performance.now());
    if (flights.size > FLIGHTS_MAX) flights.delete(flights.keys().next().value);
  }

  on_despawn({ id }) {
    this.dots.get(id)?.remove();
    this.dots.delete(id);
  }

  on_latency({ ms }) {
    this.measured("trip", ms);
  }

  // ---- what is shown ----

  tell(kind, text, aside = "") {
    this.part("story").dataset.kind = kind;
    if (this.part("story-text").textContent !== text) this.part("story-text").textContent = text;
    this.part("story-aside").textContent = aside;
  }

  // Median of the newest measurements.
  measured(what, ms) {
    const values = this.latencies[what];
    values.push(ms);
    if (values.length > SHOWN) values.shift();
    const median = values.toSorted((a, b) => a - b)[values.length >> 1];
    this.part(what).replaceChildren(median.toFixed(median < 10 ? 1 : 0), " ", element("small", { textContent: "ms" }));
  }

  clear() {
    for (const dot of this.dots.values()) dot.remove();
    this.dots.clear();
  }

  // Shows a dot, which has the colour of its entity and the name of its owner.
  place(id, { x = 0, y = 0 }) {
    let dot = this.dots.get(id);
    if (!dot) {
      const isOwn = id === this.member.dot;
      const { owner, components } = isOwn ? { owner: this.member.clientId, components: { color: this.member.color } } : this.member.entities.get(id);
      dot = element("div", { className: isOwn ? "dot own" : "dot" }, element("i"), element("span", { textContent: isOwn ? "you" : this.nameOf(owner) }));
      dot.dataset.owner = owner;
      dot.style.setProperty("--color", components?.color ?? "");
      this.dots.set(id, dot);
      this.part("stage").append(dot);
    }
    // The name stays in the field.
    dot.classList.toggle("left", x > 0.75);
    Object.assign(dot.style, { left: `${x * 100}%`, top: `${y * 100}%` });
  }

  nameOf(clientId) {
    return (clientId === this.member.clientId ? this.member.name : this.member.members.get(clientId)?.name) || clientId || "the backend";
  }

  colorOf(clientId) {
    if (clientId === this.member.clientId) return this.member.color;
    return [...this.member.entities.values()].find(({ owner }) => owner === clientId)?.components?.color ?? "";
  }

  list() {
    const { clientId, state } = this.member;
    // A member that has left no longer hears who is there.
    const members = state === "closed" ? new Map() : this.member.members;
    this.part("count").textContent = state === "closed" ? "–" : members.size;
    const sorted = [...members.keys()].sort((a, b) => (b === clientId) - (a === clientId) || this.nameOf(a).localeCompare(this.nameOf(b)));
    this.part("here").replaceChildren(...sorted.map((id) => {
      const item = element("li", {}, element("i"), this.nameOf(id), id === clientId ? element("small", { textContent: "you" }) : "");
      item.dataset.client = id;
      item.style.setProperty("--color", this.colorOf(id));
      return item;
    }));
  }

  log(kind, clientId, text) {
    const list = this.part("log");
    const time = element("time", { textContent: new Date().toTimeString().slice(0, 8) });
    const who = kind === "chat" ? [element("b", { textContent: this.nameOf(clientId) }), " "] : [];
    const item = element("li", {}, time, element("span", {}, ...who, text));
    Object.assign(item.dataset, { kind, client: clientId });
    item.style.setProperty("--color", this.colorOf(clientId));
    list.append(item);
    if (++this.#logged > LINES_MAX) list.firstChild.remove();
    list.scrollTop = list.scrollHeight;
  }
}

// Ticks off what the person has tried.
function done(step) {
  document.querySelector(`[data-step="${step}"]`).dataset.done = "true";
}

// Lines that work as they are copied. A gateway that is started anew has another key.
async function shell() {
  const http = location.origin;
  let token, key;
  try {
    ({ token } = await call("/dev/rooms/member", { body: { user_id: "shell" } }));
    ({ api_key: key } = await call("/dev/key", { method: "GET" }));
  } catch { return; /* The windows say that the gateway is away. */ }
  const url = `${http.replace(/^http/, "ws")}/ws/${room}?user_id=shell&client_id=shell&display_name=Shell${token ? "&token=$T" : ""}`;
  const api = `curl -s -H 'Authorization: Bearer ${key}' ${http}/api/v1/rooms/${room}`;
  const ask = `curl -s -X POST ${http}/dev/rooms/member -d '{"user_id":"shell"}'`;
  fill("shell", [
    ...(token ? [["A token: only clients of the gateway's own machine name themselves", `T=$(${ask} | ${field("token")})`]] : []),
    ["Come in, say something and go after 5 seconds", `npx -y wscat -c "${url}" -w 5 -x '{"chatMessage":{"message":"Hello from my shell."}}'`],
    ["Speak as your application does, without being a member", `${api}/messages -d '{"chatMessage":{"message":"Hello from the backend."}}'`],
    ["List who is here", `${api}/members`],
    ["Send all members away", `${api}/close -d '{"reason":"closing time"}'`],
    ["Watch the metrics of rooms", `curl -s ${http}/metrics | grep '^wsproxy_room'`],
  ]);
}

// Two members of different names and colours; another page has others.
const count = query.get("windows") === "1" ? 1 : 2;
const [firstName, firstColor] = [NAMES, COLORS].map((all) => Math.floor(Math.random() * all.length));
byId("windows").dataset.count = count;
byId("room").textContent = room;
byId("further").href = `/dev/rooms?${new URLSearchParams({ room, windows: 1 })}`;
for (let i = 0; i < count; i += 1) {
  const made = new Window({ name: NAMES[(firstName + i * 7) % NAMES.length], color: COLORS[(firstColor + i * 3) % COLORS.length] });
  windows.push(made);
  byId("windows").append(made.view);
  made.member.join();
}

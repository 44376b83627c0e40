// What both development pages need: elements, calls to the gateway, the close codes, and lines for a shell.

export const byId = (id) => document.getElementById(id);
export const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

// ---- calls to the gateway ----

export async function call(path, { method = "POST", body } = {}) {
  const headers = body ? { "content-type": "application/json" } : {};
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  const text = await response.text();
  if (!response.ok) {
    let detail = text;
    try { detail = JSON.parse(text).error.message; } catch { /* Not the gateway's own body: show it as it is. */ }
    throw new Error(`${path} answered ${response.status}: ${detail}`);
  }
  return JSON.parse(text);
}

// A browser cannot set headers on a WebSocket, so the token travels as a subprotocol.
export function protocols(token) {
  if (/^[\w!#$%&'*+.^`|~-]+$/.test(token)) return ["wsproxy.v1", `bearer.${token}`];
  const bytes = String.fromCharCode(...new TextEncoder().encode(token));
  return ["wsproxy.v1", `bearer64.${btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`];
}

export const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;

// Meanings of the close codes of this gateway.
export const CODES = {
  1000: "normal", 1003: "kind of data not accepted", 1006: "connection lost", 1007: "not UTF-8 or damaged",
  1008: "policy", 1009: "message too big", 1011: "internal error", 1012: "instance restarting", 1013: "try again later",
  4001: "replaced", 4002: "heartbeat timeout", 4003: "idle timeout", 4004: "ended by the backend", 4401: "credential expired",
};
// Codes after which a reconnect would be closed again.
export const FINAL = new Set([1000, 1003, 1007, 1009, 4001, 4003, 4004, 4401]);

// ---- lines for a shell ----

export const field = (name) => `sed 's/.*"${name}": *"\\([^"]*\\)".*/\\1/'`;

export const fill = (id, lines) => byId(id).replaceChildren(...lines.map(([what, text]) => element("li", {}, ...line(what, text))));

export function line(what, text) {
  const copy = element("button", { type: "button", className: "quiet copy", textContent: "Copy", ariaLabel: `Copy: ${what}` });
  copy.onclick = () => copyLine(copy, text);
  return [element("p", { textContent: what }), element("div", {}, element("code", { className: text.includes("\n") ? "program" : "", textContent: text }), copy)];
}

async function copyLine(button, text) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    // Without https or localhost there is no clipboard: select the line instead.
    getSelection().selectAllChildren(button.previousElementSibling);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

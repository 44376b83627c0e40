// The format of server-sent events, of any division into chunks; knows nothing of the network.

/** One event of the stream. */
export interface SseEvent {
  /** Its type, `message` where none was given. */
  type: string;
  /** Its data; nothing where there was no data line, as in a block that only carries an id. */
  data: string | undefined;
  /** Its id, only where this very event has one. */
  id: string | undefined;
}

/** Turns chunks of text into events. */
export class SseParser {
  readonly #event: (event: SseEvent) => void;
  #rest = "";
  #scanned = 0;
  #data: string[] = [];
  #type = "";
  #id: string | undefined;

  constructor(event: (event: SseEvent) => void) {
    this.#event = event;
  }

  /** Takes the next chunk. What is incomplete is kept for the one after it. */
  push(chunk: string): void {
    const text = this.#rest + chunk;
    const ends = /\r\n?|\n/g;
    ends.lastIndex = this.#scanned;
    let start = 0;
    for (let end = ends.exec(text); end; end = ends.exec(text)) {
      // The line feed that belongs to it may be in the next chunk.
      if (end[0] === "\r" && ends.lastIndex === text.length) break;
      this.#line(text.slice(start, end.index));
      start = ends.lastIndex;
    }
    this.#rest = text.slice(start);
    this.#scanned = this.#rest.endsWith("\r") ? this.#rest.length - 1 : this.#rest.length;
  }

  #line(line: string): void {
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
    if (name === "data") this.#data.push(value);
    else if (name === "event") this.#type = value;
    else if (name === "id" && !value.includes("\0")) this.#id = value;
  }

  #dispatch(): void {
    const data = this.#data.length > 0 ? this.#data.join("\n") : undefined;
    const [type, id] = [this.#type || "message", this.#id];
    this.#data = [];
    this.#type = "";
    this.#id = undefined;
    if (data !== undefined || id !== undefined) this.#event({ type, data, id });
  }
}

// Messages on their way up: they wait for a connection, then for their turn, then for a sign that they have arrived. Knows neither
// a clock nor a network.

/** Rate at which messages are sent: below what the gateway lets one connection send, since it closes a connection that sends more. */
export interface SendRate {
  /** Messages per second for as long as one likes. Default 90; the gateway's `limits.messages_per_second` is 100. */
  perSecond?: number;
  /** Messages at once. Default 100; the gateway's `limits.message_burst` is 200, and a network may deliver several pauses' worth at once. */
  burst?: number;
}

/** A message as it is sent: text, or bytes. */
export type Data = string | Uint8Array;

/** Sent messages that are remembered; what was sent before them counts as arrived. */
const SENT_MAX = 1024;
/** Some platforms count heads of frames among the bytes that have not left. Too few messages may be taken for unsent, never too many. */
const FRAME_HEAD_MAX = 14;

/**
 * Invariant: at most `max` messages wait for the first time. What a lost connection may not have delivered is put back before them,
 * so that the order stays: at most 1,024 messages, since no other one is sent before these.
 */
export class Outbox {
  readonly #max: number;
  #waiting: Data[] = [];
  #sent: { data: Data; at: number }[] = [];
  #perSecond: number;
  #burst: number;
  #tokens: number;
  #filledAt = 0;
  /** Number of the first waiting messages that were sent before. */
  #back = 0;
  /** Number of those that are doubtful: they may have arrived, which will be known soon. */
  #doubtful = 0;

  constructor(max: number, { perSecond = 90, burst = 100 }: SendRate = {}) {
    this.#max = max;
    this.#perSecond = Math.max(perSecond, 0.01);
    this.#burst = this.#tokens = Math.max(burst, 1);
  }

  /** Number of messages that wait. */
  get size(): number {
    return this.#waiting.length;
  }

  /** True where no further message may wait. */
  get isFull(): boolean {
    return this.#waiting.length - this.#back >= this.#max;
  }

  /** Lets `data` wait behind all others. The caller has asked `isFull`. */
  push(data: Data): void {
    this.#waiting.push(data);
  }

  /** Another connection begins: the gateway counts from zero. */
  opened(now: number): void {
    this.#tokens = this.#burst;
    this.#filledAt = now;
  }

  /** The milliseconds until the next message may be taken; nothing where none may for now. */
  pause(now: number): number | undefined {
    if (this.#waiting.length === 0 || this.#doubtful > 0) return undefined;
    this.#fill(now);
    return this.#tokens >= 1 ? 0 : Math.ceil(((1 - this.#tokens) / this.#perSecond) * 1000);
  }

  /** Takes the message whose turn it is, and remembers it as sent `at` a time of the caller's, who may have another clock for that. */
  take(now: number, at: number = now): Data | undefined {
    const data = this.#waiting.shift();
    if (data === undefined) return undefined;
    this.#back = Math.max(this.#back - 1, 0);
    this.spend(now);
    this.#sent.push({ data, at });
    if (this.#sent.length > SENT_MAX) this.#sent.shift();
    return data;
  }

  /** A message of the library's own went out: the gateway counts it too. */
  spend(now: number): void {
    this.#fill(now);
    this.#tokens -= 1;
  }

  /** Time of sending of the oldest message that may not have arrived. */
  get oldest(): number {
    return this.#sent[0]?.at ?? Infinity;
  }

  /** Notes that all messages sent before `time` have arrived. */
  arrived(time: number): void {
    let count = 0;
    while ((this.#sent[count]?.at ?? Infinity) <= time) count += 1;
    if (count > 0) this.#sent.splice(0, count);
  }

  /**
   * The connection is lost. Puts back what was sent after `since`, and what the last `unsent` bytes hold, which never left this
   * machine; the rest has arrived. Answers how many messages that are.
   */
  lost(since: number, unsent: number): number {
    let first = this.#sent.length;
    for (; first > 0; first -= 1) {
      const { data, at } = this.#sent[first - 1] as { data: Data; at: number };
      if (unsent <= 0 && at <= since) break;
      unsent -= FRAME_HEAD_MAX + (typeof data === "string" ? new TextEncoder().encode(data).length : data.length);
    }
    const back = this.#sent.slice(first).map(({ data }) => data);
    this.#sent = [];
    this.#waiting.unshift(...back);
    this.#back += back.length;
    return back.length;
  }

  /** Takes nothing until `settle`: whether the first `count` messages have arrived will be known soon. */
  doubt(count: number): void {
    this.#doubtful = count;
  }

  /** Now it is known: `arrived` says it of those that were doubtful. */
  settle(arrived: boolean): void {
    if (arrived) {
      this.#waiting.splice(0, this.#doubtful);
      this.#back -= this.#doubtful;
    }
    this.#doubtful = 0;
  }

  /** The gateway found it too fast. */
  slower(): void {
    this.#perSecond = Math.max(this.#perSecond / 2, 0.5);
    this.#burst = Math.max(Math.floor(this.#burst / 2), 1);
  }

  /** Forgets everything. */
  clear(): void {
    this.#waiting = [];
    this.#sent = [];
    this.#back = this.#doubtful = 0;
  }

  #fill(now: number): void {
    // A clock that was set back earns nothing.
    const seconds = Math.max(now - this.#filledAt, 0) / 1000;
    const earned = this.#perSecond === Infinity ? Infinity : seconds * this.#perSecond;
    this.#tokens = Math.min(this.#burst, this.#tokens + earned);
    this.#filledAt = now;
  }
}

// The last answers of an agent, for calls that come again because their connection was lost. Knows neither tools nor connections.

interface Answer {
  body: string;
  response: string;
  at: number;
}

const COUNT_MAX = 64;
const LENGTH_MAX = 4 * 1024 * 1024;
const AGE_MAX_MS = 600_000;

/** Invariant: at most 64 answers of at most 4 Mi characters, of the last ten minutes. */
export class Answers {
  readonly #answers: Map<string, Answer> = new Map();
  #length = 0;

  /** Remembers the response to a call. `body` tells the call from another one of the same id. */
  keep(requestId: string, body: string, response: string, now: number): void {
    this.#drop(requestId);
    this.#answers.set(requestId, { body, response, at: now });
    this.#length += body.length + response.length;
    for (const [oldest, { at }] of this.#answers) {
      const fits = this.#answers.size <= COUNT_MAX && this.#length <= LENGTH_MAX && now - at < AGE_MAX_MS;
      if (fits) break;
      this.#drop(oldest);
    }
  }

  /** The response to that very call. */
  find(requestId: string, body: string, now: number): string | undefined {
    const answer = this.#answers.get(requestId);
    return answer?.body === body && now - answer.at < AGE_MAX_MS ? answer.response : undefined;
  }

  #drop(requestId: string): void {
    const answer = this.#answers.get(requestId);
    if (!answer) return;
    this.#answers.delete(requestId);
    this.#length -= answer.body.length + answer.response.length;
  }
}

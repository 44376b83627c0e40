// Typed events; knows nothing of connections.

/** A handler of events. A promise counts as handled when it is fulfilled. */
export type Handler<T> = (event: T) => unknown;

/** Events by name, with types. */
export class Emitter<E> {
  readonly #handlers: Map<keyof E, Set<Handler<never>>> = new Map();

  /** Calls `handler` with every such event, in order. Answers a function that ends it. */
  on<K extends keyof E>(event: K, handler: Handler<E[K]>): () => void {
    let handlers = this.#handlers.get(event);
    if (!handlers) this.#handlers.set(event, (handlers = new Set()));
    // A function of its own, so that one handler given twice is called twice and removed once.
    const entry: Handler<never> = (value) => handler(value);
    handlers.add(entry);
    return () => handlers.delete(entry);
  }

  /** Resolves with the next such event. */
  once<K extends keyof E>(event: K): Promise<E[K]> {
    return new Promise((resolve) => {
      const off = this.on(event, (value) => {
        off();
        resolve(value);
      });
    });
  }

  /** True where the event has a handler. */
  protected hears(event: keyof E): boolean {
    return (this.#handlers.get(event)?.size ?? 0) > 0;
  }

  /**
   * Calls the handlers. Answers nothing when all have done their work, else a promise of that; what the first of them threw
   * is thrown only after all were called, so that no handler can keep an event from another.
   */
  protected emit<K extends keyof E>(event: K, value: E[K]): Promise<void> | undefined {
    const promises: unknown[] = [];
    for (const handler of [...(this.#handlers.get(event) ?? [])] as Handler<E[K]>[]) {
      try {
        const result = handler(value);
        if (result instanceof Promise) promises.push(result);
      } catch (error) {
        promises.push(Promise.reject(error));
      }
    }
    if (promises.length === 0) return undefined;
    return Promise.allSettled(promises).then((results) => {
      for (const result of results) if (result.status === "rejected") throw result.reason;
    });
  }
}

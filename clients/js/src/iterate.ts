// Turns calls into something to loop over.

const WAITING_MAX = 10_000;

/**
 * Iterates over what is given to the function that `subscribe` is called with, until `end` is called. Each call answers a promise
 * that is fulfilled when the consumer asks for the next value, having done its work with this one.
 *
 * Holds at most 10,000 values; a consumer that is slower than that gets an error instead of a gap.
 */
export function iterate<T>(
  subscribe: (take: (value: T) => Promise<void>) => () => void,
  onEnd: (end: () => void) => () => void,
): AsyncIterableIterator<T> {
  interface Item {
    value: T;
    done: () => void;
    dropped: (reason: Error) => void;
  }
  const waiting: Item[] = [];
  let current: Item | undefined;
  let wake: (() => void) | undefined;
  let over = false;
  let failure: Error | undefined;

  const offMessages = subscribe((value) => {
    const handled = new Promise<void>((done, dropped) => waiting.push({ value, done, dropped }));
    if (waiting.length > WAITING_MAX) {
      failure = new Error("The consumer is too slow.");
      stop();
    }
    wake?.();
    return handled;
  });
  const offEnd = onEnd(() => {
    over = true;
    wake?.();
  });
  function stop(): void {
    offMessages();
    offEnd();
    over = true;
    for (const item of waiting.splice(0)) item.dropped(failure ?? new Error("The consumer went away."));
  }

  return {
    async next(): Promise<IteratorResult<T>> {
      current?.done();
      current = undefined;
      while (waiting.length === 0 && !over) {
        await new Promise<void>((resolve) => (wake = resolve));
      }
      current = waiting.shift();
      if (current) return { done: false, value: current.value };
      stop();
      if (failure) throw failure;
      return { done: true, value: undefined };
    },
    async return(): Promise<IteratorResult<T>> {
      current?.done();
      current = undefined;
      stop();
      return { done: true, value: undefined };
    },
    [Symbol.asyncIterator](): AsyncIterableIterator<T> {
      return this;
    },
  };
}

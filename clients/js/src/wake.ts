// When a page comes back to life: the moments at which waiting longer would be a pity.

/** What happened: the network is back, or somebody looks at the page again. */
export type Wake = "online" | "visible";

/** Calls `wake` at these moments, where there are any. Answers a function that ends it. */
export function watchWake(wake: (what: Wake) => void): () => void {
  const { document } = globalThis as { document?: Document };
  if (typeof globalThis.addEventListener !== "function") return () => undefined;
  const online = (): void => wake("online");
  const visible = (): void => {
    if (document?.visibilityState === "visible") wake("visible");
  };
  globalThis.addEventListener("online", online);
  document?.addEventListener("visibilitychange", visible);
  return () => {
    globalThis.removeEventListener("online", online);
    document?.removeEventListener("visibilitychange", visible);
  };
}

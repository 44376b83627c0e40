// Types of what the platform gives, spelled without a library of the platform's, so that the package's types need neither that of
// the DOM nor that of Node.

/** The used part of an `AbortSignal`. */
export interface SignalLike {
  readonly aborted: boolean;
  addEventListener(type: "abort", listener: () => void): void;
}

/** An `AbortSignal`, as `fetch` takes it: the platform's own type where the program knows it. */
export type Signal = typeof globalThis extends { AbortSignal: { prototype: infer Platform extends SignalLike } } ? Platform : SignalLike;

/** An address: text, or a `URL`. */
export type Address = string | { readonly href: string };

/** The used part of a `Response`. */
export interface ResponseLike {
  readonly ok: boolean;
  readonly status: number;
  readonly headers: { get(name: string): string | null };
  readonly body: { getReader(): { read(): Promise<{ done: boolean; value?: Uint8Array | undefined }> } } | null;
  text(): Promise<string>;
}

/** The used part of `fetch`. */
export type FetchLike = (url: string, init: any) => Promise<ResponseLike>;

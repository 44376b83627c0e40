// The user's JSON Web Token: asked for when it is needed, and known by its own claims to end. Knows neither a connection nor how a token is sent.

import { isObject, number, parse } from "../messages.ts";
import type { CredentialRequest } from "../options.ts";

/** The function that gives tokens. */
export type GetToken = (request: CredentialRequest) => string | Promise<string>;

/** An unexplained failure is seldom the token's fault: the function that gives tokens is not called after each of them. */
const AGE_MS = 30_000;
const MARGIN_MS = 10_000;

/** The token in use. */
export class Token {
  readonly #ask: GetToken;
  #held: { value: string; since: number; expiresAt: number } | undefined;

  constructor(ask: GetToken) {
    this.#ask = ask;
  }

  /** Time at which the token in use expires, as far as its claims tell. */
  get expiresAt(): number {
    return this.#held?.expiresAt ?? Infinity;
  }

  /** Returns the token for the next connection: the one in use, unless it may be the reason for which the last one failed. */
  async get(request: CredentialRequest): Promise<string> {
    const { reason } = request;
    const now = Date.now();
    const held = this.#held;
    const isUsable = reason === "reconnect" || (reason === "failed" && held !== undefined && now - held.since < AGE_MS);
    if (held && isUsable && held.expiresAt > now + MARGIN_MS) return held.value;
    const value = await this.fresh(request);
    this.use(value);
    return value;
  }

  /** Returns another token, which is not in use yet. */
  async fresh(request: CredentialRequest): Promise<string> {
    const value: unknown = await this.#ask(request);
    if (typeof value !== "string" || value === "") throw new Error("getToken gave no token.");
    return value;
  }

  /** Another token is in use. */
  use(value: string): void {
    const since = Date.now();
    this.#held = { value, since, expiresAt: since + lifeMs(value, since) };
  }
}

/** The milliseconds for which a token that came at `now` is good. The local clock may be wrong, so that no more than its whole life counts. */
function lifeMs(token: string, now: number): number {
  const claims = readClaims(token);
  const [exp, iat] = [number(claims["exp"]), number(claims["iat"])];
  if (exp === undefined) return Infinity;
  const [left, whole] = [exp * 1000 - now, iat === undefined ? Infinity : (exp - iat) * 1000];
  return left > 0 ? Math.min(left, whole) : whole;
}

function readClaims(token: string): Record<string, unknown> {
  try {
    const claims = parse(atob((token.split(".")[1] ?? "").replace(/-/g, "+").replace(/_/g, "/")));
    return isObject(claims) ? claims : {};
  } catch {
    return {};
  }
}

// Values of programs, as the wire has them.

import type { Place } from "./contract.ts";
import type { Rotation, Vector } from "./wire.ts";

/** A position on the wire. */
export function vector({ x, y, z = 0 }: Place): Vector {
  if (![x, y, z].every(Number.isFinite)) throw new Error("A position is made of finite numbers.");
  return { x, y, z };
}

/** A rotation on the wire. */
export function turned({ x, y, z, w }: Rotation): Rotation {
  if (![x, y, z, w].every(Number.isFinite)) throw new Error("A rotation is made of finite numbers.");
  return { x, y, z, w };
}

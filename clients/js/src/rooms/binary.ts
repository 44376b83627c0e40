// Envelopes as protobuf in binary messages. An entry point of its own, since it alone needs the package `@bufbuild/protobuf`.

import { create, fromBinary, type MessageInitShape, toBinary } from "@bufbuild/protobuf";
import { EnvelopeSchema } from "./v1/rooms_pb.ts";
import type { Codec, Envelope, Outgoing, Payload } from "./wire.ts";

/**
 * The codec of binary messages, for the option `binary` of a room.
 *
 * ```ts
 * import { connectRoom } from "@wsproxy/client/rooms";
 * import { binary } from "@wsproxy/client/rooms/binary";
 *
 * const room = connectRoom({ url: "https://gateway.example", room: "lobby", getToken, binary });
 * ```
 */
export const binary: Codec = {
  encode({ messageId = "", reliable = false, to = "", ...payload }: Outgoing): Uint8Array {
    const [name, value] = Object.entries(payload).find(([, value]) => value !== undefined) ?? [];
    const init = { messageId, reliable, to, payload: { case: name, value } } as MessageInitShape<typeof EnvelopeSchema>;
    return toBinary(EnvelopeSchema, create(EnvelopeSchema, init));
  },
  decode(body): Envelope | undefined {
    if (typeof body === "string") return undefined;
    try {
      const { sender, reliable, seq, to, payload } = fromBinary(EnvelopeSchema, body);
      return { sender, reliable, seq, to, payload: payload.case === undefined ? { case: "other" } : (payload as Payload) };
    } catch {
      return undefined;
    }
  },
};

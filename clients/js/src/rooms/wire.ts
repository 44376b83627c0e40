// Messages of rooms as values, whichever form they have on the wire. The shape is that of `@bufbuild/protobuf`, so that its decoder's values fit
// as they are.

/** A point, or a direction. */
export interface Vector {
  readonly x: number;
  readonly y: number;
  readonly z: number;
}

/** A rotation as a quaternion. */
export interface Rotation extends Vector {
  readonly w: number;
}

/** Appearance of an avatar. */
export interface Avatar {
  readonly bodyType?: string;
  readonly primaryColor?: string;
  readonly secondaryColor?: string;
  readonly height?: number;
  readonly customModelUrl?: string;
}

/** PresenceData on the wire. */
export interface PresenceData {
  displayName: string;
  avatarUrl: string;
  position?: Vector | undefined;
  rotation?: Rotation | undefined;
  avatarConfig?: Avatar | undefined;
  hostClientId?: string | undefined;
}

/** A member in the state of a room. */
export interface PlayerSnapshot extends PresenceData {
  clientId: string;
}

/** An entity in the state of a room. */
export interface EntitySnapshot {
  id: string;
  templateId: string;
  ownerId: string;
  position?: Vector | undefined;
  rotation?: Rotation | undefined;
  components: Record<string, string>;
  /** Components that are no text. */
  binaryComponents: Record<string, Uint8Array>;
}

/** Limits that the gateway holds a client to; 0: none. */
export interface Limits {
  messagesPerSecond: number;
  messageBytesMax: number;
  entitiesMax: number;
  entityBytesMax: number;
}

/** PositionUpdate on the wire. */
export interface PositionUpdate {
  entityId: string;
  position?: Vector | undefined;
  rotation?: Rotation | undefined;
  sequenceNumber: number;
}

/** ServerHello on the wire; `more` says that another one follows. */
export interface ServerHello {
  serverVersion: string;
  assignedClientId: string;
  roomId: string;
  connectionId: string;
  initialState?: { entities: EntitySnapshot[]; players: PlayerSnapshot[] } | undefined;
  limits?: Limits | undefined;
  more: boolean;
}

/** Values of PresenceEvent.Type. */
export const PRESENCE = { JOIN: 0, LEAVE: 1, UPDATE: 2 } as const;
/** Values of ChatMessage.Type. */
export const CHAT = { NORMAL: 0, WHISPER: 1, SHOUT: 2 } as const;

/** Payloads of an envelope by their names. */
export interface Payloads {
  serverHello: ServerHello;
  positionUpdate: PositionUpdate;
  positionBatch: { entries: { sender: string; update?: PositionUpdate | undefined }[] };
  entitySpawn: { entityId: string; templateId: string; ownerId: string; components: Record<string, string> };
  entityUpdate: { entityId: string; components: Record<string, Uint8Array> };
  entityDespawn: { entityId: string };
  chatMessage: { fromClientId: string; message: string; timestamp: bigint; type: number };
  presenceEvent: { clientId: string; eventType: number; data?: PresenceData | undefined };
  error: { code: string; message: string; retryAfterMs: number; messageId: string };
  custom: { name: string; data: Uint8Array };
}

/** Payload of an envelope. */
export type Payload = { [K in keyof Payloads]: { case: K; value: Payloads[K] } }[keyof Payloads] | { case: "other"; value?: undefined };

/** An envelope that came. */
export interface Envelope {
  /** Client id of the sender; empty: a worker, or the gateway. */
  sender: string;
  /** Asks for an acknowledgement of `seq`. */
  reliable: boolean;
  seq: bigint;
  /** Client id of the only receiver; empty: all members. */
  to: string;
  payload: Payload;
}

/** An envelope to be sent. Its payload is a member of the name of its kind, as in JSON; enums are named by `PRESENCE` and `CHAT`. */
export interface Outgoing {
  messageId?: string;
  reliable?: boolean;
  to?: string;
  clientHello?: { clientId: string; displayName: string; version: number; features: string[]; presence: Partial<PresenceData> };
  positionUpdate?: Partial<PositionUpdate>;
  entitySpawn?: { entityId: string; templateId: string; components: Record<string, string> };
  entityUpdate?: { entityId: string; components: Record<string, Uint8Array> };
  entityDespawn?: { entityId: string };
  chatMessage?: { message: string; type?: number };
  presenceEvent?: { eventType: number; data: Partial<PresenceData> };
  ack?: { seq: bigint; more?: bigint[] };
  custom?: { name: string; data: Uint8Array };
}

/** A form of envelopes on the wire: JSON in text messages, or protobuf in binary ones. */
export interface Codec {
  /** Returns `envelope` as a message. */
  encode(envelope: Outgoing): string | Uint8Array;
  /** Returns the envelope in `body`; nothing where it is none of this form. */
  decode(body: string | Uint8Array): Envelope | undefined;
}

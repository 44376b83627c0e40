// Everything that is public about rooms. An entry point of its own, so that pages which only use sessions and events carry none of it.

export type { Chat, Custom, Place, Presence, RoomEvents, RoomOptions, RoomProblem, SayOptions, Spawn } from "./contract.ts";
export { connectRoom, Room } from "./room.ts";
export type { GetToken } from "./token.ts";
export type { Avatar, Codec, Limits, Rotation, Vector } from "./wire.ts";
export type { Component, Entity, Member, WorldEvents } from "./world.ts";

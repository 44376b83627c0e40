// A program with the built package; compiled with the types of browsers, and without any platform's.

import { connectEvents, connectSession, GiveUp, type Session } from "../../dist/index.js";

declare const Socket: new (url: string, protocols: string[]) => {
  binaryType: string;
  readonly protocol: string;
  addEventListener(type: string, listener: (event: any) => void): void;
  send(data: any): void;
  close(code?: number, reason?: string): void;
};

export const session: Session<{ type: "token"; text: string } | { type: "done" }> = connectSession({
  url: "https://gateway.example",
  agent: "demo",
  session: "s-1",
  WebSocket: Socket,
  sendRate: { perSecond: 10, burst: 20 },
  getToken: ({ reason, signal }) => {
    if (signal.aborted) throw new GiveUp(reason);
    return "token";
  },
});
session.onType("token", ({ text }) => text.length);
session.on("historyLost", ({ reason }) => reason);

export const events = connectEvents<{ task: { id: number } }>({ url: { href: "https://gateway.example/ws" }, getToken: () => "t" });
events.onType("task", ({ data }) => data.id.toFixed());

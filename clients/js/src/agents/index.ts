// Everything that is public about users' agents: the agent itself, and the calling of its tools. An entry point of its own, so that pages
// which only use sessions and events carry none of it.

export { Agent, type AgentEvents, type AgentOptions, type CallSeen } from "./agent.ts";
export type { CallContext, Tool } from "./calls.ts";
export { Agents, type AgentsOptions, type CallOptions } from "./caller.ts";
export {
  AgentBusy,
  AgentEnded,
  AgentGone,
  AgentOffline,
  AgentRefused,
  AgentReplaced,
  CallCancelled,
  CallDuplicate,
  CallError,
  CallTimeout,
  ToolError,
} from "./errors.ts";
export type { Progress } from "./progress.ts";

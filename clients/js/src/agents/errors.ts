// The failures of calls and of agents, as classes.

/** A failure as the gateway tells it. */
export interface Failure {
  /** Code for programs, such as `agent_offline`. */
  code: string;
  /** The same for people. */
  message: string;
  /** True where the same request may be sent again without being done twice. */
  retryable: boolean;
  /** HTTP status, where there was an answer. */
  status?: number | undefined;
  /** Id of the call, where it is known. */
  requestId?: string | undefined;
}

/** A call without a result. Its subclasses name the reasons that programs tell apart; `code` names all. */
export class CallError extends Error {
  override readonly name: string = "CallError";
  /**
   * The gateway's code, such as `agent_offline`; or from here `unreachable` (the gateway did not answer) and `outcome_unknown`
   * (the answer was lost, so the tool may have run).
   */
  readonly code: string;
  /** True where the same call may be made again without being done twice. */
  readonly retryable: boolean;
  /** HTTP status, where there was an answer. */
  readonly status: number | undefined;
  /** Id of the call, where it is known. */
  readonly requestId: string | undefined;

  constructor({ code, message, retryable, status, requestId }: Failure) {
    super(message);
    this.code = code;
    this.retryable = retryable;
    this.status = status;
    this.requestId = requestId;
  }
}

/** The tool itself has failed: its own error, which is an answer. */
export class ToolError extends CallError {
  override readonly name: string = "ToolError";
}

/** No agent of the user is connected. The call was never sent. */
export class AgentOffline extends CallError {
  override readonly name: string = "AgentOffline";
}

/** The agent's connection ended during the call. The tool may have run. */
export class AgentGone extends CallError {
  override readonly name: string = "AgentGone";
}

/** The agent, or the gateway, has no room for a further call. The call was never sent. */
export class AgentBusy extends CallError {
  override readonly name: string = "AgentBusy";
}

/** No answer in time. The tool may have run. */
export class CallTimeout extends CallError {
  override readonly name: string = "CallTimeout";
}

/** The call was cancelled, by this caller or by another one. */
export class CallCancelled extends CallError {
  override readonly name: string = "CallCancelled";
}

/** The idempotency key is that of a call which has ended: the tool ran, and its result is not kept. */
export class CallDuplicate extends CallError {
  override readonly name: string = "CallDuplicate";
}

const BY_CODE: Readonly<Record<string, typeof CallError>> = {
  tool_error: ToolError,
  agent_offline: AgentOffline,
  agent_gone: AgentGone,
  busy: AgentBusy,
  timeout: CallTimeout,
  cancelled: CallCancelled,
  duplicate: CallDuplicate,
};

/** Returns the error of the class that belongs to the code of `failure`. */
export function callError(failure: Failure): CallError {
  const Class = Object.hasOwn(BY_CODE, failure.code) ? (BY_CODE[failure.code] as typeof CallError) : CallError;
  return new Class(failure);
}

/** The agent's connection has ended for good. */
export class AgentEnded extends Error {
  override readonly name: string = "AgentEnded";
  /** WebSocket close code; 1006 where there was none. */
  readonly code: number;
  /** The reason that came with it: for a refused handshake the gateway's code, such as `invalid_credentials`. */
  readonly reason: string;
  /** HTTP status of a refused handshake, where it is known. */
  readonly status: number | undefined;

  constructor(message: string, { code, reason, status }: { code: number; reason: string; status?: number | undefined }) {
    super(message);
    this.code = code;
    this.reason = reason;
    this.status = status;
  }
}

/** Another agent of the same user has connected: the newer one stays. */
export class AgentReplaced extends AgentEnded {
  override readonly name: string = "AgentReplaced";
}

/** The gateway accepts the credentials no longer, or never did. */
export class AgentRefused extends AgentEnded {
  override readonly name: string = "AgentRefused";
}

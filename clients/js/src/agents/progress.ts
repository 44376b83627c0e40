// Progress of a call, as the tool tells it and as the caller hears it.

/** Progress of a call. */
export interface Progress {
  /** Amount of work that is done. */
  progress: number;
  /** Amount of all work, where the tool knows it. */
  total: number | undefined;
  /** The same for people. */
  message: string | undefined;
}

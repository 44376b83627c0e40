// The word of an application that no credentials will come.

/**
 * Thrown by the function that gives credentials, it ends the connection for good, such as when the user has signed out. Whatever
 * else that function throws is tried again.
 */
export class GiveUp extends Error {
  override readonly name: string = "GiveUp";
}

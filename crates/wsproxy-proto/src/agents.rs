//! Protocol between users' agents, the gateway and the callers of tools: what each may say, and which outcome a call
//! has. Knows neither sockets nor Redis nor a clock.
//!
//! A member of a message that the gateway reads may stand in it once: of two, different readers would take different
//! ones. Members that it does not read may stand in any number, and are left out or passed on with their message.
//! `null` counts as an absent member where nothing else is said.

use sha1_smol::Sha1;

pub mod answer;
pub mod calls;
pub mod command;
pub mod message;
pub mod outcome;
pub mod writer;

/// Returns the hash that tells calls with the same request id apart: of the tool's name and of `params` as they were
/// written.
///
/// Callers choose both, so the hash must be cryptographic: it is the first half of a SHA-1, of which two inputs that
/// agree cost 2^64 tries. The length of the name stands first, so that no byte of one moves into the other.
#[must_use]
pub fn body_hash(tool: &str, params: &[u8]) -> [u8; 16] {
    let mut hash = Sha1::new();
    hash.update(&(tool.len() as u64).to_le_bytes());
    hash.update(tool.as_bytes());
    hash.update(params);
    first_half(&hash)
}

fn first_half(hash: &Sha1) -> [u8; 16] {
    let mut half = [0; 16];
    half.copy_from_slice(&hash.digest().bytes()[..16]);
    half
}

/// Upper bound of the nesting of a message, in levels of arrays and objects.
pub const DEPTH_MAX: usize = 128;

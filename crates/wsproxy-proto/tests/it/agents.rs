//! The protocol of users' agents against the shared vectors in `spec/agents`, against `serde_json`, and against a model
//! of calls.

mod calls;
mod json;
mod vectors;

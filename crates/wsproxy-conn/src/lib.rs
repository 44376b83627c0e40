//! The connection runtime.

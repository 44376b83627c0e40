//! The configuration of the echo family: a switch only.

use crate::config::{
    keys::{Key, key},
    kind::Switch,
};

/// The switch of the family.
#[rustfmt::skip]
pub const KEYS: &[Key] = &[
    key!(endpoints.echo, Switch, "/echo: answers every message with itself; for conformance suites."),
];

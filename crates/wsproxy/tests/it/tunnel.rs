//! The tunnel: lanes of cluster agents, and requests over them, with an agent of the tests.

mod bodies;
mod hostile;
mod lanes;
mod limits;
mod operators;
mod requests;
mod rules;
mod tokens;
mod upgrades;

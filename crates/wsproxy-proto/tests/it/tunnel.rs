//! The tunnel from outside: its frames by the shared vectors, and two lanes that are driven against each other.

mod flow;
mod frames;
mod lanes;
mod pair;
mod peer;
mod rules;
mod vectors;

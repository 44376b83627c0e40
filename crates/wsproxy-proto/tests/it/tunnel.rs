//! The tunnel from outside: its frames by the shared vectors, and two lanes that are driven against each other.

mod frames;
mod vectors;

//! Lanes of the tunnel over TCP on loopback: two lanes with each other, and one lane with a peer written by hand.

mod cancel;
mod drain;
mod ends;
mod load;
mod pair;
mod peer;
mod streams;

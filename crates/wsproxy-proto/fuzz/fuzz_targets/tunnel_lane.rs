//! Fuzzes `bodies::tunnel_lane`.

#![no_main]
#![allow(dead_code)]

#[path = "../../tests/it/bodies.rs"]
mod bodies;
#[path = "../../tests/it/support.rs"]
mod support;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::tunnel_lane(data));

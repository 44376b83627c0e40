//! Messages of rooms against the shared vectors in `spec/rooms`, and against decoders of whole messages.

mod properties;
mod vectors;
mod written;

//! Members of rooms on one epoll loop, which the scenario itself turns; knows the wire formats only from outside.

pub mod crew;
mod dialect;
mod fields;
mod inbox;
mod member;
mod moves;
pub mod seen;

pub use crew::{Crew, CrewConfig};
pub use dialect::Dialect;
pub use moves::Pace;
pub use seen::Seen;

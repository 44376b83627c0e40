//! The scenarios: each sets up clients, puts one kind of load on the server and reports its figures.

pub mod agent_ends;
pub mod agents;
pub mod agents_lost;
pub mod churn;
pub mod cluster;
pub mod connect;
pub mod drain;
pub mod echo;
pub mod fanout;
pub mod history;
pub mod idle;
pub mod outage;
pub mod resume;
pub mod rooms;
pub mod scale;
pub mod sessions;
pub mod slow;
pub mod tunnel;

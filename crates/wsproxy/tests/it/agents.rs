//! Users' agents.

mod api;
mod api_absence;
mod api_async;
mod api_directory;
mod api_faults;
mod api_stream;
mod audit;
mod audit_faults;
mod audit_log;
mod calls;
mod database;
mod database_cli;
mod database_faults;
mod database_tables;
mod faults;
mod handover;
mod node;
mod openings;
mod owner;
mod places;
mod presence;
mod registry;
mod site;
pub(crate) mod stage;

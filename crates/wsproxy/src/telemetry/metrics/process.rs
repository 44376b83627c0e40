//! Metrics of the process.

use std::time::Instant;

use prometheus_client::registry::Unit;

use crate::telemetry::{
    log,
    scrape::{Scrape, Section, Source},
};

/// The process of an instance.
#[derive(Debug)]
pub struct Process {
    /// Time of the instance's start.
    pub started: Instant,
}

impl Source for Process {
    fn collect(&self, scrape: &mut Scrape) {
        let scrape = scrape.section(Section::Process);
        let help = "Log lines that were dropped since standard error was stuck or gone";
        scrape.counter("log_lines_dropped", help, log::dropped_lines());
        let uptime = self.started.elapsed().as_secs() as i64;
        scrape.gauge_in(Unit::Seconds, "uptime", "Time since the start", uptime);
        let memory = resident_bytes().unwrap_or_default() as i64;
        scrape.gauge_in(Unit::Bytes, "process_resident_memory", "Memory in use", memory);
    }
}

/// Returns the resident memory of this process; `None` if the system does not tell.
#[must_use]
pub fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib * 1024)
}

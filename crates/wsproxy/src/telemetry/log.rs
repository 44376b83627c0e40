//! Logs: events of `tracing` as lines on standard error; never in the way of a message.
//!
//! A line is made where the event happens and handed to a thread that writes. Should standard
//! error be stuck, lines are dropped and counted, and nothing else notices.

use std::{io::IsTerminal, sync::OnceLock};

use anyhow::Context;
use tracing_subscriber::{EnvFilter, layer::SubscriberExt};

use crate::config::{Log, LogFormat};

mod layer;
mod line;
mod writer;

pub use writer::dropped_lines;

/// Keeps logs flowing; dropping it waits a moment until what was logged is written.
#[must_use = "logs are flushed when this is dropped"]
#[derive(Debug)]
pub struct Logs(());

impl Drop for Logs {
    fn drop(&mut self) {
        flush();
    }
}

/// Waits until what was logged is written, at most a second; for whoever ends the process by force.
pub fn flush() {
    if let Some(writer) = WRITER.get() {
        writer.flush();
    }
}

/// Target of the lines, at the level `trace`, by which one message is followed through an instance. They tell where it
/// is and how long it is, never what it says.
pub const MESSAGES: &str = "wsproxy::messages";

/// One log per process.
static WRITER: OnceLock<writer::Writer> = OnceLock::new();

/// Starts logging for the whole process; to be called once, by the program.
///
/// # Errors
/// The level cannot be parsed, or logging was started before.
pub fn start(log: &Log) -> anyhow::Result<Logs> {
    let filter = EnvFilter::try_new(&log.level).context("log.level cannot be parsed")?;
    let terminal = std::io::stderr().is_terminal();
    let style = match log.format {
        LogFormat::Json => line::Style::Json,
        LogFormat::Auto if !terminal => line::Style::Json,
        LogFormat::Auto | LogFormat::Pretty => line::Style::Pretty { colours: terminal },
    };
    let writer = writer::Writer::start(std::io::stderr()).context("cannot start a thread")?;
    let lines = layer::Lines::new(style, writer.clone());
    let subscriber = tracing_subscriber::registry().with(filter).with(lines);
    tracing::subscriber::set_global_default(subscriber).context("logging was started before")?;
    let _ = WRITER.set(writer);
    log_panics();
    Ok(Logs(()))
}

/// A panic is one line like any other, written before the process can end because of it.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let message = panic.payload_as_str().unwrap_or("no message");
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        let backtrace = std::backtrace::Backtrace::capture();
        let backtrace = (backtrace.status() == std::backtrace::BacktraceStatus::Captured)
            .then(|| backtrace.to_string());
        tracing::error!(error = message, location, backtrace, "A task panicked.");
        flush();
    }));
}

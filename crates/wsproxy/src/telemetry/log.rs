//! Logs: events of `tracing` as lines on standard error, without delay for messages.
//!
//! The task of an event formats the line and gives it to a thread that writes. While standard error is stuck, lines
//! are dropped and counted, and no task waits.

use std::{io::IsTerminal, sync::OnceLock};

use anyhow::Context;
use tracing_subscriber::{EnvFilter, Registry, layer::SubscriberExt, reload};

use crate::config::{LogConfig, LogFormat};

mod layer;
mod line;
mod writer;

pub use writer::dropped_lines;

/// Guard of the log; dropping it waits a moment until all lines are written.
#[must_use = "logs are flushed when this is dropped"]
#[derive(Debug)]
pub struct LogGuard(());

impl Drop for LogGuard {
    fn drop(&mut self) {
        flush();
    }
}

/// Waits until all lines are written, at most a second; for code that ends the process by force.
pub fn flush() {
    if let Some(writer) = WRITER.get() {
        writer.flush();
    }
}

/// Starts logging for the whole process; to be called once, by the program.
///
/// # Errors
/// The level cannot be parsed, or logging was started before.
pub fn start(log: &LogConfig) -> anyhow::Result<LogGuard> {
    let filter = EnvFilter::try_new(&log.level).context("log.level cannot be parsed")?;
    let terminal = std::io::stderr().is_terminal();
    let style = match log.format {
        LogFormat::Json => line::Style::Json,
        LogFormat::Auto if !terminal => line::Style::Json,
        LogFormat::Auto | LogFormat::Pretty => line::Style::Pretty { colours: terminal },
    };
    let writer = writer::LogWriter::start(std::io::stderr()).context("cannot start a thread")?;
    let lines = layer::Lines::new(style, writer.clone());
    let (filter, handle) = reload::Layer::new(filter);
    let subscriber = tracing_subscriber::registry().with(filter).with(lines);
    tracing::subscriber::set_global_default(subscriber).context("logging was started before")?;
    let _ = (WRITER.set(writer), FILTER.set(handle));
    log_panics();
    Ok(LogGuard(()))
}

/// Replaces the level, or the filter. Nothing changes where logging was not started here.
///
/// # Errors
/// The level cannot be parsed.
pub fn set_level(level: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(level).map_err(|error| error.to_string())?;
    match FILTER.get() {
        Some(handle) => handle.reload(filter).map_err(|error| error.to_string()),
        None => Ok(()),
    }
}

/// Logs a panic as one line, written before the process can end because of it.
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

/// Target of the lines that follow one message through an instance, at the level `trace`. They tell the message's place
/// and length, never its content.
pub const MESSAGES: &str = "wsproxy::messages";

/// The filter: one log per process.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// The writer: one log per process.
static WRITER: OnceLock<writer::LogWriter> = OnceLock::new();

//! The format of a line: JSON for machines, a shorter one for people; knows no spans.

use std::{
    fmt::{self, Write},
    time::SystemTime,
};

use serde_json::Value;
use tracing::{
    Level, Metadata,
    field::{Field, Visit},
};

/// The fields of an event or a span.
#[derive(Debug, Default)]
pub(super) struct Fields {
    message: String,
    others: Vec<(&'static str, Value)>,
}

impl Fields {
    /// Takes those fields of the outer span that the inner ones do not set.
    pub(super) fn inherit(&mut self, outer: &Self) {
        for (name, value) in &outer.others {
            if !self.others.iter().any(|(known, _)| known == name) {
                self.others.push((name, value.clone()));
            }
        }
    }

    fn set(&mut self, field: &Field, value: impl Into<Value>) {
        // The line itself uses these names.
        let name = match field.name() {
            "level" => "field_level",
            "target" => "field_target",
            "timestamp" => "field_timestamp",
            name => name,
        };
        let value = value.into();
        match self.others.iter_mut().find(|(known, _)| *known == name) {
            Some(known) => known.1 = value,
            None => self.others.push((name, value)),
        }
    }
}

impl Visit for Fields {
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, value);
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, value);
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, value);
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field, value);
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message = value.to_owned(),
            _ => self.set(field, value),
        }
    }
    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        let mut text = value.to_string();
        let mut cause = value.source();
        while let Some(error) = cause {
            let _ = write!(text, ": {error}");
            cause = error.source();
        }
        self.set(field, text);
    }
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

/// Format of lines.
#[derive(Debug, Clone, Copy)]
pub(super) enum Style {
    /// A JSON object.
    Json,
    /// A shorter line for people.
    Pretty {
        /// With escape sequences for colours.
        colours: bool,
    },
}

impl Style {
    /// Returns a whole line, with its newline.
    pub(super) fn line(self, now: SystemTime, of: &Metadata<'_>, fields: &Fields) -> Vec<u8> {
        let now = humantime::format_rfc3339_micros(now);
        let mut line = String::with_capacity(256);
        // Writing to a string cannot fail.
        let _ = match self {
            Self::Json => json(&mut line, &now, of, fields),
            Self::Pretty { colours } => pretty(&mut line, &now, of, fields, colours),
        };
        line.push('\n');
        line.into_bytes()
    }
}

fn json(
    line: &mut String,
    now: &impl fmt::Display,
    of: &Metadata<'_>,
    fields: &Fields,
) -> fmt::Result {
    write!(line, "{{\"timestamp\":\"{now}\",\"level\":\"{}\"", of.level())?;
    write!(line, ",\"message\":{}", Value::from(fields.message.as_str()))?;
    write!(line, ",\"target\":{}", Value::from(of.target()))?;
    for (name, value) in &fields.others {
        write!(line, ",{}:{value}", Value::from(*name))?;
    }
    line.write_char('}')
}

fn pretty(
    line: &mut String,
    now: &impl fmt::Display,
    of: &Metadata<'_>,
    fields: &Fields,
    colours: bool,
) -> fmt::Result {
    let colour = match *of.level() {
        Level::ERROR => "\x1b[31m",
        Level::WARN => "\x1b[33m",
        Level::INFO => "\x1b[32m",
        _ => "\x1b[34m",
    };
    let [dim, colour, end] = if colours { ["\x1b[2m", colour, "\x1b[0m"] } else { [""; 3] };
    write!(line, "{dim}{now}{end} {colour}{:>5}{end} ", of.level().as_str())?;
    escape(line, &fields.message)?;
    for (name, value) in &fields.others {
        write!(line, " {dim}{name}={end}")?;
        match value {
            Value::String(text) => escape(line, text)?,
            value => write!(line, "{value}")?,
        }
    }
    write!(line, " {dim}{}{end}", of.target())
}

/// Escapes a client's text: it must not end the line, control the terminal or reverse the direction of text.
fn escape(line: &mut String, text: &str) -> fmt::Result {
    text.chars().try_for_each(|c| match c {
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
            write!(line, "{}", c.escape_unicode())
        }
        c if c.is_control() => write!(line, "{}", c.escape_debug()),
        c => line.write_char(c),
    })
}

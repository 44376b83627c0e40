//! The layer that turns events and the spans around them into lines.

use std::time::SystemTime;

use tracing::{
    Event, Subscriber,
    span::{Attributes, Id, Record},
};
use tracing_subscriber::{Layer, layer::Context, registry::LookupSpan};

use super::{
    line::{Fields, Style},
    writer::LogWriter,
};

/// Layer that writes a line for every event, with the fields of its spans beside its own.
pub(super) struct Lines {
    style: Style,
    writer: LogWriter,
}

impl Lines {
    pub(super) fn new(style: Style, writer: LogWriter) -> Self {
        Self { style, writer }
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Lines {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut fields = Fields::default();
            attributes.record(&mut fields);
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(outer) = span.extensions().get::<Fields>() {
                fields.inherit(outer);
            }
        }
        self.writer.push(&self.style.line(SystemTime::now(), event.metadata(), &fields));
    }
}

#[cfg(test)]
mod tests {
    use std::{error::Error, io::Write, sync::Arc};

    use parking_lot::Mutex;
    use tracing::field::Empty;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Seen(Arc<Mutex<Vec<u8>>>);

    impl Write for Seen {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn lines(style: Style) -> Vec<String> {
        let seen = Seen::default();
        let writer = LogWriter::start(seen.clone()).unwrap();
        let subscriber = tracing_subscriber::registry().with(Lines::new(style, writer.clone()));
        tracing::subscriber::with_default(subscriber, log);
        writer.flush();
        let text = String::from_utf8(seen.0.lock().clone()).unwrap();
        text.split_terminator('\n').map(str::to_owned).collect()
    }

    const HOSTILE: &str = "x\n{\"level\":\"ERROR\"}\r\u{1b}[31m";

    fn log() {
        let id = HOSTILE;
        let span = tracing::info_span!("c", session_id = %id, connection_id = 7, late = Empty);
        let _entered = span.enter();
        span.record("late", true);
        let error = std::io::Error::other("no\nway");
        tracing::warn!(connection_id = 8, level = "mine", ?error, "Told {id}");
        tracing::info!(error = &error as &dyn Error, big = 1_u128, nan = f64::NAN);
    }

    #[test]
    fn json_has_fields_of_event_and_spans_at_its_top() {
        let lines = lines(Style::Json);
        assert_eq!(lines.len(), 2, "{lines:?}");
        let line: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
        assert_eq!((&line["level"], &line["field_level"]), (&"WARN".into(), &"mine".into()));
        assert_eq!(line["session_id"], HOSTILE);
        assert_eq!((&line["connection_id"], &line["late"]), (&8.into(), &true.into()));
        assert_eq!(line["message"], format!("Told {HOSTILE}"));
        assert!(line["target"].as_str().unwrap().ends_with("layer::tests"));
        assert!(humantime::parse_rfc3339(line["timestamp"].as_str().unwrap()).is_ok());
        assert_eq!(lines[0].matches("connection_id").count(), 1);
        let line: serde_json::Value = serde_json::from_str(&lines[1]).unwrap();
        assert_eq!((&line["error"], &line["big"]), (&"no\nway".into(), &"1".into()));
        assert!(line["nan"].is_null());
    }

    #[test]
    fn pretty_lines_cannot_be_forged() {
        for colours in [false, true] {
            let lines = lines(Style::Pretty { colours });
            assert_eq!(lines.len(), 2, "{lines:?}");
            assert!(!lines[0].contains('\r'));
            assert!(!lines[0].contains("}\u{1b}[31m") && lines[0].contains("\\u{1b}[31m"));
            assert!(lines[0].contains("Told x\\n{"), "{}", lines[0]);
            assert_eq!(lines[0].contains('\u{1b}'), colours);
        }
    }
}

//! The formats of the page of metrics, and the choice by `Accept`. Knows no metric.

use http::{HeaderMap, header};
use serde_json::{Map, Value};

/// A format of `/metrics`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// The text format 0.0.4 of Prometheus, which other scrapers read as well.
    Text,
    /// `{"metrics":[{"name","labels":{},"value"}]}`
    Json,
}

impl Format {
    const ALL: [Self; 3] = [Self::OpenMetrics, Self::Text, Self::Json];

    /// Returns the format that `Accept` prefers; OpenMetrics without a preference.
    #[must_use]
    pub fn wanted(headers: &HeaderMap) -> Self {
        let values = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
        let ranges = values.flat_map(|value| value.split(','));
        let mut best: (Preference, Self) = ((0.0, 0), Self::OpenMetrics);
        for range in ranges {
            for format in Self::ALL {
                let preference = format.preference(range);
                if preference > best.0 {
                    best = (preference, format);
                }
            }
        }
        best.1
    }

    /// Returns the value of `Content-Type`.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::Json => "application/json",
        }
    }

    /// Converts samples from OpenMetrics to this format.
    #[must_use]
    pub fn write(self, open_metrics: String) -> String {
        match self {
            Self::OpenMetrics => open_metrics,
            Self::Text => text(&open_metrics),
            Self::Json => json(&open_metrics),
        }
    }

    /// Returns the preference for this format in an element of `Accept`; zero where it is not accepted.
    fn preference(self, range: &str) -> Preference {
        let mut parts = range.split(';').map(str::trim);
        let media = parts.next().unwrap_or_default().to_ascii_lowercase();
        let (name, group, versions): (_, _, &[&str]) = match self {
            Self::OpenMetrics => {
                ("application/openmetrics-text", "application/*", &["1.0.0", "0.0.1"])
            }
            Self::Text => ("text/plain", "text/*", &["0.0.4"]),
            Self::Json => ("application/json", "application/*", &[]),
        };
        let precision = [("*/*", 1), (group, 2), (name, 3)];
        let Some((_, precision)) = precision.into_iter().find(|(known, _)| *known == media) else {
            return (0.0, 0);
        };
        let mut weight = 1.0;
        for (name, value) in parts.filter_map(|part| part.split_once('=')) {
            match name.trim().to_ascii_lowercase().as_str() {
                "q" => weight = value.trim().parse().unwrap_or(0.0),
                "version" if !versions.contains(&value.trim().trim_matches('"')) => {
                    return (0.0, 0);
                }
                _ => {}
            }
        }
        if weight > 0.0 { (weight, precision) } else { (0.0, 0) }
    }
}

/// Adds members to the JSON form.
#[must_use]
pub fn with_members(json: String, members: Map<String, Value>) -> String {
    if members.is_empty() {
        return json;
    }
    // Both are objects, and the JSON form is never empty.
    let members = Value::Object(members).to_string();
    format!("{},{}", &json[..json.len() - 1], &members[1..])
}

/// The weight of a format, and the exactness of its name.
type Preference = (f32, u8);

/// Converts to the text format 0.0.4: the names of counters end with `_total` in their heads too, and there are no
/// units.
fn text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut push = |line: &str| {
        text.push_str(line);
        text.push('\n');
    };
    let mut help = None;
    for line in open_metrics.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("HELP"), Some(_), what) => help = what,
            (Some("#"), Some("TYPE"), Some(name), Some(kind)) => {
                let name =
                    if kind == "counter" { format!("{name}_total") } else { name.to_owned() };
                if let Some(help) = help.take() {
                    push(&format!("# HELP {name} {help}"));
                }
                push(&format!("# TYPE {name} {kind}"));
            }
            (Some("#"), ..) => {}
            _ => push(line),
        }
    }
    text
}

fn json(open_metrics: &str) -> String {
    let samples: Vec<_> = open_metrics.lines().filter_map(sample).collect();
    serde_json::json!({ "metrics": samples }).to_string()
}

/// Reads one line of the text format, unless it is a comment. The gateway's label values have no quotes.
fn sample(line: &str) -> Option<Value> {
    let (series, value) = line.strip_prefix('#').is_none().then(|| line.rsplit_once(' '))??;
    let (name, labels) = series.split_once('{').unwrap_or((series, ""));
    let labels: Map<_, _> = labels
        .trim_end_matches('}')
        .split(',')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.trim_matches('"').into()))
        .collect();
    let value = value.parse::<f64>().ok()?;
    Some(serde_json::json!({ "name": name, "labels": labels, "value": value }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(accept: &[&str]) -> Format {
        let mut headers = HeaderMap::new();
        for value in accept {
            headers.append(header::ACCEPT, value.parse().unwrap());
        }
        Format::wanted(&headers)
    }

    #[test]
    fn accept_chooses_by_weight_then_precision_then_order() {
        use Format::{Json, OpenMetrics, Text};
        let old = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;\
            q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        let new = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;\
            version=1.0.0;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        for (accept, format) in [
            (&[][..], OpenMetrics),
            (&["*/*"], OpenMetrics),
            (&["text/html"], OpenMetrics),
            (&[old], OpenMetrics),
            (&[new], OpenMetrics),
            (&["text/plain; version=0.0.4"], Text),
            (&["TEXT/Plain;version=\"0.0.4\";q=1,*/*;q=0.1"], Text),
            (&["text/html, text/*;q=0.9, */*;q=0.8"], Text),
            (&["text/plain;q=0.2", "application/openmetrics-text;q=0.1"], Text),
            (&["text/plain;version=1.0.0"], OpenMetrics),
            (&["application/json"], Json),
            (&["application/json, text/plain, */*"], Json),
            (&["application/json;q=0, text/plain;q=0.1"], Text),
            (&["text/plain;q=x"], OpenMetrics),
        ] {
            assert_eq!(wanted(accept), format, "{accept:?}");
        }
    }

    const SAMPLES: &str = "# HELP a_bytes Some bytes.\n# TYPE a_bytes gauge\n# UNIT a_bytes bytes\n\
        a_bytes 1\n# HELP b What it counts.\n# TYPE b counter\nb_total{x=\"1\",y=\"z\"} 2\n# EOF\n";

    #[test]
    fn the_text_form_names_counters_as_their_samples() {
        let expected = "# HELP a_bytes Some bytes.\n# TYPE a_bytes gauge\na_bytes 1\n\
            # HELP b_total What it counts.\n# TYPE b_total counter\nb_total{x=\"1\",y=\"z\"} 2\n";
        assert_eq!(Format::Text.write(SAMPLES.to_owned()), expected);
    }

    #[test]
    fn the_json_form_holds_the_samples() {
        let json = Format::Json.write(SAMPLES.to_owned());
        let json: Value = serde_json::from_str(&json).unwrap();
        let expected = serde_json::json!({ "metrics": [
            { "name": "a_bytes", "labels": {}, "value": 1.0 },
            { "name": "b_total", "labels": { "x": "1", "y": "z" }, "value": 2.0 },
        ]});
        assert_eq!(json, expected);
    }

    #[test]
    fn members_stand_beside_the_samples() {
        let json = || Format::Json.write(SAMPLES.to_owned());
        assert_eq!(with_members(json(), Map::new()), json());
        let members = Map::from_iter([("uptime".to_owned(), 7.into())]);
        let json: Value = serde_json::from_str(&with_members(json(), members)).unwrap();
        assert_eq!((json["metrics"].as_array().unwrap().len(), &json["uptime"]), (2, &7.into()));
    }
}

//! `[traces]`: where traces go, and which are recorded. Most keys have the names of OpenTelemetry's variables beside
//! their own.

use std::{borrow::Cow, path::PathBuf, time::Duration};

use http::{HeaderName, HeaderValue, Uri};
use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret, SecretString};

use crate::config::{
    Config,
    keys::{Key, key},
    kind::{FilePath, Number, OneOf, Optional, Ratio, Secret, Switch, Text, Time},
};

/// `[traces]`
#[derive(Debug, Clone)]
pub struct TracesConfig {
    /// Base URL of the collector, to which [`TRACES_PATH`] is added.
    pub endpoint: Option<String>,
    /// Whole URL, which wins over `endpoint`.
    pub url: Option<String>,
    /// Whether spans are exported at all.
    pub exporter: TraceExporter,
    /// Switches traces off in spite of a URL.
    pub disabled: bool,
    /// Protocol of the collector.
    pub protocol: TraceProtocol,
    /// Headers of each request, as `name=value,name=value`.
    pub headers: Option<SecretString>,
    /// Time of one request.
    pub timeout: Duration,
    /// File with further CA certificates (PEM) for `https://`.
    pub ca_file: Option<PathBuf>,
    /// `service.name` of all spans; `None`: that of `resource_attributes`, else `wsproxy`.
    pub service_name: Option<String>,
    /// Attributes of all spans, as `name=value,name=value`.
    pub resource_attributes: Option<String>,
    /// Rule that chooses the traces which are recorded.
    pub sampler: Sampler,
    /// Share of the traces that samplers with a ratio record.
    pub sampler_arg: f64,
    /// Handshakes per second whose client may ask for its trace to be recorded.
    pub client_samples_per_second: u32,
    /// Most spans that wait.
    pub queue_max: usize,
    /// Most spans of one request.
    pub batch_max: usize,
    /// Time for which spans wait for others.
    pub schedule_delay: Duration,
    /// Time of one batch with all its attempts.
    pub export_timeout: Duration,
}

/// Use of the spans that are recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TraceExporter {
    /// They are sent with OTLP.
    Otlp,
    /// None are recorded.
    None,
}

/// Protocol of the collector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TraceProtocol {
    /// Protobuf over HTTP.
    HttpProtobuf,
}

/// Rule that chooses the traces which are recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampler {
    /// All.
    AlwaysOn,
    /// None.
    AlwaysOff,
    /// A share of them, by their ids.
    TraceIdRatio,
    /// Those whose parent is recorded; all without a parent.
    ParentBasedAlwaysOn,
    /// Those whose parent is recorded; none without a parent.
    ParentBasedAlwaysOff,
    /// Those whose parent is recorded; a share of those without a parent.
    ParentBasedTraceIdRatio,
}

impl TracesConfig {
    /// Returns the URL to which spans are sent; `None`: traces are off.
    #[must_use]
    pub fn target(&self) -> Option<String> {
        if self.disabled || self.exporter == TraceExporter::None {
            return None;
        }
        let base = self.endpoint.as_ref();
        let base = || base.map(|base| format!("{}{TRACES_PATH}", base.trim_end_matches('/')));
        self.url.clone().or_else(base)
    }

    /// Returns the headers of each request.
    #[must_use]
    pub fn headers(&self) -> Vec<(HeaderName, HeaderValue)> {
        let text = self.headers.as_ref().map_or("", |text| text.expose_secret());
        read_headers(text).unwrap_or_default()
    }

    /// Returns the attributes that an operator gave to all spans, the name of the service first.
    #[must_use]
    pub fn attributes(&self) -> Vec<(String, String)> {
        let given = self.resource_attributes.as_deref().and_then(pairs).unwrap_or_default();
        let named = given.iter().find(|(name, _)| name == SERVICE_NAME);
        let name = self.service_name.as_deref().or_else(|| named.map(|(_, value)| value.as_str()));
        let first = (SERVICE_NAME.to_owned(), name.unwrap_or("wsproxy").to_owned());
        let rest = given.iter().filter(|(name, _)| name != SERVICE_NAME).cloned();
        std::iter::once(first).chain(rest).collect()
    }
}

/// Reads `name=value,name=value` with percent-encoded values; `None` if it has another form.
fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let (name, value) = part.split_once('=')?;
            let decode = |text: &str| {
                percent_decode_str(text.trim()).decode_utf8().ok().map(Cow::into_owned)
            };
            let (name, value) = (decode(name)?, decode(value)?);
            let is_good = (1..=255).contains(&name.len()) && value.len() <= VALUE_BYTES_MAX;
            is_good.then_some((name, value))
        })
        .collect()
}

fn read_headers(text: &str) -> Option<Vec<(HeaderName, HeaderValue)>> {
    let header = |(name, value): (String, String)| {
        let mut value = HeaderValue::from_str(&value).ok()?;
        value.set_sensitive(true);
        Some((HeaderName::from_bytes(name.as_bytes()).ok()?, value))
    };
    pairs(text)?.into_iter().map(header).collect()
}

/// Returns the wrong part of a collector's URL; quotes no part, since it may hold a password.
fn check_url(text: &str) -> Result<(), &'static str> {
    let scheme = text.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
    if !matches!(scheme.as_deref(), Some("http" | "https")) {
        return Err("the scheme must be http:// or https://");
    }
    let url: Uri =
        text.parse().map_err(|_| "it is no URL: a character is not allowed, or no host")?;
    let place = url.authority().filter(|place| !place.host().is_empty());
    match place.ok_or("the host is missing")?.as_str().contains('@') {
        true => Err("the user and the password before the host belong into traces.headers"),
        false => Ok(()),
    }
}

impl Default for TracesConfig {
    fn default() -> Self {
        Self {
            endpoint: None,
            url: None,
            exporter: TraceExporter::Otlp,
            disabled: false,
            protocol: TraceProtocol::HttpProtobuf,
            headers: None,
            timeout: Duration::from_secs(10),
            ca_file: None,
            service_name: None,
            resource_attributes: None,
            sampler: Sampler::ParentBasedAlwaysOn,
            sampler_arg: 1.0,
            client_samples_per_second: 50,
            queue_max: 2048,
            batch_max: 512,
            schedule_delay: Duration::from_secs(5),
            export_timeout: Duration::from_secs(30),
        }
    }
}

fn is_on(config: &Config) -> bool {
    config.traces.target().is_some()
}

/// The keys of this section. The first ones say whether traces are on: only then are the variables of the others read,
/// since a deployment has them for all of its services.
#[rustfmt::skip]
pub const KEYS: &[Key] = &[
    key!(traces.endpoint, Optional(URL), "Base URL of the collector, to which /v1/traces is added. Neither this nor `url` is set: traces are off.").alias("OTEL_EXPORTER_OTLP_ENDPOINT"),
    key!(traces.url, Optional(URL), "URL of the collector as it is; wins over `endpoint`.").alias("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"),
    key!(traces.exporter, OneOf(&[("otlp", TraceExporter::Otlp), ("none", TraceExporter::None)]), "none: traces are off, in spite of a URL.").alias("OTEL_TRACES_EXPORTER"),
    key!(traces.disabled, Switch, "Traces are off, in spite of a URL.").alias("OTEL_SDK_DISABLED"),
    Key {
        explain: |_| Some("must be \"http/protobuf\": OTLP over gRPC or with JSON is not spoken here. Most collectors take http/protobuf on port 4318; give that URL in traces.url (OTEL_EXPORTER_OTLP_TRACES_ENDPOINT)".into()),
        ..key!(traces.protocol, OneOf(&[("http/protobuf", TraceProtocol::HttpProtobuf)]), "Protocol of the collector.").alias_where("OTEL_EXPORTER_OTLP_PROTOCOL", is_on).over("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
    },
    key!(traces.headers, Optional(Secret(HEADERS)), "Headers of each request, such as those with a key of the collector.").alias_where("OTEL_EXPORTER_OTLP_HEADERS", is_on).over("OTEL_EXPORTER_OTLP_TRACES_HEADERS").secret(),
    key!(traces.timeout, Time(10, 300_000), "Time of one request to the collector.").alias_where("OTEL_EXPORTER_OTLP_TIMEOUT", is_on).over("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT").in_ms(),
    key!(traces.ca_file, Optional(FilePath), "Further CA certificates (PEM) for an https:// collector.").alias_where("OTEL_EXPORTER_OTLP_CERTIFICATE", is_on).over("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE"),
    key!(traces.service_name, Optional(NAME), "Name of the service (service.name). Not set: that of `resource_attributes`, else wsproxy.").alias_where("OTEL_SERVICE_NAME", is_on),
    key!(traces.resource_attributes, Optional(ATTRIBUTES), "Attributes of all spans, such as \"deployment.environment.name=prod\".").alias_where("OTEL_RESOURCE_ATTRIBUTES", is_on),
    key!(traces.sampler, OneOf(SAMPLERS), "Rule that chooses the traces to record. parentbased_…: as the caller's traceparent says; the rest of the name is for requests without one.").alias_where("OTEL_TRACES_SAMPLER", is_on),
    key!(traces.sampler_arg, Ratio, "Share of the traces that samplers with a ratio record.").alias_where("OTEL_TRACES_SAMPLER_ARG", is_on),
    key!(traces.client_samples_per_second, Number(0, 1_000_000), "Handshakes per second that are recorded since the client's traceparent asks for it; beyond that they are sampled as those without one. 0: clients cannot ask."),
    key!(traces.queue_max, Number(1, 1_000_000), "Most spans that wait for the collector; further ones are dropped and counted.").alias_where("OTEL_BSP_MAX_QUEUE_SIZE", is_on),
    key!(traces.batch_max, Number(1, 10_000), "Most spans of one request.").alias_where("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", is_on),
    key!(traces.schedule_delay, Time(10, 300_000), "Time for which spans wait until they are sent together.").alias_where("OTEL_BSP_SCHEDULE_DELAY", is_on).in_ms(),
    key!(traces.export_timeout, Time(10, 600_000), "Time of one batch with all attempts; then its spans are dropped and counted.").alias_where("OTEL_BSP_EXPORT_TIMEOUT", is_on).in_ms(),
];

/// URL of a collector.
const URL: Text = Text {
    allowed: "an http:// or https:// URL without a user and a password",
    read: |text| check_url(text).is_ok().then(|| text.to_owned()),
    explain: |text| check_url(text).err().map(str::to_owned),
};

/// Headers of requests.
const HEADERS: Text = Text::new(
    "name=value,name=value, with the characters of values percent-encoded where they are neither letters nor digits",
    |text| read_headers(text).map(|_| text.to_owned()),
);

/// Attributes of all spans.
const ATTRIBUTES: Text = Text::new("name=value,name=value (percent-encoded)", |text| {
    pairs(text).filter(|pairs| pairs.len() <= ATTRIBUTES_MAX).map(|_| text.to_owned())
});

/// Name of the service.
const NAME: Text = Text::new("1 to 255 characters", |text| {
    (1..=255).contains(&text.len()).then(|| text.to_owned())
});

const SAMPLERS: &[(&str, Sampler)] = &[
    ("parentbased_always_on", Sampler::ParentBasedAlwaysOn),
    ("parentbased_always_off", Sampler::ParentBasedAlwaysOff),
    ("parentbased_traceidratio", Sampler::ParentBasedTraceIdRatio),
    ("always_on", Sampler::AlwaysOn),
    ("always_off", Sampler::AlwaysOff),
    ("traceidratio", Sampler::TraceIdRatio),
];

/// Path that is added to the base URL.
const TRACES_PATH: &str = "/v1/traces";

/// Attribute with the name of the service.
const SERVICE_NAME: &str = "service.name";

/// Upper bound of one value of a list of pairs.
const VALUE_BYTES_MAX: usize = 4096;

/// Upper bound of the attributes that an operator gives.
const ATTRIBUTES_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_url_wins_over_the_base() {
        let base = |endpoint: &str| TracesConfig {
            endpoint: Some(endpoint.into()),
            ..TracesConfig::default()
        };
        let url = "http://c:4318/v1/traces";
        assert_eq!(base("http://c:4318").target().as_deref(), Some(url));
        assert_eq!(base("http://c:4318/").target().as_deref(), Some(url));
        assert_eq!(base("http://c/otlp").target().as_deref(), Some("http://c/otlp/v1/traces"));
        let whole = TracesConfig { url: Some("https://d/x".into()), ..base("http://c") };
        assert_eq!(whole.target().as_deref(), Some("https://d/x"));
        assert_eq!(TracesConfig { disabled: true, ..whole }.target(), None);
        let none = TracesConfig { exporter: TraceExporter::None, ..base("http://c") };
        assert_eq!(none.target(), None);
        assert_eq!(TracesConfig::default().target(), None);
    }

    #[test]
    fn headers_and_attributes_are_decoded() {
        let config = TracesConfig {
            headers: Some(SecretString::from("api-key=a%20b, x-tenant = t ,")),
            resource_attributes: Some("service.name=a,team=b%2Cc".into()),
            ..TracesConfig::default()
        };
        let headers = config.headers();
        let headers: Vec<_> =
            headers.iter().map(|(n, v)| (n.as_str(), v.to_str().unwrap())).collect();
        assert_eq!(headers, [("api-key", "a b"), ("x-tenant", "t")]);
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(config.attributes(), [pair("service.name", "a"), pair("team", "b,c")]);
        let named = TracesConfig { service_name: Some("b".into()), ..config };
        assert_eq!(named.attributes()[0], pair("service.name", "b"));
        for bad in ["a", "=b", "a=%ff", "a b=c", "a=%0d%0a"] {
            assert!(read_headers(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn urls_of_collectors_hold_no_password() {
        for good in ["http://localhost:4318", "https://otlp.example/v1/traces?x=1", "HTTP://c"] {
            assert!((URL.read)(good).is_some(), "{good}");
        }
        for bad in ["localhost:4317", "grpc://c", "https://", "http://u:p@c", "http://a b"] {
            assert!((URL.read)(bad).is_none(), "{bad}");
        }
    }
}

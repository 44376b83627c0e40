//! Settings of an operator, as they are written, and their check. `wsproxy` has them in its table of keys; the program
//! `wsproxy-agent` takes them as flags.

use std::{path::PathBuf, sync::Arc, time::Duration};

use clap::ArgAction;
use http::{HeaderValue, Uri, uri::PathAndQuery};
use rustls::{ClientConfig, pki_types::ServerName};
use wsproxy_conn::lane::LaneSettings;
use wsproxy_proto::{
    names::Id,
    tunnel::{lane::LaneConfig, memory::MemoryLimits},
};

use crate::{
    config::{
        AgentConfig, GatewayConfig, HealthConfig, Paths, Service, TokenSource, UpstreamConfig,
        UpstreamTls,
    },
    pauses::Pauses,
    tls,
};

/// Settings, as flags of a command. Each has the name of a key of `[tunnel_agent]`.
#[derive(Clone, clap::Args)]
pub struct Settings {
    /// URL of the gateway, wss://HOST[:PORT].
    #[arg(long, value_name = "URL", env = "WSPROXY_TUNNEL_AGENT__GATEWAY")]
    pub gateway: Option<String>,
    /// Id of the cluster.
    #[arg(long, value_name = "ID", env = "WSPROXY_TUNNEL_AGENT__CLUSTER")]
    pub cluster: Option<String>,
    /// Id of the agent among those of the cluster. Default: the name of the host.
    #[arg(long, value_name = "ID", env = "WSPROXY_TUNNEL_AGENT__AGENT_ID")]
    pub agent_id: Option<String>,
    /// Token for the gateway. No flag, since other users of the machine can read a command line.
    #[arg(skip)]
    pub token: Option<String>,
    /// File with the token for the gateway. It is read again for every lane.
    #[arg(long, value_name = "FILE", env = "WSPROXY_TUNNEL_AGENT__TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
    /// File with the CA certificates (PEM) that wss:// trusts, in place of the system's.
    #[arg(long, value_name = "FILE", env = "WSPROXY_TUNNEL_AGENT__CA_FILE")]
    pub ca_file: Option<PathBuf>,
    /// Allow ws:// to a gateway that is not on this machine: tokens and requests can be read on the way.
    #[arg(long, value_name = "BOOL", default_value_t, action = ArgAction::Set, env = "WSPROXY_TUNNEL_AGENT__ALLOW_INSECURE")]
    pub allow_insecure: bool,
    /// URL of the service that answers requests, https://HOST[:PORT] or http://HOST[:PORT].
    #[arg(long, value_name = "URL", env = "WSPROXY_TUNNEL_AGENT__UPSTREAM")]
    pub upstream: Option<String>,
    /// File with the CA certificates (PEM) that an https:// upstream is checked with, in place of the system's.
    #[arg(long, value_name = "FILE", env = "WSPROXY_TUNNEL_AGENT__UPSTREAM_CA")]
    pub upstream_ca: Option<PathBuf>,
    /// Token for the upstream. No flag, as of `token`.
    #[arg(skip)]
    pub upstream_token: Option<String>,
    /// File with the token that every request to the upstream carries. It is read again when it changes.
    #[arg(long, value_name = "FILE", env = "WSPROXY_TUNNEL_AGENT__UPSTREAM_TOKEN_FILE")]
    pub upstream_token_file: Option<PathBuf>,
    /// File with the certificate (PEM) that the agent shows to the upstream.
    #[arg(long, value_name = "FILE", env = "WSPROXY_TUNNEL_AGENT__UPSTREAM_CERTIFICATE")]
    pub upstream_certificate: Option<PathBuf>,
    /// File with the key of that certificate (PEM).
    #[arg(long, value_name = "FILE", env = "WSPROXY_TUNNEL_AGENT__UPSTREAM_KEY")]
    pub upstream_key: Option<PathBuf>,
    /// Pass the client's Host to the upstream, in place of the upstream's own.
    #[arg(long, value_name = "BOOL", default_value_t, action = ArgAction::Set, env = "WSPROXY_TUNNEL_AGENT__PRESERVE_HOST")]
    pub preserve_host: bool,
    /// Path prefixes that are served, whole segments. Default: all.
    #[arg(
        long,
        value_name = "PATHS",
        value_delimiter = ',',
        env = "WSPROXY_TUNNEL_AGENT__ALLOW_PATHS"
    )]
    pub allow_paths: Vec<String>,
    /// Path prefixes that are not served, even if they are allowed.
    #[arg(
        long,
        value_name = "PATHS",
        value_delimiter = ',',
        env = "WSPROXY_TUNNEL_AGENT__DENY_PATHS"
    )]
    pub deny_paths: Vec<String>,
    /// Path that is asked to see whether the upstream is healthy: any status below 500 is. Empty: only a connection is opened.
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/healthz",
        env = "WSPROXY_TUNNEL_AGENT__HEALTH_PATH"
    )]
    pub health_path: String,
    /// Interval of these probes.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration, env = "WSPROXY_TUNNEL_AGENT__HEALTH_INTERVAL")]
    pub health_interval: Duration,
    /// Compress answers of JSON and text of 16 KiB or more on the way to the gateway, where the client takes gzip.
    #[arg(long, value_name = "BOOL", default_value_t, action = ArgAction::Set, env = "WSPROXY_TUNNEL_AGENT__COMPRESS")]
    pub compress: bool,
    /// Port for metrics, on all addresses and without credentials. Default: none.
    #[arg(long, value_name = "PORT", env = "WSPROXY_TUNNEL_AGENT__METRICS_PORT")]
    pub metrics_port: Option<u16>,
    /// Worker threads; 0: one per core. One carries hundreds of megabytes a second, and tasks on one thread need not wake others.
    #[arg(long, value_name = "NUMBER", default_value_t = 1, env = "WSPROXY_TUNNEL_AGENT__THREADS")]
    pub threads: usize,
    /// Time that requests in flight get when the agent stops.
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = humantime::parse_duration, env = "WSPROXY_TUNNEL_AGENT__DRAIN")]
    pub drain: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            gateway: None,
            cluster: None,
            agent_id: None,
            token: None,
            token_file: None,
            ca_file: None,
            allow_insecure: false,
            upstream: None,
            upstream_ca: None,
            upstream_token: None,
            upstream_token_file: None,
            upstream_certificate: None,
            upstream_key: None,
            preserve_host: false,
            allow_paths: Vec::new(),
            deny_paths: Vec::new(),
            health_path: "/healthz".into(),
            health_interval: Duration::from_secs(10),
            compress: false,
            metrics_port: None,
            threads: 1,
            drain: Duration::from_secs(20),
        }
    }
}

/// Setting that is missing or wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct BadSetting {
    /// Name of the key in `[tunnel_agent]`.
    pub key: &'static str,
    /// Sentence for the operator, without a secret.
    pub problem: String,
}

impl Settings {
    /// Checks all settings, and reads the certificates that they name.
    ///
    /// # Errors
    /// The first setting that is missing or wrong.
    pub fn config(&self) -> Result<AgentConfig, BadSetting> {
        let cluster = given("cluster", self.cluster.as_deref())?;
        let cluster = Id::parse(cluster).map_err(|error| bad("cluster", error.to_string()))?;
        let agent_id = self.agent_id.clone().unwrap_or_else(host_name);
        let agent_id = Id::parse(&agent_id).map_err(|error| bad("agent_id", error.to_string()))?;
        if self.threads > THREADS_MAX {
            return Err(bad("threads", format!("must be at most {THREADS_MAX}")));
        }
        let (upstream, host) = self.upstream()?;
        let paths = Paths::new(&self.allow_paths, &self.deny_paths);
        let paths =
            paths.map_err(|(key, path)| bad(key, format!("{path:?} does not begin with /")))?;
        let cluster = cluster.as_str().to_owned();
        Ok(AgentConfig {
            gateway: self.gateway(&cluster)?,
            agent_id,
            service: Service {
                cluster,
                paths,
                preserve_host: self.preserve_host,
                compresses: self.compress,
                host,
            },
            upstream,
            health: Some(self.health()?),
            metrics_port: self.metrics_port,
            drain: self.drain,
            pauses: Pauses::default(),
            lane: LaneSettings {
                protocol: LaneConfig {
                    build: concat!("wsproxy/", env!("CARGO_PKG_VERSION")).into(),
                    drain_ms: u32::try_from(self.drain.as_millis()).unwrap_or(u32::MAX),
                    ..LaneConfig::default()
                },
                ..LaneSettings::default()
            },
            memory: MemoryLimits::default(),
        })
    }

    fn gateway(&self, cluster: &str) -> Result<GatewayConfig, BadSetting> {
        let url = given("gateway", self.gateway.as_deref())?;
        let Place { is_encrypted, host, port, authority } = place("gateway", url, ["ws", "wss"])?;
        if !is_encrypted && !self.allow_insecure && !is_here(&host) {
            let problem = "ws:// is not encrypted, and the gateway is not on this machine: use wss://, or allow_insecure";
            return Err(bad("gateway", problem));
        }
        let path = format!("/clusters/{cluster}/connect");
        let path = path.parse().map_err(|_| bad("cluster", "cannot stand in a path"))?;
        let token = token("token", self.token.as_deref(), self.token_file.as_ref())?;
        let token = token.ok_or_else(|| bad("token_file", "there is no token for the gateway"))?;
        let tls =
            tls_to(is_encrypted, || tls::client_config(self.ca_file.as_deref(), None), "ca_file")?;
        let timeout = DIAL_TIMEOUT;
        Ok(GatewayConfig { host, port, tls, host_header: authority, path, token, timeout })
    }

    fn upstream(&self) -> Result<(UpstreamConfig, HeaderValue), BadSetting> {
        let url = given("upstream", self.upstream.as_deref())?;
        let Place { is_encrypted, host, port, authority } =
            place("upstream", url, ["http", "https"])?;
        let own = match (&self.upstream_certificate, &self.upstream_key) {
            (Some(certificate), Some(key)) => Some((certificate.as_path(), key.as_path())),
            (None, None) => None,
            (Some(_), None) => {
                return Err(bad("upstream_key", "is missing beside upstream_certificate"));
            }
            (None, Some(_)) => {
                return Err(bad("upstream_certificate", "is missing beside upstream_key"));
            }
        };
        let client = || tls::client_config(self.upstream_ca.as_deref(), own);
        let tls = match tls_to(is_encrypted, client, "upstream_ca")? {
            None => None,
            Some(client) => {
                let name = ServerName::try_from(host.clone());
                let name = name.map_err(|_| bad("upstream", "the host can have no certificate"))?;
                Some(UpstreamTls { client, name })
            }
        };
        let (text, file) = (self.upstream_token.as_deref(), self.upstream_token_file.as_ref());
        let token = token("upstream_token", text, file)?;
        Ok((UpstreamConfig { host, port, tls, token }, authority))
    }

    fn health(&self) -> Result<HealthConfig, BadSetting> {
        let interval = self.health_interval;
        if interval.is_zero() {
            return Err(bad("health_interval", "must be longer than zero"));
        }
        if self.health_path.is_empty() {
            return Ok(HealthConfig { path: None, interval });
        }
        let path = self.health_path.parse::<PathAndQuery>().ok();
        let path = path.filter(|path| path.as_str().starts_with('/'));
        let path =
            path.ok_or_else(|| bad("health_path", "must be a path such as /healthz, or empty"))?;
        Ok(HealthConfig { path: Some(path), interval })
    }
}

/// Place that a URL names.
struct Place {
    is_encrypted: bool,
    host: String,
    port: u16,
    authority: HeaderValue,
}

fn place(key: &'static str, url: &str, [plain, encrypted]: [&str; 2]) -> Result<Place, BadSetting> {
    let form = || bad(key, format!("must be {encrypted}://HOST[:PORT] or {plain}://HOST[:PORT]"));
    let url: Uri = url.parse().map_err(|_| form())?;
    let scheme = url.scheme_str().unwrap_or_default();
    let is_encrypted = scheme.eq_ignore_ascii_case(encrypted);
    let authority = url.authority().ok_or_else(form)?;
    let has_more = !matches!(url.path(), "" | "/") || url.query().is_some();
    let has_user = authority.as_str().contains('@');
    if has_more || has_user || !(is_encrypted || scheme.eq_ignore_ascii_case(plain)) {
        return Err(form());
    }
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    let port = match authority.port() {
        Some(port) => port.as_u16(),
        None if is_encrypted => 443,
        None => 80,
    };
    let authority = HeaderValue::from_str(authority.as_str()).map_err(|_| form())?;
    if host.is_empty() { Err(form()) } else { Ok(Place { is_encrypted, host, port, authority }) }
}

fn token(
    key: &'static str,
    text: Option<&str>,
    file: Option<&PathBuf>,
) -> Result<Option<TokenSource>, BadSetting> {
    match (text, file) {
        (Some(_), Some(_)) => Err(bad(key, "is set beside its file: one of the two must go")),
        (Some(text), None) => {
            let source = TokenSource::of_text(text);
            source.map(Some).map_err(|error| bad(key, error.to_string()))
        }
        (None, file) => Ok(file.cloned().map(TokenSource::File)),
    }
}

fn tls_to(
    is_encrypted: bool,
    config: impl FnOnce() -> Result<Arc<ClientConfig>, String>,
    key: &'static str,
) -> Result<Option<Arc<ClientConfig>>, BadSetting> {
    if !is_encrypted {
        return Ok(None);
    }
    config().map(Some).map_err(|problem| bad(key, problem))
}

/// Returns whether a host is this machine.
fn is_here(host: &str) -> bool {
    let address = host.parse::<std::net::IpAddr>();
    address.map_or_else(|_| host.eq_ignore_ascii_case("localhost"), |address| address.is_loopback())
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn given<'a>(key: &'static str, value: Option<&'a str>) -> Result<&'a str, BadSetting> {
    value.filter(|value| !value.is_empty()).ok_or_else(|| bad(key, "is missing"))
}

fn bad(key: &'static str, problem: impl Into<String>) -> BadSetting {
    BadSetting { key, problem: problem.into() }
}

/// Time for TCP, TLS and the handshake with a gateway.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Upper bound of worker threads, as of the gateway's.
const THREADS_MAX: usize = 1024;

//! `[tunnel_agent]`: the keys of `wsproxy agent`. Their rules are those of the crate `wsproxy-agent`.

use std::{path::PathBuf, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use wsproxy_agent::settings::Settings;

use crate::config::{
    keys::{Key, key},
    kind::{FilePath, List, Number, Optional, Secret, Switch, Text, Time},
    rule,
};

/// `[tunnel_agent]`
#[derive(Debug, Clone)]
pub struct TunnelAgentConfig {
    /// URL of the gateway.
    pub gateway: Option<String>,
    /// Id of the cluster.
    pub cluster: Option<String>,
    /// Id of the agent; `None`: the name of the host.
    pub agent_id: Option<String>,
    /// Token for the gateway.
    pub token: Option<SecretString>,
    /// File with the token for the gateway.
    pub token_file: Option<PathBuf>,
    /// File with the CA certificates for the gateway.
    pub ca_file: Option<PathBuf>,
    /// Allows a gateway that is neither encrypted nor on this machine.
    pub allow_insecure: bool,
    /// URL of the upstream.
    pub upstream: Option<String>,
    /// File with the CA certificates for the upstream.
    pub upstream_ca: Option<PathBuf>,
    /// Token for the upstream.
    pub upstream_token: Option<SecretString>,
    /// File with the token for the upstream.
    pub upstream_token_file: Option<PathBuf>,
    /// File with the agent's certificate for the upstream.
    pub upstream_certificate: Option<PathBuf>,
    /// File with the key of that certificate.
    pub upstream_key: Option<PathBuf>,
    /// Passes the client's `Host` to the upstream.
    pub preserve_host: bool,
    /// Path prefixes that are served; empty: all.
    pub allow_paths: Vec<String>,
    /// Path prefixes that are not served.
    pub deny_paths: Vec<String>,
    /// Path of the probes; empty: only a connection is opened.
    pub health_path: String,
    /// Interval of the probes.
    pub health_interval: Duration,
    /// Compresses answers on their way to the gateway.
    pub compress: bool,
    /// Port for metrics; `None`: there is none.
    pub metrics_port: Option<u16>,
    /// Worker threads; 0: one per core.
    pub threads: usize,
    /// Time for requests in flight when the agent stops.
    pub drain: Duration,
}

impl Default for TunnelAgentConfig {
    fn default() -> Self {
        let Settings { health_path, health_interval, threads, drain, .. } = Settings::default();
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
            health_path,
            health_interval,
            compress: false,
            metrics_port: None,
            threads,
            drain,
        }
    }
}

impl TunnelAgentConfig {
    /// Returns the settings in the type of the agent's crate, which checks them.
    #[must_use]
    pub fn settings(&self) -> Settings {
        let exposed = |secret: &Option<SecretString>| {
            secret.as_ref().map(|secret| secret.expose_secret().to_owned())
        };
        let own = self.clone();
        Settings {
            gateway: own.gateway,
            cluster: own.cluster,
            agent_id: own.agent_id,
            token: exposed(&self.token),
            token_file: own.token_file,
            ca_file: own.ca_file,
            allow_insecure: own.allow_insecure,
            upstream: own.upstream,
            upstream_ca: own.upstream_ca,
            upstream_token: exposed(&self.upstream_token),
            upstream_token_file: own.upstream_token_file,
            upstream_certificate: own.upstream_certificate,
            upstream_key: own.upstream_key,
            preserve_host: own.preserve_host,
            allow_paths: own.allow_paths,
            deny_paths: own.deny_paths,
            health_path: own.health_path,
            health_interval: own.health_interval,
            compress: own.compress,
            metrics_port: own.metrics_port,
            threads: own.threads,
            drain: own.drain,
        }
    }
}

fn filled(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

/// The keys of the section.
#[rustfmt::skip]
pub const KEYS: &[Key] = &[
    key!(tunnel_agent.gateway, Optional(GATEWAY), "URL of the gateway, wss://HOST[:PORT].").flag("gateway", "URL"),
    key!(tunnel_agent.cluster, Optional(rule::SERVER_ID), "Id of the cluster.").flag("cluster", "ID"),
    key!(tunnel_agent.agent_id, Optional(rule::SERVER_ID), "Id of the agent among those of the cluster. Default: the name of the host.").flag("agent-id", "ID"),
    key!(tunnel_agent.token, Optional(Secret(TOKEN)), "Token for the gateway. No flag, since other users of the machine can read a command line.").secret(),
    key!(tunnel_agent.token_file, Optional(FilePath), "File with the token for the gateway. It is read again for every lane.").flag("token-file", "FILE"),
    key!(tunnel_agent.ca_file, Optional(FilePath), "File with the CA certificates (PEM) that wss:// trusts, in place of the system's.").flag("ca-file", "FILE"),
    key!(tunnel_agent.allow_insecure, Switch, "Allow ws:// to a gateway that is not on this machine: tokens and requests can be read on the way.").flag("allow-insecure", "BOOL"),
    key!(tunnel_agent.upstream, Optional(UPSTREAM), "URL of the service that answers requests, https://HOST[:PORT] or http://HOST[:PORT].").flag("upstream", "URL"),
    key!(tunnel_agent.upstream_ca, Optional(FilePath), "File with the CA certificates (PEM) that an https:// upstream is checked with, in place of the system's.").flag("upstream-ca", "FILE"),
    key!(tunnel_agent.upstream_token, Optional(Secret(TOKEN)), "Token for the upstream. No flag, as of `token`.").secret(),
    key!(tunnel_agent.upstream_token_file, Optional(FilePath), "File with the token that every request to the upstream carries. It is read again when it changes.").flag("upstream-token-file", "FILE"),
    key!(tunnel_agent.upstream_certificate, Optional(FilePath), "File with the certificate (PEM) that the agent shows to the upstream.").flag("upstream-certificate", "FILE"),
    key!(tunnel_agent.upstream_key, Optional(FilePath), "File with the key of that certificate (PEM).").flag("upstream-key", "FILE"),
    key!(tunnel_agent.preserve_host, Switch, "Pass the client's Host to the upstream, in place of the upstream's own.").flag("preserve-host", "BOOL"),
    key!(tunnel_agent.allow_paths, List(PATH), "Path prefixes that are served, whole segments. Default: all.").flag("allow-paths", "PATHS"),
    key!(tunnel_agent.deny_paths, List(PATH), "Path prefixes that are not served, even if they are allowed.").flag("deny-paths", "PATHS"),
    key!(tunnel_agent.health_path, HEALTH_PATH, "Path that is asked to see whether the upstream is healthy: any status below 500 is. Empty: only a connection is opened.").flag("health-path", "PATH"),
    key!(tunnel_agent.health_interval, Time(100, 3_600_000), "Interval of these probes.").flag("health-interval", "TIME"),
    key!(tunnel_agent.compress, Switch, "Compress answers of JSON and text of 16 KiB or more on the way to the gateway, where the client takes gzip.").flag("compress", "BOOL"),
    key!(tunnel_agent.metrics_port, Optional(Number(1, 65_535)), "Port for metrics, on all addresses and without credentials. Default: none.").flag("metrics-port", "PORT"),
    key!(tunnel_agent.threads, Number(0, 1024), "Worker threads; 0: one per core. One carries hundreds of megabytes a second, and tasks on one thread need not wake others.").flag("threads", "NUMBER"),
    key!(tunnel_agent.drain, Time(0, 3_600_000), "Time that requests in flight get when the agent stops.").flag("drain", "TIME"),
];

const GATEWAY: Text = Text::new("a URL such as wss://gateway.example", filled);
const UPSTREAM: Text = Text::new("a URL such as https://127.0.0.1:6443", filled);

const TOKEN: Text = Text::new("visible ASCII characters", |text| {
    let text = text.trim();
    (!text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic())).then(|| text.to_owned())
});

const PATH: Text =
    Text::new("a path such as /api/v1", |text| text.starts_with('/').then(|| text.to_owned()));

const HEALTH_PATH: Text = Text::new("a path such as /healthz, or empty", |text| {
    (text.is_empty() || text.starts_with('/')).then(|| text.to_owned())
});

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::Args;

    use super::*;

    #[test]
    fn keys_are_the_flags_of_the_agents_own_program() {
        let program = Settings::augment_args(clap::Command::new("wsproxy-agent"));
        let of_program: BTreeSet<_> = program
            .get_arguments()
            .map(|flag| {
                let text = |value: Option<&clap::builder::StyledStr>| {
                    value.map(ToString::to_string).unwrap_or_default()
                };
                let env = flag.get_env().map(|name| name.to_string_lossy().into_owned());
                let long = flag.get_long().unwrap_or_default().to_owned();
                let value = flag.get_value_names().map(|names| names[0].to_string());
                (long, value.unwrap_or_default(), env.unwrap_or_default(), text(flag.get_help()))
            })
            .collect();
        let of_table: BTreeSet<_> = KEYS
            .iter()
            .filter_map(|key| {
                let flag = key.flag?;
                let help = key.doc.trim_end_matches('.').to_owned();
                Some((flag.name.to_owned(), flag.value.to_owned(), key.env(), help))
            })
            .collect();
        assert_eq!(of_program, of_table);
        let without_flag = KEYS.iter().filter(|key| key.flag.is_none());
        assert!(without_flag.clone().count() == 2 && without_flag.clone().all(|key| key.secret));
    }
}

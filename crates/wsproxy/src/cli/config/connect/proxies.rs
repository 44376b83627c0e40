//! `server.trusted_proxies`, as far as the configuration alone tells whether it can be right.

use ipnet::IpNet;

use super::Finding;
use crate::config::{Config, peer::TrustedProxy};

pub(super) fn examine(config: &Config) -> Vec<Finding> {
    let part = "trusted_proxies";
    let server = &config.server;
    let networks = server.trusted_proxies.iter().filter_map(|proxy| match proxy {
        TrustedProxy::Network(network) => Some(network),
        TrustedProxy::Unix => None,
    });
    let wide: Vec<_> = networks.filter(|network| is_wide(network)).collect();
    if !wide.is_empty() {
        let wide: Vec<_> = wide.into_iter().map(ToString::to_string).collect();
        let what = format!(
            "server.trusted_proxies has {}: any client may name another address, which limits and logs believe",
            wide.join(", ")
        );
        return vec![Finding::error(part, what, "name the addresses of the proxies only")];
    }
    if server.unix.is_some() && server.trusted_proxies.is_empty() {
        let what =
            "server.unix is set and server.trusted_proxies is empty: all clients have one address";
        return vec![Finding::warning(part, what, "server.trusted_proxies = [\"unix:\"]")];
    }
    let bind = server.bind.to_canonical();
    let count = server.trusted_proxies.len();
    let finding = match (count, bind.is_loopback(), config.tls.certificate.is_some()) {
        (0, true, _) => Finding::warning(
            part,
            "server.bind is a loopback address and server.trusted_proxies is empty: behind a proxy on this machine all \
             clients have the address of the proxy, and share its limit of attempts",
            "server.trusted_proxies = [\"127.0.0.1\", \"::1\"] where a proxy is in front",
        ),
        (0, false, true) => Finding::ok(part, "none: clients connect to this port themselves"),
        (0, false, false) => Finding::warning(
            part,
            format!(
                "server.bind is {bind}, without TLS, and server.trusted_proxies is empty: behind a proxy all clients \
                 have its address, and share its limit of attempts; without one, tokens are sent in clear"
            ),
            "name the proxies in server.trusted_proxies, or set [tls] where there is none",
        ),
        _ => {
            let trusted = server.trusted_proxies.iter().map(ToString::to_string);
            Finding::ok(part, format!("trusted: {}", trusted.collect::<Vec<_>>().join(", ")))
        }
    };
    vec![finding]
}

/// Returns whether a network is far larger than those that proxies have.
fn is_wide(network: &IpNet) -> bool {
    match network {
        IpNet::V4(network) => network.prefix_len() < 8,
        IpNet::V6(network) => network.prefix_len() < 16 && !network.addr().is_unique_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    #[test]
    fn lists_that_see_no_proxy_or_every_client_are_told() {
        let level = |bind: &str, networks: &[&str], certificate: Option<&str>| {
            let mut config = Config::default();
            config.server.bind = bind.parse().unwrap();
            config.server.trusted_proxies =
                networks.iter().map(|network| network.parse().unwrap()).collect();
            config.tls.certificate = certificate.map(Into::into);
            examine(&config)[0].level
        };
        assert_eq!(level("0.0.0.0", &[], None), Level::Warning);
        assert_eq!(level("127.0.0.1", &[], None), Level::Warning);
        assert_eq!(level("0.0.0.0", &[], Some("cert.pem")), Level::Ok);
        assert_eq!(level("0.0.0.0", &["10.0.0.0/8"], None), Level::Ok);
        assert_eq!(level("0.0.0.0", &["0.0.0.0/0"], None), Level::Error);
        assert_eq!(level("::", &["10.0.0.1/32", "::/0"], None), Level::Error);
    }
}

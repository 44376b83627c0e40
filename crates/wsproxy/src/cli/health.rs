//! `wsproxy health`: asks a running instance over HTTP, for containers without curl.

use std::{net::SocketAddr, process::ExitCode, time::Duration};

use anyhow::{Context, bail};

use super::{
    http::{self, HttpPlace},
    settings::{CliSettings, Reads},
};
use crate::{
    config::{Config, keys::Key},
    http::listener,
    tls,
};

/// The keys that `health` reads: the address of an instance with the same configuration.
pub(super) struct HealthKeys;

impl Reads for HealthKeys {
    /// An instance goes on with what it has read while its files are replaced, and only it may read its keys.
    const SKIPS_FILES: bool = true;

    fn reads(key: &Key) -> bool {
        let path = key.path();
        let address = ["server.bind", "server.port", "admin.port", "tls.certificate", "tls.admin"];
        address.contains(&path.as_str())
    }
}

/// Arguments of the command.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct HealthArgs {
    /// URL to ask. Default: /health of the configured port on this machine.
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    #[command(flatten)]
    settings: CliSettings<HealthKeys>,
}

/// Returns success if the answer is a 200; else prints the reason to standard error and returns exit code 1.
pub(super) fn run(args: HealthArgs) -> anyhow::Result<ExitCode> {
    let url = match args.url {
        Some(url) => url,
        None => url_of(&args.settings.load()?.config),
    };
    match ask(&url).with_context(|| format!("{url} is not healthy")) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            super::complain(format!("wsproxy: {error:#}\n"));
            Ok(ExitCode::FAILURE)
        }
    }
}

fn url_of(config: &Config) -> String {
    format!("{}/health", own_url(config))
}

/// Returns the URL of the instance with this configuration, as this machine reaches its admin routes.
pub(super) fn own_url(config: &Config) -> String {
    let ip = config.admin.bind.unwrap_or(config.server.bind);
    let port = config.admin.port.unwrap_or(config.server.port);
    let is_encrypted = match config.admin.port {
        Some(_) => config.tls.admin,
        None => config.tls.certificate.is_some(),
    };
    let scheme = if is_encrypted { "https" } else { "http" };
    format!("{scheme}://{}", listener::reachable(SocketAddr::new(ip, port)))
}

fn ask(url: &str) -> anyhow::Result<()> {
    // The answer of this machine is wanted, whichever names its certificate has. The question tells no secret.
    let trust = || Ok(tls::trusting_client_config()?);
    let place = HttpPlace::read(url)?;
    let HttpPlace { host, path, .. } = &place;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    place.exchange(&request, trust, TIMEOUT, |stream| match http::read_status(stream)? {
        200..300 => Ok(()),
        status => bail!("status {status}"),
    })
}

/// Below the usual time limits of container health checks.
const TIMEOUT: Duration = Duration::from_secs(3);

const EXAMPLE: &str = "Example:
  wsproxy health --url http://127.0.0.1:8080/ready && echo ready

The configuration is read for the address only: use the file, variables or flags of serve.";

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener},
    };

    use super::*;

    fn answer(text: &'static str) -> String {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let url = format!("http://{}/health", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                request.extend(byte);
            }
            stream.write_all(text.as_bytes()).unwrap();
        });
        url
    }

    #[test]
    fn only_a_status_of_200_is_healthy() {
        assert!(ask(&answer("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")).is_ok());
        let down = ask(&answer("HTTP/1.1 503 Service Unavailable\r\n\r\n")).unwrap_err();
        assert_eq!(down.to_string(), "status 503");
        assert!(ask(&answer("SSH-2.0-OpenSSH_9.9\r\n")).is_err());
        assert!(ask(&answer("")).is_err());
        assert!(ask("ftp://localhost/").is_err());
    }

    #[test]
    fn the_configured_port_is_asked_on_this_machine() {
        let mut config = Config::default();
        assert_eq!(url_of(&config), "http://127.0.0.1:8080/health");
        config.tls.certificate = Some("cert.pem".into());
        assert_eq!(url_of(&config), "https://127.0.0.1:8080/health");
        config.admin.port = Some(9000);
        assert_eq!(url_of(&config), "http://127.0.0.1:9000/health");
        config.tls.admin = true;
        assert_eq!(url_of(&config), "https://127.0.0.1:9000/health");
        config.tls.admin = false;
        config.admin.bind = Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        assert_eq!(url_of(&config), "http://[::1]:9000/health");
    }
}

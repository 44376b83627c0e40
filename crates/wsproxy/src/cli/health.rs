//! `wsproxy health`: asks a running instance over HTTP, for containers without curl.

use std::{io::Read, process::ExitCode, time::Duration};

use anyhow::{Context, bail};

use super::{
    http::{self, HttpPlace, Question},
    settings::{CliSettings, Reads},
};
use crate::{config::keys::Key, tls};

/// The keys that `health` reads: the address of an instance with the same configuration.
pub(super) struct HealthKeys;

impl Reads for HealthKeys {
    /// An instance goes on with what it has read while its files are replaced, and only it may read its keys.
    const SKIPS_FILES: bool = true;

    fn reads(key: &Key) -> bool {
        let path = key.path();
        let address = [
            "server.bind",
            "server.port",
            "server.unix",
            "server.trusted_proxies",
            "server.proxy_protocol",
            "admin.port",
            "tls.certificate",
            "tls.admin",
        ];
        address.contains(&path.as_str())
    }
}

/// Arguments of the command.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct HealthArgs {
    /// URL to ask; http://unix:/file.sock:/health over a unix socket. Default: /health of the configured port or unix
    /// socket on this machine.
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    #[command(flatten)]
    settings: CliSettings<HealthKeys>,
}

/// Returns success if the answer is a 2xx; else prints the reason to standard error and returns exit code 1.
pub(super) fn run(args: HealthArgs) -> anyhow::Result<ExitCode> {
    let place = match args.url {
        Some(url) => HttpPlace::read(&url).with_context(|| format!("{url} is not healthy")),
        None => Ok(HttpPlace::own(&args.settings.load()?.config).route("/health")),
    };
    let asked =
        place.and_then(|place| ask(&place).with_context(|| format!("{place} is not healthy")));
    match asked {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            super::complain(format!("wsproxy: {error:#}\n"));
            Ok(ExitCode::FAILURE)
        }
    }
}

/// Asks an instance, and looks at the status of its answer.
fn ask(place: &HttpPlace) -> anyhow::Result<()> {
    let question = Question { method: "GET", headers: "", time_max: TIMEOUT };
    // The answer of this machine is wanted, whichever names its certificate has. The question tells no secret.
    let trust = || Ok(tls::trusting_client_config()?);
    place.ask(&question, trust, |stream| match http::read_status(stream)? {
        200..300 => Ok(()),
        status => match told(stream) {
            Some(message) => bail!("status {status}: {message}"),
            None => bail!("status {status}"),
        },
    })
}

/// Returns the message of a refusal, whose status has been read.
fn told(stream: &mut dyn Read) -> Option<String> {
    let mut rest = Vec::new();
    // A connection that breaks, or a deadline, leaves what came before.
    let _ = stream.take(REFUSAL_BYTES_MAX).read_to_end(&mut rest);
    let body = rest.windows(4).position(|end| end == b"\r\n\r\n")?;
    let body: serde_json::Value = serde_json::from_slice(&rest[body + 4..]).ok()?;
    Some(body["error"]["message"].as_str()?.to_owned())
}

/// Upper bound of what is read of a refusal.
const REFUSAL_BYTES_MAX: u64 = 16 * 1024;

/// Below the usual time limits of container health checks.
const TIMEOUT: Duration = Duration::from_secs(3);

const EXAMPLE: &str = "Example:
  wsproxy health --url http://127.0.0.1:8080/ready && echo ready

The configuration is read for the address only: use the file, variables or flags of serve.";

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        net::{Ipv4Addr, TcpListener},
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

    fn asked(url: impl AsRef<str>) -> anyhow::Result<()> {
        ask(&HttpPlace::read(url.as_ref())?)
    }

    #[test]
    fn only_a_status_of_200_is_healthy() {
        assert!(asked(answer("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")).is_ok());
        let down = asked(answer("HTTP/1.1 503 Service Unavailable\r\n\r\n")).unwrap_err();
        assert_eq!(down.to_string(), "status 503");
        let refused = "HTTP/1.1 400 Bad Request\r\n\r\n{\"error\":{\"message\":\"Use https://.\"}}";
        let refused = asked(answer(refused)).unwrap_err();
        assert_eq!(refused.to_string(), "status 400: Use https://.");
        assert!(asked(answer("SSH-2.0-OpenSSH_9.9\r\n")).is_err());
        assert!(asked(answer("")).is_err());
        assert!(asked("ftp://localhost/").is_err());
        assert!(asked("http://unix:/no/such.sock:/health").is_err());
    }

    #[test]
    fn a_port_without_tls_is_told() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let url = format!("https://{}/health", listener.local_addr().unwrap());
        let instance = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
            stream
        });
        let error = asked(&url).unwrap_err();
        assert_eq!(error.to_string(), "the port speaks no TLS: ask with http://");
        drop(instance.join());
    }
}

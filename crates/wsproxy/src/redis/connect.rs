//! Opens a connection: address, TLS, greeting, role. Knows no channels and keeps no state.

use std::{io, path::Path, sync::Arc, time::Duration};

use rustls_pki_types::ServerName;
use secrecy::ExposeSecret;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use crate::{
    config,
    redis::{
        address::{RedisAddress, RedisEndpoint},
        connection::{RedisConnection, Stream},
        fault::Fault,
        resp::{self, RespValue},
    },
    tls,
};

/// Opens connections to one server.
pub(super) struct Connector {
    address: RedisAddress,
    tls: Option<TlsConnector>,
    /// Time limit from the name lookup until the connection can be used.
    timeout: Duration,
}

impl Connector {
    /// Creates a connector and reads certificates for TLS, but opens no connection.
    fn new(
        address: RedisAddress,
        ca_file: Option<&Path>,
        timeout: Duration,
    ) -> Result<Self, String> {
        let tls = match address.endpoint {
            RedisEndpoint::Tcp { tls: true, .. } => {
                Some(TlsConnector::from(Arc::new(tls::client_config(ca_file)?)))
            }
            _ => None,
        };
        Ok(Self { address, tls, timeout })
    }

    /// Creates a connector from the configuration.
    ///
    /// # Errors
    /// The part of the configuration that cannot be used, without quoting the URL.
    pub(super) fn of(config: &config::RedisConfig) -> Result<Self, String> {
        let url = config.url.as_ref().map_or("", |url| url.expose_secret());
        let address = RedisAddress::parse(url).map_err(str::to_owned)?;
        Self::new(address, config.ca_file.as_deref(), config.connect_timeout)
    }

    /// Returns the server's address, for logs.
    pub(super) fn address(&self) -> &RedisAddress {
        &self.address
    }

    /// Opens a connection to a master, with greeting and login done.
    pub(super) async fn connect(&self, name: &str) -> Result<RedisConnection, Fault> {
        let connecting = async {
            let mut connection = RedisConnection::new(self.open().await?);
            self.greet(&mut connection, name).await?;
            Ok(connection)
        };
        tokio::time::timeout(self.timeout, connecting).await.unwrap_or(Err(Fault::ConnectTimeout))
    }

    async fn open(&self) -> io::Result<Box<dyn Stream>> {
        let (host, port) = match &self.address.endpoint {
            RedisEndpoint::Unix(path) => return Ok(Box::new(UnixStream::connect(path).await?)),
            RedisEndpoint::Tcp { host, port, .. } => (host, *port),
        };
        let stream = TcpStream::connect((host.as_str(), port)).await?;
        stream.set_nodelay(true)?;
        // The watchdog finds dead peers; this keeps firewalls from forgetting the connection.
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
        SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
        let Some(tls) = &self.tls else { return Ok(Box::new(stream)) };
        let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
        Ok(Box::new(tls.connect(name, stream).await?))
    }

    async fn greet(&self, connection: &mut RedisConnection, name: &str) -> Result<(), Fault> {
        let mut hello: Vec<&[u8]> = vec![b"HELLO", b"3"];
        if let Some((user, password)) = &self.address.login {
            hello.extend([&b"AUTH"[..], user.as_bytes(), password.as_bytes()]);
        }
        hello.extend([&b"SETNAME"[..], name.as_bytes()]);
        resp::words(&mut connection.output, &hello);
        answer(connection, |hello| {
            let RespValue::Array(pairs) = hello else {
                return Err(Fault::Broken("an odd greeting"));
            };
            let role = pairs.chunks_exact(2).find(|pair| pair[0] == RespValue::Text(b"role"));
            role.and_then(|pair| pair[1].text()).map_or(Ok(()), check_role)
        })
        .await?;
        if self.address.database != 0 {
            resp::words(
                &mut connection.output,
                &[b"SELECT", self.address.database.to_string().as_bytes()],
            );
            answer(connection, |_| Ok(())).await?;
        }
        Ok(())
    }
}

/// Connects to Redis once, as every connection of an instance does, and disconnects.
///
/// # Errors
/// The address of Redis and the reason why it cannot be used, without secrets.
pub(crate) async fn try_once(config: &config::RedisConfig) -> Result<(), String> {
    let connector = Connector::of(config)?;
    let made = connector.connect("wsproxy-trial").await;
    made.map(drop)
        .map_err(|fault| format!("Redis at {} cannot be used: {fault}", connector.address()))
}

/// Refuses servers that are no master: they may miss messages of other publishers, and do not keep writes.
pub(super) fn check_role(role: &[u8]) -> Result<(), Fault> {
    if role == b"master" { Ok(()) } else { Err(Fault::Role(super::fault::tell(role))) }
}

/// Checks the answer to `ROLE`. If the user lacks the permission, the server counts as a master.
pub(super) fn check_role_answer(answer: &RespValue<'_>) -> Result<(), Fault> {
    match answer {
        RespValue::Array(words) => {
            words.first().and_then(RespValue::text).map_or(Ok(()), check_role)
        }
        _ => Ok(()),
    }
}

/// Waits for one reply and checks it.
async fn answer(
    connection: &mut RedisConnection,
    look: impl FnOnce(RespValue<'_>) -> Result<(), Fault>,
) -> Result<(), Fault> {
    loop {
        if let Some(frame) = connection.input.next()? {
            return match RespValue::parse(frame)?.0 {
                RespValue::Error(error) => Err(Fault::greeting(error)),
                value => look(value),
            };
        }
        connection.drive().await?;
    }
}

/// Silence after which the kernel probes the peer.
const KEEPALIVE: Duration = Duration::from_secs(60);

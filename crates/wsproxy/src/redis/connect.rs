//! Opens a connection: address, TLS, greeting, role. Knows no channels and keeps no state.

use std::{io, sync::Arc, time::Duration};

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

/// Opens connections to the servers of one configuration.
pub(super) struct Connector {
    address: RedisAddress,
    sentinel_login: Option<(String, String)>,
    tls: Option<TlsConnector>,
    /// Time limit from the name lookup until the connection can be used.
    timeout: Duration,
}

impl Connector {
    /// Creates a connector from the configuration; reads certificates for TLS, but opens no connection.
    ///
    /// # Errors
    /// The part of the configuration that cannot be used, without quoting the URL.
    pub(super) fn of(config: &config::RedisConfig) -> Result<Self, String> {
        let url = config.url.as_ref().map_or("", |url| url.expose_secret());
        let address = RedisAddress::parse(url).map_err(str::to_owned)?;
        let tls = match address.is_tls() {
            true => {
                let client = tls::client_config(config.ca_file.as_deref())?;
                Some(TlsConnector::from(Arc::new(client)))
            }
            false => None,
        };
        let password =
            config.sentinel_password.as_ref().map(|word| word.expose_secret().to_owned());
        let user = config.sentinel_username.as_deref().unwrap_or("default");
        let sentinel_login = password.map(|password| (user.to_owned(), password));
        Ok(Self { address, sentinel_login, tls, timeout: config.connect_timeout })
    }

    /// Returns the addresses of the configuration.
    pub(super) fn address(&self) -> &RedisAddress {
        &self.address
    }

    /// Returns the time limit of a connection attempt.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Opens a connection to a server, with greeting and login done.
    pub(super) async fn connect(
        &self,
        to: &RedisEndpoint,
        part: Part,
        name: &str,
    ) -> Result<RedisConnection, Fault> {
        let connecting = async {
            let mut connection = RedisConnection::new(self.open(to).await?);
            self.greet(&mut connection, part, name).await?;
            Ok(connection)
        };
        tokio::time::timeout(self.timeout, connecting).await.unwrap_or(Err(Fault::ConnectTimeout))
    }

    async fn open(&self, to: &RedisEndpoint) -> io::Result<Box<dyn Stream>> {
        let (host, port) = match to {
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

    async fn greet(
        &self,
        connection: &mut RedisConnection,
        part: Part,
        name: &str,
    ) -> Result<(), Fault> {
        let (login, database) = match part {
            Part::Master | Part::Node => (&self.address.login, self.address.database),
            Part::Sentinel => (&self.sentinel_login, 0),
        };
        let mut hello: Vec<&[u8]> = vec![b"HELLO", b"3"];
        if let Some((user, password)) = login {
            hello.extend([&b"AUTH"[..], user.as_bytes(), password.as_bytes()]);
        }
        hello.extend([&b"SETNAME"[..], name.as_bytes()]);
        resp::words(&mut connection.output, &hello);
        answer(connection, |hello| {
            let RespValue::Array(pairs) = hello else {
                return Err(Fault::Broken("an odd greeting"));
            };
            let value = |name: &[u8]| {
                let pair = pairs.chunks_exact(2).find(|pair| pair[0] == RespValue::Text(name));
                pair.and_then(|pair| pair[1].text())
            };
            let is_sentinel = value(b"mode") == Some(b"sentinel");
            match (part, is_sentinel) {
                (Part::Sentinel, false) => {
                    Err(Fault::Role("server of data, not a sentinel".into()))
                }
                (Part::Master | Part::Node, true) => Err(Fault::Role("sentinel".into())),
                (Part::Master, false) => value(b"role").map_or(Ok(()), check_role),
                (Part::Node, false) | (Part::Sentinel, true) => Ok(()),
            }
        })
        .await?;
        if database != 0 {
            resp::words(&mut connection.output, &[b"SELECT", database.to_string().as_bytes()]);
            answer(connection, |_| Ok(())).await?;
        }
        Ok(())
    }
}

/// The part that a server plays for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// The master; a replica is refused.
    Master,
    /// A server of data, whatever its role.
    Node,
    /// A sentinel, which has a login of its own and no databases.
    Sentinel,
}

/// Connects to Redis once, as every connection of an instance does, and disconnects.
///
/// # Errors
/// The address of Redis and the reason why it cannot be used, without secrets.
pub(crate) async fn try_once(config: &config::RedisConfig) -> Result<(), String> {
    let connector = Connector::of(config)?;
    let made = connector.connect_master("wsproxy-trial").await;
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

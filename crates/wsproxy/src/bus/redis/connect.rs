//! Opens a link: address, TLS, greeting, role. Knows no channels and keeps nothing.

use std::{io, path::Path, sync::Arc, time::Duration};

use rustls_pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use crate::{
    bus::redis::{
        address::{Address, Place},
        fault::Fault,
        link::{Link, Stream},
        resp::{self, Value},
    },
    tls,
};

/// Opens links to one server.
pub(super) struct Connector {
    address: Address,
    tls: Option<TlsConnector>,
    /// Time for everything until the link can be used.
    timeout: Duration,
}

impl Connector {
    /// Reads certificates, where TLS is wanted, but opens nothing yet.
    pub(super) fn new(
        address: Address,
        ca_file: Option<&Path>,
        timeout: Duration,
    ) -> Result<Self, String> {
        let tls = match address.place {
            Place::Tcp { tls: true, .. } => {
                Some(TlsConnector::from(Arc::new(tls::client_config(ca_file)?)))
            }
            _ => None,
        };
        Ok(Self { address, tls, timeout })
    }

    /// Where the server is, for logs.
    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// A link to a master, greeted and logged in, on which nothing is under way.
    pub(super) async fn connect(&self, name: &str) -> Result<Link, Fault> {
        let connecting = async {
            let mut link = Link::new(self.open().await?);
            self.greet(&mut link, name).await?;
            Ok(link)
        };
        tokio::time::timeout(self.timeout, connecting).await.unwrap_or(Err(Fault::ConnectTimeout))
    }

    async fn open(&self) -> io::Result<Box<dyn Stream>> {
        let (host, port) = match &self.address.place {
            Place::Unix(path) => return Ok(Box::new(UnixStream::connect(path).await?)),
            Place::Tcp { host, port, .. } => (host, *port),
        };
        let stream = TcpStream::connect((host.as_str(), port)).await?;
        stream.set_nodelay(true)?;
        // Our own questions find dead peers; this is for connections that a firewall forgets.
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
        SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
        let Some(tls) = &self.tls else { return Ok(Box::new(stream)) };
        let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
        Ok(Box::new(tls.connect(name, stream).await?))
    }

    async fn greet(&self, link: &mut Link, name: &str) -> Result<(), Fault> {
        let mut hello: Vec<&[u8]> = vec![b"HELLO", b"3"];
        if let Some((user, password)) = &self.address.login {
            hello.extend([&b"AUTH"[..], user.as_bytes(), password.as_bytes()]);
        }
        hello.extend([&b"SETNAME"[..], name.as_bytes()]);
        resp::words(&mut link.output, &hello);
        answer(link, |hello| {
            let Value::Array(pairs) = hello else { return Err(Fault::Broken("an odd greeting")) };
            let role = pairs.chunks_exact(2).find(|pair| pair[0] == Value::Text(b"role"));
            role.and_then(|pair| pair[1].text()).map_or(Ok(()), check_role)
        })
        .await?;
        if self.address.database != 0 {
            resp::words(
                &mut link.output,
                &[b"SELECT", self.address.database.to_string().as_bytes()],
            );
            answer(link, |_| Ok(())).await?;
        }
        Ok(())
    }
}

/// Refuses what is no master: it does not hear what others publish, and would not keep what we write.
pub(super) fn check_role(role: &[u8]) -> Result<(), Fault> {
    if role == b"master" { Ok(()) } else { Err(Fault::Role(super::fault::tell(role))) }
}

/// The same for the answer to `ROLE`. A user who may not ask has to be believed.
pub(super) fn check_role_answer(answer: &Value<'_>) -> Result<(), Fault> {
    match answer {
        Value::Array(words) => words.first().and_then(Value::text).map_or(Ok(()), check_role),
        _ => Ok(()),
    }
}

/// Waits for one reply and looks at it.
async fn answer(
    link: &mut Link,
    look: impl FnOnce(Value<'_>) -> Result<(), Fault>,
) -> Result<(), Fault> {
    loop {
        if let Some(frame) = link.input.next()? {
            return match Value::parse(frame)?.0 {
                Value::Error(error) => Err(Fault::greeting(error)),
                value => look(value),
            };
        }
        link.drive().await?;
    }
}

/// Silence after which the kernel asks whether the peer is still there.
const KEEPALIVE: Duration = Duration::from_secs(60);

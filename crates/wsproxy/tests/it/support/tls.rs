//! A certificate of a test, and clients of a port that speaks TLS.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use rcgen::generate_simple_self_signed;
use rustls::{
    ClientConfig, RootCertStore, SupportedProtocolVersion,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use wsproxy::config::{Config, TlsConfig};

/// A certificate and its key.
#[derive(Clone)]
pub struct Made {
    /// The certificate, as PEM.
    pub certificate: String,
    /// The key, as PEM.
    pub key: String,
}

/// A folder with the files of a certificate and its key.
pub struct Files(TempDir);

/// A local port in front of one that speaks TLS: what a test's client says in plain arrives encrypted.
pub struct Tunnel {
    /// Where it listens.
    pub address: SocketAddr,
    /// Connections that the server ended without the alert that tells the end of the stream.
    pub cut_off: Arc<AtomicUsize>,
}

impl Made {
    /// Makes a pair for `localhost`.
    pub fn new() -> Self {
        let made = generate_simple_self_signed(["localhost".into()]).unwrap();
        Self { certificate: made.cert.pem(), key: made.signing_key.serialize_pem() }
    }

    /// A client's configuration that trusts only this certificate.
    pub fn client(&self, versions: &[&'static SupportedProtocolVersion]) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.certificate.as_bytes()).unwrap()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(versions)
            .unwrap();
        Arc::new(config.with_root_certificates(roots).with_no_client_auth())
    }

    /// The same for the newest version.
    pub fn trust(&self) -> Arc<ClientConfig> {
        self.client(&[&rustls::version::TLS13])
    }
}

impl Files {
    /// Files with a pair.
    pub fn new(made: &Made) -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        files.write(&made.certificate, &made.key);
        files
    }

    /// Replaces both files.
    pub fn write(&self, certificate: &str, key: &str) {
        for (path, text) in [(self.certificate(), certificate), (self.key(), key)] {
            let new = path.with_extension("new");
            std::fs::write(&new, text).unwrap();
            std::fs::rename(new, path).unwrap();
        }
    }

    /// Where the certificate is.
    pub fn certificate(&self) -> PathBuf {
        self.0.path().join("cert.pem")
    }

    /// Where the key is.
    pub fn key(&self) -> PathBuf {
        self.0.path().join("key.pem")
    }

    /// Makes the clients' port speak TLS.
    pub fn put_into(&self, config: &mut Config) {
        let (certificate, key) = (Some(self.certificate()), Some(self.key()));
        config.tls = TlsConfig { certificate, key, ..TlsConfig::default() };
    }
}

impl Tunnel {
    /// A tunnel to `target`, which shows a certificate that `config` trusts.
    pub async fn to(target: SocketAddr, config: Arc<ClientConfig>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let cut_off = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&cut_off);
        tokio::spawn(async move {
            while let Ok((plain, _)) = listener.accept().await {
                let (config, counter) = (Arc::clone(&config), Arc::clone(&counter));
                tokio::spawn(async move {
                    plain.set_nodelay(true).unwrap();
                    let Ok(tls) = connect(target, config).await else { return };
                    carry(plain, tls, &counter).await;
                });
            }
        });
        Self { address, cut_off }
    }
}

/// Copies in both directions, with little room, until one of them ends.
async fn carry(plain: TcpStream, tls: TlsStream<TcpStream>, cut_off: &AtomicUsize) {
    let (mut from_client, mut to_client) = plain.into_split();
    let (mut from_server, mut to_server) = tokio::io::split(tls);
    let up = async {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from_client.read(&mut buffer).await {
            if to_server.write_all(&buffer[..count]).await.is_err() {
                return;
            }
            // An error means that the server left, which reading finds too.
            let _ = to_server.flush().await;
        }
        let _ = to_server.shutdown().await;
    };
    let down = async {
        let mut buffer = [0; 4096];
        loop {
            match from_server.read(&mut buffer).await {
                Ok(0) => break,
                Ok(count) if to_client.write_all(&buffer[..count]).await.is_err() => return,
                Ok(_) => {}
                Err(_) => {
                    cut_off.fetch_add(1, SeqCst);
                    break;
                }
            }
        }
        let _ = to_client.shutdown().await;
    };
    tokio::join!(up, down);
}

/// Connects with a small receive window, and goes through the handshake.
pub async fn connect(
    target: SocketAddr,
    config: Arc<ClientConfig>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(16 * 1024)?;
    let socket = socket.connect(target).await?;
    socket.set_nodelay(true)?;
    TlsConnector::from(config).connect(ServerName::try_from("localhost").unwrap(), socket).await
}

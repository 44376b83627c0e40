//! TLS to the gateway and to the upstream.

use std::{io::Write, sync::Arc};

use rcgen::{CertifiedKey, KeyPair, generate_simple_self_signed};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tempfile::NamedTempFile;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;
use wsproxy_proto::tunnel::code::Code;

use crate::{
    gateway::Gateway,
    support::{Agent, Bench, code, config, head, read_all, settings, within},
    upstream::Upstream,
};

/// Certificate with its key, as files.
struct Pair {
    certificate: NamedTempFile,
    key: NamedTempFile,
}

impl Pair {
    fn new() -> Self {
        let CertifiedKey::<KeyPair> { cert, signing_key } =
            generate_simple_self_signed(["localhost".into()]).unwrap();
        let file = |text: String| {
            let mut file = NamedTempFile::new().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            file
        };
        Self { certificate: file(cert.pem()), key: file(signing_key.serialize_pem()) }
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.certificate.path()).unwrap()).unwrap();
        roots
    }

    /// Configuration of a server that asks for the certificate of `client`.
    fn server(&self, client: Option<&Self>) -> Arc<ServerConfig> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = match client {
            None => builder.with_no_client_auth(),
            Some(client) => {
                let roots = Arc::new(client.roots());
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
                builder.with_client_cert_verifier(verifier.build().unwrap())
            }
        };
        let certificate = CertificateDer::from_pem_file(self.certificate.path()).unwrap();
        let key = PrivateKeyDer::from_pem_file(self.key.path()).unwrap();
        Arc::new(builder.with_single_cert(vec![certificate], key).unwrap())
    }
}

/// Answers one request over TLS, and ends the connection without the end of TLS if `is_cut`.
async fn answer(upstream: &Upstream, tls: Arc<ServerConfig>, answer: &str, is_cut: bool) {
    let (socket, _) = within(upstream.listener.accept()).await.unwrap();
    let mut stream = within(TlsAcceptor::from(tls).accept(socket)).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(within(stream.read_u8()).await.unwrap());
    }
    stream.write_all(answer.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    if !is_cut {
        stream.shutdown().await.unwrap();
    }
}

#[tokio::test]
async fn an_upstream_is_known_by_its_certificate_and_knows_the_agents() {
    let (theirs, ours) = (Pair::new(), Pair::new());
    let bench = Bench::with(|settings| {
        let port = settings.upstream.as_deref().unwrap().rsplit_once(':').unwrap().1;
        settings.upstream = Some(format!("https://localhost:{port}"));
        settings.upstream_ca = Some(theirs.certificate.path().into());
        settings.upstream_certificate = Some(ours.certificate.path().into());
        settings.upstream_key = Some(ours.key.path().into());
    })
    .await;
    let tls = theirs.server(Some(&ours));
    let mut stream = bench.get("/");
    let whole = "HTTP/1.1 200 x\r\nContent-Length: 4\r\n\r\nsafe";
    answer(&bench.upstream, Arc::clone(&tls), whole, false).await;
    assert_eq!(head(&mut stream).await.status, 200);
    assert_eq!(read_all(&mut stream).await.unwrap().0, b"safe");

    // A body whose end is that of its connection is whole only with the end of TLS.
    let mut stream = bench.get("/");
    answer(&bench.upstream, tls, "HTTP/1.0 200 x\r\n\r\npart", true).await;
    head(&mut stream).await;
    read_all(&mut stream).await.unwrap_err();
}

#[tokio::test]
async fn an_upstream_with_another_certificate_is_not_asked() {
    let (theirs, other) = (Pair::new(), Pair::new());
    let bench = Bench::with(|settings| {
        let port = settings.upstream.as_deref().unwrap().rsplit_once(':').unwrap().1;
        settings.upstream = Some(format!("https://localhost:{port}"));
        settings.upstream_ca = Some(other.certificate.path().into());
    })
    .await;
    let mut stream = bench.get("/");
    let (socket, _) = within(bench.upstream.listener.accept()).await.unwrap();
    let accepted = TlsAcceptor::from(theirs.server(None)).accept(socket).await;
    assert!(accepted.is_err());
    assert_eq!(code(&mut stream).await, Code::UpstreamTls);
}

#[tokio::test]
async fn a_gateway_is_dialled_with_tls() {
    let pair = Pair::new();
    let gateway = Gateway::with_tls(pair.server(None)).await;
    let upstream = Upstream::new().await;
    let mut settings = settings(gateway.port, upstream.port);
    settings.gateway = Some(format!("wss://localhost:{}", gateway.port));
    settings.ca_file = Some(pair.certificate.path().into());
    let agent = Agent::new(config(&settings));
    let lane = gateway.lane().await;
    let bench = Bench { gateway, lane, upstream, agent };
    let mut stream = bench.get("/");
    let (_, mut upstream) = bench.upstream.request().await;
    upstream.write("HTTP/1.1 204 x\r\n\r\n").await;
    assert_eq!(head(&mut stream).await.status, 204);
}

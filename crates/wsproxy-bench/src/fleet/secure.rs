//! A client's end of TLS, as bytes in and out; knows no socket. It trusts every server, so that it costs little.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Result;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme};

/// The encryption of one connection.
#[derive(Debug)]
pub(crate) struct Secure(ClientConnection);

/// Returns the configuration of all clients. Each handshake is a full one.
///
/// # Errors
/// The provider of cryptography cannot be used.
pub(crate) fn config() -> Result<Arc<ClientConfig>> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = Arc::new(Trusting(Arc::clone(&provider)));
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

impl Secure {
    pub(crate) fn new(config: &Arc<ClientConfig>, server: SocketAddr) -> Result<Self, Error> {
        let name = ServerName::IpAddress(server.ip().into());
        let mut tls = ClientConnection::new(Arc::clone(config), name)?;
        tls.set_buffer_limit(None);
        Ok(Self(tls))
    }

    /// Encrypts bytes. Before the end of the handshake they wait for it.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Vec<u8> {
        // There is no limit, so that this cannot fail.
        let _ = self.0.writer().write_all(bytes);
        self.outgoing()
    }

    /// Returns what is to be sent.
    pub(crate) fn outgoing(&mut self) -> Vec<u8> {
        let mut outgoing = Vec::new();
        while self.0.wants_write() && self.0.write_tls(&mut outgoing).is_ok() {}
        outgoing
    }

    /// Decrypts bytes, and adds what they hold to `plain`.
    ///
    /// # Errors
    /// They are not TLS.
    pub(crate) fn read(&mut self, mut bytes: &[u8], plain: &mut Vec<u8>) -> Result<(), Error> {
        while !bytes.is_empty() {
            if self.0.read_tls(&mut bytes).map_err(|error| Error::General(error.to_string()))? == 0
            {
                return Ok(());
            }
            let state = self.0.process_new_packets()?;
            let start = plain.len();
            plain.resize(start + state.plaintext_bytes_to_read(), 0);
            let read = self.0.reader().read(&mut plain[start..]).unwrap_or(0);
            plain.truncate(start + read);
        }
        Ok(())
    }
}

/// Verifier that asks for no name, no authority and no signature.
#[derive(Debug)]
struct Trusting(Arc<CryptoProvider>);

impl ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

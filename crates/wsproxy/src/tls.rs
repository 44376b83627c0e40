//! TLS: of the instance's own connections to servers, and of its listeners. Knows no protocol above it.

use std::{path::Path, sync::Arc};

use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject};

pub mod pair;

/// Returns a configuration that trusts the system's authorities and those in `ca_file`.
///
/// # Errors
/// A sentence for the operator: the file cannot be read, or holds no certificate.
pub(crate) fn client_config(ca_file: Option<&Path>) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(path) = ca_file {
        add_authorities(&mut roots, path)?;
    }
    // Named explicitly: the process may have another default, or none.
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// Returns a configuration that trusts any certificate. For questions without a secret, to this machine.
///
/// # Errors
/// The provider of cryptography cannot be used.
pub(crate) fn trusting_client_config() -> Result<ClientConfig, Error> {
    verified_by(None)
}

/// Returns a configuration that trusts the certificate in a file, and no other: that of an instance on this machine.
///
/// # Errors
/// A sentence for the operator: the file cannot be used.
pub(crate) fn pinned_client_config(certificate: &Path) -> Result<ClientConfig, String> {
    let read = CertificateDer::from_pem_file(certificate);
    let read =
        read.map_err(|error| format!("{} cannot be read: {error}", certificate.display()))?;
    verified_by(Some(read)).map_err(|error| error.to_string())
}

fn verified_by(pinned: Option<CertificateDer<'static>>) -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = Trusting { algorithms: provider.signature_verification_algorithms, pinned };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    Ok(config.with_no_client_auth())
}

/// Verifier that asks for no name and no authority.
#[derive(Debug)]
struct Trusting {
    algorithms: WebPkiSupportedAlgorithms,
    /// The only certificate that is trusted; `None`: all are.
    pinned: Option<CertificateDer<'static>>,
}

impl ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match &self.pinned {
            Some(pinned) if pinned != shown => {
                Err(Error::General("the server shows another certificate".into()))
            }
            _ => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Checks that a file of authorities can be used.
///
/// # Errors
/// See [`client_config`].
pub(crate) fn check_ca_file(path: &Path) -> Result<(), String> {
    add_authorities(&mut RootCertStore::empty(), path)
}

fn add_authorities(roots: &mut RootCertStore, path: &Path) -> Result<(), String> {
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| format!("the CA file {} cannot be read: {error}", path.display()))?;
    if certificates.is_empty() {
        return Err(format!("the CA file {} holds no certificate", path.display()));
    }
    for certificate in certificates {
        roots
            .add(certificate)
            .map_err(|error| format!("the CA file {} cannot be used: {error}", path.display()))?;
    }
    Ok(())
}

//! TLS: of the instance's own connections to servers, and of its listeners. Knows no protocol above it.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
    sync::Arc,
};

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
    trusting(roots)
}

/// Returns a configuration that trusts the authorities in a file, and no others.
///
/// # Errors
/// A sentence for the operator: the file cannot be read, or holds no certificate.
pub(crate) fn private_client_config(ca_file: &Path) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    add_authorities(&mut roots, ca_file)?;
    trusting(roots)
}

fn trusting(roots: RootCertStore) -> Result<ClientConfig, String> {
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
    let text = read_file(path)
        .map_err(|error| format!("the CA file {} cannot be read: {error}", path.display()))?;
    // The error of PEM quotes the file, which may be another one, with a secret.
    let certificates = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| format!("the CA file {} is not PEM", path.display()))?;
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

/// Reads a file of certificates or of a key.
///
/// # Errors
/// The file cannot be read, is larger than any such file, or is none: a pipe gives its bytes once, and may block for ever.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let is_file = |found: std::fs::Metadata| match (found.is_file(), found.is_dir()) {
        (true, _) => Ok(()),
        (_, true) => Err(io::Error::other("it is a directory")),
        _ => Err(io::Error::other("it is no regular file")),
    };
    // Before it is opened, since that alone blocks at a pipe.
    is_file(path.metadata()?)?;
    let mut bytes = Vec::new();
    File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::other(format!("it is larger than {FILE_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

/// Upper bound of a file's size: more than any list of certificates has.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ca_file_that_is_none_is_named_and_not_quoted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        let problem = |path: &Path| check_ca_file(path).unwrap_err();
        assert!(problem(&path).contains("cannot be read: No such file"));
        for text in [
            "-----BEGIN secret words\n",
            "-----BEGIN CERTIFICATE-----\nsecret?\n-----END CERTIFICATE-----\n",
        ] {
            std::fs::write(&path, text).unwrap();
            let problem = problem(&path);
            assert!(problem.ends_with("is not PEM") && !problem.contains("secret"), "{problem}");
        }
        std::fs::write(&path, "secret").unwrap();
        assert!(problem(&path).ends_with("holds no certificate"));
        std::fs::write(&path, vec![b' '; FILE_BYTES_MAX as usize + 1]).unwrap();
        assert!(problem(&path).contains("larger than"));
        assert!(problem(folder.path()).ends_with("cannot be read: it is a directory"));
        assert!(problem(Path::new("/dev/null")).ends_with("cannot be read: it is no regular file"));
    }
}

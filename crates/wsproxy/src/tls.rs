//! Encryption of the instance's own connections to servers; knows no protocol above TLS.

use std::{path::Path, sync::Arc};

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, pem::PemObject};

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

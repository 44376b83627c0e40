//! TLS of the connections that the agent opens. Knows no protocol above it.

use std::{path::Path, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

/// Returns a configuration that trusts the authorities in `ca_file`, or those of the system, and shows the certificate
/// of `own`, a file of certificates and one of their key.
///
/// # Errors
/// A sentence for the operator: a file cannot be read, or has another content.
pub(crate) fn client_config(
    ca_file: Option<&Path>,
    own: Option<(&Path, &Path)>,
) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        Some(path) => {
            let (added, _) = roots.add_parsable_certificates(certificates(path)?);
            if added == 0 {
                return Err(format!("{} holds no certificate", path.display()));
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    // Named explicitly: the process may have another default, or none.
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots);
    let config = match own {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let read = PrivateKeyDer::from_pem_file(key);
            let read =
                read.map_err(|error| format!("{} cannot be read: {error}", key.display()))?;
            let chain = certificates(certificate)?;
            let config = config.with_client_auth_cert(chain, read);
            config.map_err(|error| format!("{} cannot be used: {error}", certificate.display()))?
        }
    };
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    read.map_err(|error| format!("{} cannot be read: {error}", path.display()))
}

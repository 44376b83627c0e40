//! Certificate and key of the listeners, read again when their files change. Knows no sockets.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use aws_lc_rs::digest::{SHA256, digest};
use parking_lot::{Mutex, RwLock};
use rustls::{CipherSuite, ServerConfig, crypto::aws_lc_rs::Ticketer, server::ProducesTickets};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tracing::{info, warn};

use crate::tls::read_file;

/// The pair of a certificate and its key that the listeners show, with the files that it comes from.
pub struct TlsPair {
    /// Keys of session tickets, which outlive a replaced pair.
    tickets: Arc<dyn ProducesTickets>,
    /// Guards the pair in use.
    in_use: RwLock<InUse>,
    /// Guards the files and what looks at them found. A look holds it to its end, so that a reload of the configuration
    /// never meets half of one.
    looks: Mutex<Looks>,
}

struct Looks {
    certificate: PathBuf,
    key: PathBuf,
    /// Pair that the last look found, where it was another one than that in use.
    found: Option<Fingerprint>,
    /// Present problem of the files.
    trouble: Option<Trouble>,
}

/// A pair that can be used, with its files.
pub struct NewPair {
    certificate: PathBuf,
    key: PathBuf,
    in_use: InUse,
}

struct InUse {
    config: Arc<ServerConfig>,
    fingerprint: Fingerprint,
}

/// Hashes of both files.
#[derive(Clone, PartialEq, Eq)]
struct Fingerprint([Vec<u8>; 2]);

/// Result of a look at files that can be used.
#[derive(PartialEq, Eq)]
enum Look {
    /// They hold the pair in use.
    Same,
    /// They hold another pair. Its chain may be written in part: the issuers of the certificate come last.
    First,
    /// They hold the pair of the look before, which is in use now.
    Second,
}

struct Trouble {
    problem: String,
    is_told: bool,
}

/// Contents of both files.
struct Files {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl fmt::Debug for TlsPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsPair").finish_non_exhaustive()
    }
}

impl TlsPair {
    /// Reads the pair from its files.
    ///
    /// # Errors
    /// A sentence for the operator: a file cannot be used, or the key is of another certificate.
    pub fn load(certificate: &Path, key: &Path) -> Result<Self, String> {
        let tickets = Ticketer::new().map_err(|error| format!("session tickets: {error}"))?;
        let NewPair { certificate, key, in_use } = NewPair::read(certificate, key, &tickets)?;
        let looks = Mutex::new(Looks { certificate, key, found: None, trouble: None });
        Ok(Self { tickets, in_use: RwLock::new(in_use), looks })
    }

    /// Reads a pair from its files, for [`Self::replace`]. Blocks.
    ///
    /// # Errors
    /// See [`Self::load`].
    pub fn read(&self, certificate: &Path, key: &Path) -> Result<NewPair, String> {
        NewPair::read(certificate, key, &self.tickets)
    }

    /// Returns whether a pair is another one than that in use.
    #[must_use]
    pub fn differs(&self, pair: &NewPair) -> bool {
        self.in_use.read().fingerprint != pair.in_use.fingerprint
    }

    /// Uses a pair, and looks at its files from now on.
    pub fn replace(&self, NewPair { certificate, key, in_use }: NewPair) {
        *self.looks.lock() = Looks { certificate, key, found: None, trouble: None };
        *self.in_use.write() = in_use;
    }

    /// Returns the configuration for a new connection. Open connections keep the one that they began with.
    #[must_use]
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.in_use.read().config)
    }

    /// Reads the files again, and uses the pair that they hold. Returns whether they turned out to be useless: then the
    /// pair stays as it was. Blocks.
    ///
    /// A pair is used, and a problem told, at the second look that finds it, since files are not replaced at one moment.
    pub fn read_again(&self) -> bool {
        let mut looks = self.looks.lock();
        // A pipe gives its bytes once, and blocks for ever at the next read.
        let is_pipe = |path: &PathBuf| path.metadata().is_ok_and(|found| !found.is_file());
        if [&looks.certificate, &looks.key].into_iter().any(is_pipe) {
            return false;
        }
        let files = Files::read(&looks.certificate, &looks.key);
        match files.and_then(|files| self.look(&files, &mut looks)) {
            Ok(Look::First) => false,
            Ok(look) => {
                let was_told = looks.trouble.take().is_some_and(|trouble| trouble.is_told);
                if look == Look::Second || was_told {
                    info!(certificate = %looks.certificate.display(), "The TLS certificate and its key were read again.");
                }
                false
            }
            Err(problem) => looks.is_news(problem),
        }
    }

    /// Uses the pair in `files` where the look before found it too.
    fn look(&self, files: &Files, looks: &mut Looks) -> Result<Look, String> {
        let fingerprint = files.fingerprint();
        let before = looks.found.take();
        if self.in_use.read().fingerprint == fingerprint {
            return Ok(Look::Same);
        }
        let config = Arc::new(files.config(Arc::clone(&self.tickets))?);
        if before.as_ref() != Some(&fingerprint) {
            looks.found = Some(fingerprint);
            return Ok(Look::First);
        }
        *self.in_use.write() = InUse { config, fingerprint };
        Ok(Look::Second)
    }
}

impl NewPair {
    fn read(
        certificate: &Path,
        key: &Path,
        tickets: &Arc<dyn ProducesTickets>,
    ) -> Result<Self, String> {
        let files = Files::read(certificate, key)?;
        let config = files.config(Arc::clone(tickets))?;
        let in_use = InUse { config: Arc::new(config), fingerprint: files.fingerprint() };
        Ok(Self { certificate: certificate.to_owned(), key: key.to_owned(), in_use })
    }

    /// Returns whether the files still hold this pair. Blocks.
    #[must_use]
    pub fn has_settled(&self) -> bool {
        let files = Files::read(&self.certificate, &self.key);
        files.is_ok_and(|files| files.fingerprint() == self.in_use.fingerprint)
    }
}

impl Looks {
    /// Remembers a problem, and logs it at its second look. Returns whether it was logged now.
    fn is_news(&mut self, problem: String) -> bool {
        let Some(known) = self.trouble.as_mut().filter(|known| known.problem == problem) else {
            self.trouble = Some(Trouble { problem, is_told: false });
            return false;
        };
        if std::mem::replace(&mut known.is_told, true) {
            return false;
        }
        warn!(
            error = known.problem,
            certificate = %self.certificate.display(),
            key = %self.key.display(),
            "The files of the TLS certificate and its key cannot be used: the pair stays as it was."
        );
        true
    }
}

impl Files {
    fn read(certificate: &Path, key: &Path) -> Result<Self, String> {
        Ok(Self { certificate: read("certificate", certificate)?, key: read("key", key)? })
    }

    fn fingerprint(&self) -> Fingerprint {
        let hash = |bytes: &[u8]| digest(&SHA256, bytes).as_ref().to_vec();
        Fingerprint([hash(&self.certificate), hash(&self.key)])
    }

    /// Makes a configuration for TLS 1.2 and 1.3. An error quotes neither file: one may be in the other's place.
    fn config(&self, tickets: Arc<dyn ProducesTickets>) -> Result<ServerConfig, String> {
        let chain = CertificateDer::pem_slice_iter(&self.certificate)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| "the file of the TLS certificate is not PEM")?;
        if chain.is_empty() {
            return Err("the file of the TLS certificate holds no certificate".into());
        }
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(
            |_| "the file of the TLS key holds no private key in PEM form, without a password",
        )?;
        // Named explicitly: the process may have another default, or none.
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        provider.cipher_suites.sort_by_key(|suite| !is_aes_128(suite.suite()));
        let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(unusable)?;
        config.ignore_client_order = true;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        config.ticketer = tickets;
        Ok(config)
    }
}

fn read(what: &str, path: &Path) -> Result<Vec<u8>, String> {
    read_file(path).map_err(|error| {
        format!("the file of the TLS {what} cannot be read, {}: {error}", path.display())
    })
}

/// Returns whether a cipher suite is one with AES-128, which costs the least processor time here and which browsers prefer.
fn is_aes_128(suite: CipherSuite) -> bool {
    use CipherSuite::{
        TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
        TLS13_AES_128_GCM_SHA256,
    };
    matches!(
        suite,
        TLS13_AES_128_GCM_SHA256
            | TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
            | TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
    )
}

fn unusable(error: rustls::Error) -> String {
    match error {
        rustls::Error::InconsistentKeys(_) => "the TLS key is not that of the certificate".into(),
        error => format!("the TLS certificate and its key cannot be used: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn write(&self, certificate: &str, key: &str) {
            std::fs::write(self.path("cert.pem"), certificate).unwrap();
            std::fs::write(self.path("key.pem"), key).unwrap();
        }
    }

    fn made(name: &str) -> (String, String) {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    #[test]
    fn a_good_pair_is_used_and_a_bad_one_is_not() {
        let folder = Folder(tempfile::tempdir().unwrap());
        let ((old, old_key), (new, new_key)) = (made("old.example"), made("new.example"));
        folder.write(&old, &old_key);
        let pair = TlsPair::load(&folder.path("cert.pem"), &folder.path("key.pem")).unwrap();
        let first = pair.config();
        let is_first = || Arc::ptr_eq(&first, &pair.config());
        assert!(!pair.read_again() && is_first(), "nothing changed");
        for (certificate, key) in [
            (&*new, &*old_key),
            (&new[..new.len() / 2], &new_key),
            (&new, &new_key[..new_key.len() / 2]),
            ("", &new_key),
            (&new, ""),
        ] {
            folder.write(certificate, key);
            assert!(!pair.read_again(), "the other file may be on its way");
            assert!(pair.read_again(), "told at the second look");
            assert!(!pair.read_again() && is_first(), "and told once");
        }
        std::fs::remove_file(folder.path("key.pem")).unwrap();
        assert!(!pair.read_again() && pair.read_again() && is_first());
        folder.write(&new, &new_key);
        assert!(!pair.read_again() && is_first(), "it may be written in part");
        assert!(!pair.read_again() && !is_first());
    }

    #[test]
    fn a_chain_that_is_still_written_is_not_used() {
        let folder = Folder(tempfile::tempdir().unwrap());
        let ((old, old_key), (new, new_key)) = (made("old.example"), made("new.example"));
        folder.write(&old, &old_key);
        let pair = TlsPair::load(&folder.path("cert.pem"), &folder.path("key.pem")).unwrap();
        let first = pair.config();
        let is_first = || Arc::ptr_eq(&first, &pair.config());
        // The certificate alone, then with one issuer, then with both.
        for chain in [new.clone(), format!("{new}{old}"), format!("{new}{old}{old}")] {
            folder.write(&chain, &new_key);
            assert!(!pair.read_again() && is_first());
        }
        assert!(!pair.read_again() && !is_first(), "nothing was added since");
        let used = pair.config();
        assert!(!pair.read_again() && Arc::ptr_eq(&used, &pair.config()));
    }

    #[test]
    fn a_reloaded_pair_is_used_at_once_and_its_files_are_read_again() {
        let folder = Folder(tempfile::tempdir().unwrap());
        let ((old, old_key), (new, new_key)) = (made("old.example"), made("new.example"));
        folder.write(&old, &old_key);
        let paths = |name: &str| {
            (folder.path(&format!("{name}cert.pem")), folder.path(&format!("{name}key.pem")))
        };
        let (certificate, key) = paths("");
        let pair = TlsPair::load(&certificate, &key).unwrap();
        assert!(!pair.differs(&pair.read(&certificate, &key).unwrap()));
        let (certificate, key) = paths("new-");
        std::fs::write(&certificate, &new).unwrap();
        assert!(pair.read(&certificate, &key).is_err(), "no key");
        std::fs::write(&key, &new_key).unwrap();
        let next = pair.read(&certificate, &key).unwrap();
        assert!(pair.differs(&next));
        pair.replace(next);
        assert!(!pair.differs(&pair.read(&certificate, &key).unwrap()));
        let used = pair.config();
        folder.write(&new, &old_key);
        assert!(!pair.read_again() && !pair.read_again(), "the earlier files do not matter");
        assert!(Arc::ptr_eq(&used, &pair.config()));
    }

    #[test]
    fn useless_files_are_named_without_their_contents() {
        let folder = Folder(tempfile::tempdir().unwrap());
        let ((one, key), (other, _)) = (made("one.example"), made("other.example"));
        let load = || {
            let loaded = TlsPair::load(&folder.path("cert.pem"), &folder.path("key.pem"));
            loaded.map(drop).unwrap_err()
        };
        let missing = load();
        assert!(missing.contains("certificate cannot be read"), "{missing}");
        std::fs::write(folder.path("cert.pem"), &one).unwrap();
        std::fs::create_dir(folder.path("key.pem")).unwrap();
        let is_folder = load();
        assert!(is_folder.contains("TLS key cannot be read"), "{is_folder}");
        assert!(is_folder.ends_with("it is a directory"), "{is_folder}");
        std::fs::remove_dir(folder.path("key.pem")).unwrap();
        folder.write(&other, &key);
        assert_eq!(load(), "the TLS key is not that of the certificate");
        folder.write(&key, &one);
        assert!(load().contains("no certificate"), "swapped");
        folder.write(&one, "-----BEGIN secret words\n");
        assert!(!load().contains("secret"));
        folder.write(&key.replace('\n', ""), &key);
        assert_eq!(load(), "the file of the TLS certificate is not PEM");
    }
}

//! The certificate of the listeners, and the day on which it expires.

use std::{sync::Arc, time::Duration};

use rustls::{
    CertificateError, Error, RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject};

use super::Finding;
use crate::config::TlsConfig;

pub(super) fn examine(tls: &TlsConfig) -> Vec<Finding> {
    let Some(path) = &tls.certificate else {
        return vec![Finding::ok("tls", "no certificate: the listeners speak plain HTTP")];
    };
    let read = CertificateDer::from_pem_file(path).map_err(|error| error.to_string());
    let judged = read.and_then(|certificate| judge(&certificate, UnixTime::now()));
    let advice = "replace the files of tls.certificate and tls.key";
    vec![judged.unwrap_or_else(|why| Finding::error("tls", why, advice))]
}

fn judge(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<Finding, String> {
    let advice = "renew the certificate: the gateway reads the files again every few seconds";
    if let Some(not_before) = validity(certificate, now)?.0 {
        let what = format!("the certificate is valid from {} on", date(not_before));
        return Ok(Finding::error("tls", what, "correct the clock, or the certificate"));
    }
    let (_, Some(not_after)) = validity(certificate, FAR)? else {
        return Ok(Finding::ok("tls", "the certificate and its key fit, and never expire"));
    };
    let left = not_after.as_secs().saturating_sub(now.as_secs());
    let days = left / DAY;
    let (day, what) = (date(not_after), "the certificate");
    Ok(match (left, days) {
        (0, _) => Finding::error("tls", format!("{what} expired on {day}"), advice),
        (_, ..EXPIRES_SOON) => {
            Finding::warning("tls", format!("{what} expires on {day}, in {days} days"), advice)
        }
        _ => Finding::ok(
            "tls",
            format!("{what} and its key fit; it expires on {day}, in {days} days"),
        ),
    })
}

/// Returns the bound of the certificate's time that `at` breaks: the first moment, or the last one.
///
/// rustls looks at the time of a certificate before its issuer, so that the issuer need not be known.
fn validity(
    certificate: &CertificateDer<'_>,
    at: UnixTime,
) -> Result<(Option<UnixTime>, Option<UnixTime>), String> {
    let mut roots = RootCertStore::empty();
    let told = |error: Error| format!("the certificate cannot be read: {error}");
    roots.add(certificate.clone().into_owned()).map_err(told)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider);
    let verifier = verifier.build().map_err(|error| error.to_string())?;
    let name = ServerName::try_from("localhost").map_err(|error| error.to_string())?;
    match verifier.verify_server_cert(certificate, &[], &name, &[], at) {
        Err(Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. })) => {
            Ok((None, Some(not_after)))
        }
        Err(Error::InvalidCertificate(CertificateError::NotValidYetContext {
            not_before, ..
        })) => Ok((Some(not_before), None)),
        Err(Error::InvalidCertificate(CertificateError::BadEncoding)) => {
            Err("the certificate cannot be read".into())
        }
        // Its name and issuer are for clients to judge.
        _ => Ok((None, None)),
    }
}

fn date(time: UnixTime) -> String {
    let time = std::time::UNIX_EPOCH + Duration::from_secs(time.as_secs());
    let text = humantime::format_rfc3339_seconds(time).to_string();
    text.split('T').next().unwrap_or_default().to_owned()
}

const DAY: u64 = 86_400;

/// Days before the end at which a renewal that runs by itself has failed.
const EXPIRES_SOON: u64 = 14;

/// A moment after which no certificate is valid: the year 9999.
const FAR: UnixTime = UnixTime::since_unix_epoch(Duration::from_secs(253_402_300_700));

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    #[test]
    fn the_day_of_the_end_is_told() {
        let mut parameters = rcgen::CertificateParams::new(["a.example".to_owned()]).unwrap();
        parameters.not_before = rcgen::date_time_ymd(2030, 1, 1);
        parameters.not_after = rcgen::date_time_ymd(2030, 3, 1);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        let judged = |days: u64| {
            // The first of January 2030.
            let now = UnixTime::since_unix_epoch(Duration::from_secs(1_893_456_000 + days * DAY));
            judge(certificate.der(), now).unwrap()
        };
        assert_eq!(judged(1).level, Level::Ok);
        assert!(
            judged(1).what.ends_with("it expires on 2030-03-01, in 58 days"),
            "{}",
            judged(1).what
        );
        assert_eq!(judged(50).level, Level::Warning);
        assert_eq!(judged(60).level, Level::Error);
        let early = UnixTime::since_unix_epoch(Duration::from_secs(1_800_000_000));
        assert_eq!(judge(certificate.der(), early).unwrap().level, Level::Error);
    }
}

//! Which web pages may connect.

use http::{HeaderMap, HeaderValue, header};

use crate::http::rejection::Rejection;

/// Checks a browser's `Origin` against the allow-list; a client without one is no browser.
/// An empty list allows everybody, `*` too; `https://*.example.org` any host below `example.org`.
///
/// # Errors
/// The origin is not on the list, or there are several.
pub fn check(headers: &HeaderMap, allowed: &[String]) -> Result<(), Rejection> {
    if allowed.is_empty() {
        return Ok(());
    }
    let mut origins = headers.get_all(header::ORIGIN).iter();
    let Some(origin) = origins.next() else { return Ok(()) };
    let known = origins.next().is_none()
        && origin.to_str().is_ok_and(|origin| allowed.iter().any(|rule| matches(rule, origin)));
    if known {
        Ok(())
    } else {
        Err(Rejection::origin_not_allowed("Pages of this origin may not connect."))
    }
}

/// Whether the operator named this origin, rather than allowing any.
#[must_use]
pub fn is_listed(origin: &HeaderValue, allowed: &[String]) -> bool {
    let named = |rule: &&String| rule.as_str() != "*";
    origin
        .to_str()
        .is_ok_and(|origin| allowed.iter().filter(named).any(|rule| matches(rule, origin)))
}

fn matches(rule: &str, origin: &str) -> bool {
    if rule == "*" || rule.eq_ignore_ascii_case(origin) {
        return true;
    }
    let Some((scheme, domain)) = rule.split_once("://*.") else { return false };
    let Some((origin_scheme, host)) = origin.split_once("://") else { return false };
    let (host, domain) = (host.to_ascii_lowercase(), domain.to_ascii_lowercase());
    scheme.eq_ignore_ascii_case(origin_scheme)
        && host.strip_suffix(&domain).is_some_and(|sub| sub.len() > 1 && sub.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_origins_pass() {
        let rules = ["https://app.example".to_owned(), "https://*.example.org".to_owned()];
        let allowed = |origin: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ORIGIN, origin.parse().unwrap());
            check(&headers, &rules).is_ok()
        };
        assert!(allowed("https://app.example") && allowed("HTTPS://APP.example"));
        assert!(allowed("https://a.example.org") && allowed("https://a.b.example.org"));
        for bad in [
            "http://app.example",
            "https://example.org",
            "https://.example.org",
            "https://evilexample.org",
            "https://app.example.evil",
            "https://app.example:8443",
            "null",
            "",
        ] {
            assert!(!allowed(bad), "{bad}");
        }
        assert!(check(&HeaderMap::new(), &rules).is_ok());
    }
}

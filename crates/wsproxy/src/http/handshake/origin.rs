//! The check of a browser's `Origin`: web pages that may connect.

use http::{HeaderMap, HeaderValue, header};

use crate::{
    config::origin::{Origin, OriginRule},
    http::rejection::Rejection,
};

/// Checks a browser's `Origin` against the allow-list. Clients without `Origin` are not browsers and pass.
/// An empty list and `*` allow all origins.
///
/// # Errors
/// 403: the origin is not on the list, or there are several.
pub fn check(headers: &HeaderMap, allowed: &[OriginRule]) -> Result<(), Rejection> {
    if allowed.is_empty() {
        return Ok(());
    }
    let mut origins = headers.get_all(header::ORIGIN).iter();
    let Some(origin) = origins.next() else { return Ok(()) };
    let may = allowed.contains(&OriginRule::Any) || is_listed(origin, allowed);
    if may && origins.next().is_none() {
        Ok(())
    } else {
        Err(Rejection::origin_not_allowed("Pages of this origin may not connect."))
    }
}

/// Returns whether a rule names this origin; `*` does not.
#[must_use]
pub fn is_listed(origin: &HeaderValue, allowed: &[OriginRule]) -> bool {
    let origin = origin.to_str().ok().and_then(Origin::parse);
    origin.is_some_and(|origin| allowed.iter().any(|rule| rule.names(&origin)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_origins_pass() {
        let rules = ["https://app.example", "https://*.example.org"];
        let rules = rules.map(|rule| rule.parse::<OriginRule>().unwrap());
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
            "https://evil.com/.example.org",
            "https://a b.example.org",
            "null",
            "",
        ] {
            assert!(!allowed(bad), "{bad}");
        }
        assert!(check(&HeaderMap::new(), &rules).is_ok());
        let mut two = HeaderMap::new();
        two.append(header::ORIGIN, "https://app.example".parse().unwrap());
        two.append(header::ORIGIN, "https://app.example".parse().unwrap());
        assert!(check(&two, &rules).is_err() && check(&two, &[OriginRule::Any]).is_err());
    }
}

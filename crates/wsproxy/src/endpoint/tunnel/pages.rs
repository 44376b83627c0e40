//! The check of web pages where no credential protects a cluster: which of them may ask. Knows no cluster.

use std::net::IpAddr;

use http::{HeaderValue, header, request::Parts, uri};

use crate::{
    config::{host::Authority, origin::OriginRule},
    endpoint::tunnel::refusal::{Code, Refusal},
    http::{handshake::origin, host},
};

/// Refuses requests that a page of an origin outside `rules` may have sent.
///
/// A browser leaves `Origin` out of navigations, images and the reading of a page's own origin. A foreign page that points
/// its own host name at this machine reads its own origin, so that `Host` has to name this machine or an allowed origin.
///
/// # Errors
/// `forbidden`
pub(super) fn check(parts: &Parts, rules: &[OriginRule], bind: IpAddr) -> Result<(), Refusal> {
    let refused = |why| Err(Refusal::because(Code::Forbidden, why));
    let headers = &parts.headers;
    let has_origin = headers.contains_key(header::ORIGIN);
    let is_allowed = !rules.is_empty() && origin::check(headers, rules).is_ok();
    if has_origin && !is_allowed {
        return refused("Pages of this origin are not allowed.");
    }
    if rules.contains(&OriginRule::Any) {
        return Ok(());
    }
    let named = headers.get_all(header::HOST).iter().map(|host| host.to_str().unwrap_or_default());
    let target = parts.uri.authority().map(uri::Authority::as_str);
    let is_ours = |text: &str| {
        Authority::parse(text).is_some_and(|named| {
            let is_of_rule = |rule: &OriginRule| rule.names_host(named.host);
            host::is_local(&named, bind) || rules.iter().any(is_of_rule)
        })
    };
    if !named.chain(target).all(is_ours) {
        return refused("The host is neither this machine nor that of an allowed origin.");
    }
    let is_foreign = |site: &HeaderValue| matches!(site.as_bytes(), b"cross-site" | b"same-site");
    if !has_origin && headers.get_all("sec-fetch-site").iter().any(is_foreign) {
        return refused("Pages of other origins are not allowed.");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use http::Request;

    use super::*;

    fn passes(rules: &[&str], lines: &[(&str, &str)]) -> bool {
        let mut request = Request::new(());
        for (name, value) in lines {
            let name = http::HeaderName::from_bytes(name.as_bytes()).unwrap();
            request.headers_mut().append(name, value.parse().unwrap());
        }
        let rules: Vec<OriginRule> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        check(&request.into_parts().0, &rules, IpAddr::V4(Ipv4Addr::LOCALHOST)).is_ok()
    }

    #[test]
    fn hosts_are_of_this_machine_or_allowed() {
        let rules = ["https://app.example:8443", "https://*.apps.example"];
        for host in ["localhost:1", "127.0.0.1:8080", "[::1]", "App.example", "a.apps.example:1"] {
            assert!(passes(&rules, &[("host", host)]), "{host}");
        }
        for host in ["evil.example", "app.example.evil", "apps.example", "127.0.0.1.evil.example"] {
            assert!(!passes(&rules, &[("host", host)]), "{host}");
            assert!(!passes(&[], &[("host", host)]), "{host}");
            assert!(passes(&["*"], &[("host", host)]), "{host}");
        }
        assert!(!passes(&[], &[("host", "app.example")]) && passes(&[], &[]));
    }

    #[test]
    fn pages_of_other_origins_are_refused() {
        let (host, rules) = (("host", "localhost:1"), ["https://app.example"]);
        let of = |site| ("sec-fetch-site", site);
        for site in ["none", "same-origin"] {
            assert!(passes(&rules, &[host, of(site)]), "{site}");
        }
        for site in ["cross-site", "same-site"] {
            assert!(!passes(&rules, &[host, of(site)]), "{site}");
            let allowed = ("origin", "https://app.example");
            assert!(passes(&rules, &[host, of(site), allowed]), "{site}");
            assert!(!passes(&[], &[host, of(site), allowed]), "{site}");
        }
        assert!(!passes(&rules, &[host, ("origin", "http://localhost:1")]));
    }
}

//! Checks of a request's `Host`: exactly one (RFC 9112, 3.2), and on a local instance one of this machine.

use std::net::IpAddr;

use http::{Request, Version, header};

use crate::{config::host::Authority, http::rejection::Rejection};

/// Checks that a request has exactly one valid `Host`. Requests of HTTP/1.0, such as probes, may have none.
///
/// # Errors
/// 400: no `Host`, more than one, or an invalid host in the header or in the request's target.
pub fn check<B>(request: &Request<B>) -> Result<(), Rejection> {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (None, _) if request.version() < Version::HTTP_11 => None,
        (None, _) => return Err(Rejection::bad_request("There is no Host header.")),
        (Some(_), Some(_)) => {
            return Err(Rejection::bad_request("There is more than one Host header."));
        }
        (Some(host), None) => Some(host.to_str().unwrap_or_default()),
    };
    let target = request.uri().authority().map(http::uri::Authority::as_str);
    let is_host = |text: &str| Authority::parse(text).is_some();
    if [host, target].into_iter().flatten().all(is_host) {
        Ok(())
    } else {
        Err(Rejection::bad_request("The Host header or the target names no host."))
    }
}

/// Checks that a request names this machine. For instances that listen on a local address only.
///
/// This stops DNS rebinding: a foreign page can point its own host name at this machine, but its
/// browser still sends that name. An address cannot be rebound. A request without `Host` does not
/// come from a page, since no browser speaks HTTP/1.0.
///
/// # Errors
/// 403: the request names another host.
pub fn check_local<B>(request: &Request<B>, bind: IpAddr) -> Result<(), Rejection> {
    let host = request.headers().get(header::HOST).map(|host| host.to_str().unwrap_or_default());
    let target = request.uri().authority().map(http::uri::Authority::as_str);
    let is_ours = |text: &str| Authority::parse(text).is_some_and(|host| is_local(&host, bind));
    if [host, target].into_iter().flatten().all(is_ours) {
        Ok(())
    } else {
        Err(Rejection::host_not_allowed("This instance answers to its address and localhost only."))
    }
}

/// Returns whether a host is `localhost` or an address of this machine.
#[must_use]
pub fn is_local(host: &Authority<'_>, bind: IpAddr) -> bool {
    match host.address() {
        Some(address) => address.is_loopback() || address == bind || bind.is_unspecified(),
        None => host.host.eq_ignore_ascii_case("localhost"),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn request(version: Version, target: &str, hosts: &[&str]) -> Request<()> {
        let request = Request::builder().version(version).uri(target);
        let with_host = |request: http::request::Builder, host: &&str| {
            request.header(header::HOST, header::HeaderValue::from_bytes(host.as_bytes()).unwrap())
        };
        hosts.iter().fold(request, with_host).body(()).unwrap()
    }

    #[test]
    fn a_request_names_exactly_one_host() {
        let status = |version, hosts: &[&str]| {
            check(&request(version, "/", hosts)).map_err(|rejection| rejection.status.as_u16())
        };
        for good in ["example.org", "example.org:8080", "127.0.0.1", "[::1]:1", "a_b", "a."] {
            assert_eq!(status(Version::HTTP_11, &[good]), Ok(()), "{good}");
        }
        for bad in ["", "a b", "a/b", "u@a", "a:b", "a:99999", "[::1", "a,b", "ä", "a, b"] {
            assert_eq!(status(Version::HTTP_11, &[bad]), Err(400), "{bad}");
            assert_eq!(status(Version::HTTP_10, &[bad]), Err(400), "{bad}");
        }
        assert_eq!(status(Version::HTTP_11, &[]), Err(400));
        assert_eq!(status(Version::HTTP_10, &[]), Ok(()));
        for version in [Version::HTTP_10, Version::HTTP_11] {
            assert_eq!(status(version, &["a", "a"]), Err(400));
        }
        assert!(check(&request(Version::HTTP_11, "http://u@a/", &["a"])).is_err());
        assert!(check(&request(Version::HTTP_11, "http://a/", &["a"])).is_ok());
    }

    #[test]
    fn a_name_that_leads_here_is_not_this_machine() {
        let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let passes = |target: &str, hosts: &[&str]| {
            check_local(&request(Version::HTTP_11, target, hosts), local).is_ok()
        };
        for good in ["localhost:8080", "LOCALHOST", "127.0.0.1:8080", "[::1]:8080"] {
            assert!(passes("/", &[good]), "{good}");
        }
        for bad in ["evil.example", "evil.example:8080", "localhost.evil.example", "192.0.2.1"] {
            assert!(!passes("/", &[bad]), "{bad}");
            assert!(!passes(&format!("http://{bad}/"), &["localhost"]), "{bad}");
        }
        assert!(passes("/", &[]));
    }
}

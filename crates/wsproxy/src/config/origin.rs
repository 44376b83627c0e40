//! Origins of web pages, and the rules by which an operator names them; both parsed, never compared as text.

use std::{fmt, str::FromStr};

use super::{
    host::Authority,
    kind::{Raw, ValueKind, quoted},
};

/// The origin of a page: RFC 6454. Scheme and host in lower case, as browsers send them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    scheme: String,
    host: String,
    /// The port; `None`: the default port of the scheme.
    port: Option<u16>,
}

impl Origin {
    /// Reads an `Origin` header; `None` if it is no origin, such as `null`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let origin = Self::read(text)?;
        // A browser writes neither the default port of the scheme nor leading zeros.
        origin.to_string().eq_ignore_ascii_case(text).then_some(origin)
    }

    /// Reads an origin in the spelling of a person: any case, with or without the default port.
    fn read(text: &str) -> Option<Self> {
        let text = text.to_ascii_lowercase();
        let (scheme, place) = text.split_once("://")?;
        let is_scheme = scheme.starts_with(|c: char| c.is_ascii_lowercase())
            && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
        let place = Authority::parse(place).filter(Authority::is_complete)?;
        let port = match place.port {
            None => None,
            Some(digits) => Some(digits.parse::<u16>().ok().filter(|port| *port > 0)?),
        };
        let own_port = match scheme {
            "http" => Some(80),
            "https" => Some(443),
            _ => None,
        };
        let port = port.filter(|port| Some(*port) != own_port);
        is_scheme.then(|| Self { scheme: scheme.into(), host: place.host.into(), port })
    }

    /// Returns whether the host is a name at least one label below `domain`.
    fn is_below(&self, domain: &Self) -> bool {
        let below = self.host.strip_suffix(&domain.host).and_then(|rest| rest.strip_suffix('.'));
        self.scheme == domain.scheme && self.port == domain.port && below.is_some()
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme, self.host)?;
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

/// The origins that an entry of `server.allowed_origins` allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OriginRule {
    /// `*`: any value, even one that is no origin.
    Any,
    /// `https://app.example`: this origin.
    Exact(Origin),
    /// `https://*.example`: every host below that domain, with the same scheme and port.
    Below(Origin),
}

impl OriginRule {
    /// Returns whether the rule names this origin; [`Self::Any`] names none.
    #[must_use]
    pub fn names(&self, origin: &Origin) -> bool {
        match self {
            Self::Any => false,
            Self::Exact(exact) => exact == origin,
            Self::Below(domain) => origin.is_below(domain),
        }
    }

    /// Returns whether the rule names an origin at this host, with any scheme and port; [`Self::Any`] names none.
    #[must_use]
    pub fn names_host(&self, host: &str) -> bool {
        let host = host.to_ascii_lowercase();
        match self {
            Self::Any => false,
            Self::Exact(exact) => exact.host == host,
            Self::Below(domain) => {
                let below = host.strip_suffix(&domain.host);
                below.and_then(|rest| rest.strip_suffix('.')).is_some_and(|rest| !rest.is_empty())
            }
        }
    }
}

impl FromStr for OriginRule {
    type Err = NoOrigin;

    fn from_str(text: &str) -> Result<Self, NoOrigin> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let Some((scheme, domain)) = text.split_once("://*.") else {
            return Origin::read(text).map(Self::Exact).ok_or(NoOrigin);
        };
        let domain = Origin::read(&format!("{scheme}://{domain}")).ok_or(NoOrigin)?;
        // An address has no subdomains.
        let is_address = Authority::parse(&domain.host).is_none_or(|host| host.address().is_some());
        if is_address { Err(NoOrigin) } else { Ok(Self::Below(domain)) }
    }
}

impl fmt::Display for OriginRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Exact(origin) => origin.fmt(f),
            Self::Below(domain) => {
                let below = Origin { host: format!("*.{}", domain.host), ..domain.clone() };
                below.fmt(f)
            }
        }
    }
}

/// Text that is no rule of origins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("is no origin")]
pub struct NoOrigin;

/// An entry of `server.allowed_origins`.
pub(super) struct OriginKind;

impl ValueKind<OriginRule> for OriginKind {
    fn allowed(&self) -> String {
        "an origin such as \"https://app.example\", \"https://*.example\" or \"*\", without a path"
            .into()
    }
    fn read(&self, raw: &Raw) -> Option<OriginRule> {
        raw.text()?.parse().ok()
    }
    fn write(&self, value: &OriginRule) -> String {
        quoted(&value.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_spelled_as_browsers_send_origins() {
        for (given, kept) in [
            ("https://App.example", "https://app.example"),
            ("https://*.example:8443", "https://*.example:8443"),
            ("https://*.Example:443", "https://*.example"),
            ("https://a.example:443", "https://a.example"),
            ("http://[::1]:3000", "http://[::1]:3000"),
            ("http://192.0.2.1", "http://192.0.2.1"),
            ("chrome-extension://abcdef", "chrome-extension://abcdef"),
            ("*", "*"),
        ] {
            let rule: OriginRule = given.parse().unwrap();
            assert_eq!(rule.to_string(), kept);
            assert_eq!(kept.parse(), Ok(rule));
        }
        for bad in [
            "",
            "app.example",
            "https://",
            "https://a/",
            "https://a.*",
            "https://a:x",
            "://a",
            "https://u@a",
            "https://a b",
            "https://a.",
            "https://.a",
            "https://a..b",
            "https://*",
            "https://*.",
            "https://*.*.a",
            "https://x*.a",
            "https://*.192.0.2.1",
            "https://*.[::1]",
            "https://a:0",
            "https://a:",
            "null",
            "**",
        ] {
            assert_eq!(bad.parse::<OriginRule>(), Err(NoOrigin), "{bad:?}");
        }
    }

    #[test]
    fn a_wildcard_names_hosts_below_its_domain_only() {
        let names = |rule: &str, origin: &str| {
            let rule: OriginRule = rule.parse().unwrap();
            Origin::parse(origin).is_some_and(|origin| rule.names(&origin))
        };
        let rule = "https://*.example.com";
        for good in ["https://a.example.com", "https://a.b.example.com", "HTTPS://A.example.COM"] {
            assert!(names(rule, good), "{good}");
        }
        for bad in [
            "https://example.com",
            "https://.example.com",
            "https://a..example.com",
            "https://evilexample.com",
            "https://evil.com/.example.com",
            "https://evil.com?.example.com",
            "https://evil.com#.example.com",
            "https://evil.com\\.example.com",
            "https://evil.com:80.example.com",
            "https://evil.com:.example.com",
            "https://evil.com@a.example.com",
            "https://u:p@a.example.com",
            "https://a b.example.com",
            "https://a%2e.example.com",
            "https://*.example.com",
            "https://[::1].example.com",
            "https://a.example.com.",
            "https://a.example.com:8443",
            "https://a.example.com:443",
            "https://a.example.com:",
            "https://a.example.com/",
            "https://a.example.com https://b.example.com",
            "http://a.example.com",
            "https://a.example.com.evil.com",
            " https://a.example.com",
            "https:a.example.com",
            "null",
            "",
        ] {
            assert!(!names(rule, bad), "{bad:?}");
        }
        assert!(names("https://*.example.com:8443", "https://a.example.com:8443"));
        assert!(!names("https://*.example.com:8443", "https://a.example.com"));
    }
}

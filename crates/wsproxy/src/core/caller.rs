//! A client's address, origin and software, for log lines about its connection.

use std::{borrow::Cow, net::IpAddr, sync::Arc};

use hashbrown::HashSet;
use http::{HeaderMap, HeaderName, header};
use parking_lot::Mutex;

/// Description of a client from its request. Only the address is proven.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caller {
    /// Address, behind trusted proxies.
    pub address: Option<IpAddr>,
    /// Origin of the page for which a browser opened the connection.
    pub origin: Option<Arc<str>>,
    /// Name of the client's software.
    pub user_agent: Option<Arc<str>>,
}

/// Texts of callers, shared by the connections that sent the same text.
///
/// Invariant: holds at most [`TEXTS_MAX`]. A text beyond that is not shared.
#[derive(Debug, Default)]
pub struct Texts(Mutex<HashSet<Arc<str>>>);

impl Texts {
    /// Describes the client at `address` by its headers.
    #[must_use]
    pub fn caller(&self, address: Option<IpAddr>, headers: &HeaderMap) -> Caller {
        let text = |name: HeaderName| headers.get(name)?.to_str().ok();
        let origin = text(header::ORIGIN).map(|origin| self.keep(&without_secrets(origin)));
        let user_agent = text(header::USER_AGENT).map(|name| self.keep(name));
        Caller { address, origin, user_agent }
    }

    fn keep(&self, text: &str) -> Arc<str> {
        let text = &text[..text.floor_char_boundary(TEXT_BYTES_MAX)];
        let mut texts = self.0.lock();
        if let Some(known) = texts.get(text) {
            return Arc::clone(known);
        }
        let text: Arc<str> = text.into();
        if texts.len() < TEXTS_MAX {
            texts.insert(Arc::clone(&text));
        }
        text
    }
}

/// Returns scheme, host and port of an origin. Browsers send no more; the rest of another client may be a secret.
fn without_secrets(origin: &str) -> Cow<'_, str> {
    let ends = ['/', '?', '#'];
    let Some((scheme, rest)) = origin.split_once("://") else {
        return origin.split(ends).next().unwrap_or_default().into();
    };
    let authority = rest.split(ends).next().unwrap_or_default();
    match authority.rsplit_once('@') {
        None if authority.len() == rest.len() => origin.into(),
        None => format!("{scheme}://{authority}").into(),
        Some((_, host)) => format!("{scheme}://{host}").into(),
    }
}

/// Upper bound of a text; the rest is cut off.
const TEXT_BYTES_MAX: usize = 256;

/// Upper bound of the shared texts: some 300 KB.
const TEXTS_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(texts: &Texts, name: &str) -> Option<Arc<str>> {
        let headers = [(header::USER_AGENT, name.parse().unwrap())].into_iter().collect();
        texts.caller(None, &headers).user_agent
    }

    #[test]
    fn what_clients_say_of_themselves_is_bounded_and_shared() {
        let texts = Texts::default();
        let long = "x".repeat(5000);
        assert_eq!(agent(&texts, &long).map(|text| text.len()), Some(TEXT_BYTES_MAX));
        let (one, other) = (agent(&texts, "curl").unwrap(), agent(&texts, "curl").unwrap());
        assert!(Arc::ptr_eq(&one, &other));
        for n in 0..2 * TEXTS_MAX {
            assert_eq!(agent(&texts, &n.to_string()).as_deref(), Some(&*n.to_string()));
        }
        assert_eq!(texts.0.lock().len(), TEXTS_MAX);
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        for (said, kept) in [
            ("https://app.example:8443", "https://app.example:8443"),
            ("null", "null"),
            ("https://u:secret@app.example/?token=secret", "https://app.example"),
            ("https://a@secret@app.example#secret", "https://app.example"),
            ("app.example/secret", "app.example"),
        ] {
            assert_eq!(without_secrets(said), kept);
        }
    }

    #[test]
    fn a_client_that_says_nothing_has_its_address() {
        let caller = Texts::default().caller("192.0.2.1".parse().ok(), &HeaderMap::new());
        let expected = Caller { address: "192.0.2.1".parse().ok(), ..Caller::default() };
        assert_eq!(caller, expected);
    }
}

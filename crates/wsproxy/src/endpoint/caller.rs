//! Where a client is and what it calls itself, for the lines of the log that tell of its connection.

use std::{net::IpAddr, sync::Arc};

use hashbrown::HashSet;
use http::{HeaderMap, HeaderName, header};
use parking_lot::Mutex;

/// A client as its request describes it. Nothing of it is proven but the address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caller {
    /// Its address, behind our own proxies.
    pub address: Option<IpAddr>,
    /// The page that a browser opened the connection for.
    pub origin: Option<Arc<str>>,
    /// The name of its software.
    pub user_agent: Option<Arc<str>>,
}

/// Texts that many clients say of themselves: every connection keeps them, so there is one for all.
///
/// Invariant: holds at most [`TEXTS_MAX`]. A text beyond that belongs to its connection alone.
#[derive(Debug, Default)]
pub struct Texts(Mutex<HashSet<Arc<str>>>);

impl Texts {
    /// Reads what the headers say of a client at `address`.
    #[must_use]
    pub fn caller(&self, address: Option<IpAddr>, headers: &HeaderMap) -> Caller {
        let text = |name: HeaderName| Some(self.keep(headers.get(name)?.to_str().ok()?));
        Caller { address, origin: text(header::ORIGIN), user_agent: text(header::USER_AGENT) }
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

/// Longer texts are cut.
const TEXT_BYTES_MAX: usize = 256;

/// Some 300 KB at most.
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
    fn a_client_that_says_nothing_has_its_address() {
        let caller = Texts::default().caller("192.0.2.1".parse().ok(), &HeaderMap::new());
        let expected = Caller { address: "192.0.2.1".parse().ok(), ..Caller::default() };
        assert_eq!(caller, expected);
    }
}

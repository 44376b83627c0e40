//! `Connection`: the options of one hop. Knows no other header.

use http::{HeaderMap, HeaderName, header};

use crate::endpoint::tunnel::headers::Kind;

/// Options of the `Connection` headers of a message, in lower case and sorted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Options(Vec<String>);

/// Reason why the `Connection` headers of a request are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BadOption {
    /// An option is no token.
    Malformed,
    /// An option names a header that the gateway adds or relies on.
    Protected,
}

impl Options {
    /// Reads the options of a request.
    ///
    /// A filter that removes what `Connection` names would also remove what a proxy has added (CVE-2021-31999). Here
    /// nothing is added before the filter, and such a request is refused besides.
    ///
    /// # Errors
    /// [`BadOption`]
    pub(super) fn of_request(headers: &HeaderMap) -> Result<Self, BadOption> {
        let options = Self::read(headers);
        for option in &options.0 {
            if HeaderName::from_bytes(option.as_bytes()).is_err() {
                return Err(BadOption::Malformed);
            }
            if Kind::of(option).is_protected() {
                return Err(BadOption::Protected);
            }
        }
        Ok(options)
    }

    /// Reads the options of an answer, which are not checked.
    pub(super) fn of_answer<'v>(values: impl Iterator<Item = &'v [u8]>) -> Self {
        let mut options = Vec::new();
        values.for_each(|value| Self::add(value, &mut options));
        options.sort_unstable();
        Self(options)
    }

    /// Returns whether the options hold a name, given in lower case.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.0.binary_search_by(|option| option.as_str().cmp(name)).is_ok()
    }

    fn read(headers: &HeaderMap) -> Self {
        let values = headers.get_all(header::CONNECTION);
        Self::of_answer(values.iter().map(|value| value.as_bytes()))
    }

    fn add(value: &[u8], options: &mut Vec<String>) {
        let parts = value.split(|byte| *byte == b',').map(|part| part.trim_ascii());
        let parts = parts.filter(|part| !part.is_empty());
        options.extend(parts.map(|part| String::from_utf8_lossy(part).to_ascii_lowercase()));
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn read(values: &[&[u8]]) -> Result<Options, BadOption> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::CONNECTION, HeaderValue::from_bytes(value).unwrap());
        }
        Options::of_request(&headers)
    }

    #[test]
    fn options_are_read_over_all_lines() {
        let options = read(&[b"Keep-Alive, X-A ,,", b"upgrade", b""]).unwrap();
        for name in ["keep-alive", "x-a", "upgrade"] {
            assert!(options.contains(name), "{name}");
        }
        assert!(!options.contains("X-A") && !options.contains(""));
        assert_eq!(read(&[]), Ok(Options::default()));
        assert!(read(&[b"close"]).unwrap().contains("close"));
        assert!(read(&[b"accept, cookie, te, x-b"]).is_ok());
    }

    #[test]
    fn a_name_that_the_gateway_relies_on_is_refused() {
        for name in [
            "host",
            "Authorization",
            "content-length",
            "Content-Type",
            "expect",
            "forwarded",
            "X-Forwarded-For",
            "x-forwarded-prefix",
            "x-forwarded-anything",
            "via",
            "traceparent",
            "tracestate",
            "Impersonate-User",
            "impersonate-extra-a",
            "X-Remote-Group",
            "x-wsproxy-authorization",
            "X_Forwarded_For",
            "impersonate_user",
            "content_length",
            "x-request-id",
        ] {
            for value in [name.to_owned(), format!("close, {name}"), format!("a,\t{name} ,b")] {
                assert_eq!(read(&[value.as_bytes()]), Err(BadOption::Protected), "{value}");
                assert_eq!(read(&[b"close", value.as_bytes()]), Err(BadOption::Protected));
            }
        }
        for value in [&b"a b"[..], b"\"host\"", b"host;q=1", b"(host)", b"\xff", b"a:b"] {
            assert_eq!(read(&[value]), Err(BadOption::Malformed), "{value:?}");
        }
    }
}

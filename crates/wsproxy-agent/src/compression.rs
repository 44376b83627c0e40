//! Compression of answers on their way to the gateway, where an operator asks for it. Knows no connection.

use std::io::Write;

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http::{
    HeaderMap, HeaderName, HeaderValue, Response, StatusCode,
    header::{
        ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE,
        CONTENT_TYPE, ETAG, VARY,
    },
};

/// Body that is being compressed with gzip. Each piece is flushed, so that no byte waits for a later one.
///
/// Bound: some 300 KiB for the state of the compression, and one compressed piece.
#[derive(Debug)]
pub(crate) struct Compressor(GzEncoder<Vec<u8>>);

impl Compressor {
    /// Decides whether an answer is compressed, and changes its headers if so. `accepts` is whether the client takes
    /// gzip.
    pub(crate) fn of<B>(response: &mut Response<B>, accepts: bool) -> Option<Self> {
        if !accepts || response.status() != StatusCode::OK || !may_be_encoded(response.headers()) {
            return None;
        }
        let headers = response.headers_mut();
        headers.remove(CONTENT_LENGTH);
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        if !lists(headers, &VARY, "accept-encoding") && !lists(headers, &VARY, "*") {
            headers.append(VARY, HeaderValue::from_static("Accept-Encoding"));
        }
        let tag = headers.get(ETAG).filter(|tag| tag.as_bytes().starts_with(b"\""));
        let weak =
            tag.and_then(|tag| HeaderValue::from_bytes(&[b"W/", tag.as_bytes()].concat()).ok());
        if let Some(weak) = weak {
            headers.insert(ETAG, weak);
        }
        Some(Self(GzEncoder::new(Vec::new(), Compression::new(LEVEL))))
    }

    /// Returns the compressed form of a piece.
    pub(crate) fn piece(&mut self, piece: &[u8]) -> Bytes {
        // Writing to memory does not fail.
        let _ = self.0.write_all(piece).and_then(|()| self.0.flush());
        std::mem::take(self.0.get_mut()).into()
    }

    /// Returns the end of the body.
    pub(crate) fn finish(self) -> Bytes {
        self.0.finish().unwrap_or_default().into()
    }
}

/// Returns whether the client of a request takes gzip for the whole body (RFC 9110, section 12.5.3).
pub(crate) fn accepts_gzip(headers: &HeaderMap) -> bool {
    if headers.contains_key("range") || lists(headers, &CACHE_CONTROL, "no-transform") {
        return false;
    }
    let mut accepts = false;
    for value in headers.get_all(ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok()) {
        for coding in value.split(',') {
            let (name, weight) = coding.split_once(';').unwrap_or((coding, ""));
            let weight = weight.trim().strip_prefix("q=").map_or(Ok(1.0), str::parse::<f32>);
            let is_taken = weight.is_ok_and(|weight| weight > 0.0);
            match name.trim().to_ascii_lowercase().as_str() {
                "gzip" | "x-gzip" => return is_taken,
                "*" => accepts = is_taken,
                _ => {}
            }
        }
    }
    accepts
}

fn may_be_encoded(headers: &HeaderMap) -> bool {
    let length = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    let length = length.map(|text| text.parse::<u64>().unwrap_or(0));
    let is_bound = BOUND_TO_BYTES.iter().any(|name| headers.contains_key(*name));
    length.is_none_or(|length| length >= LENGTH_MIN)
        && !headers.contains_key(CONTENT_ENCODING)
        && !headers.contains_key(CONTENT_RANGE)
        && !is_bound
        && !lists(headers, &CACHE_CONTROL, "no-transform")
        && headers.get(CONTENT_TYPE).is_some_and(is_text)
}

/// Returns whether a type is JSON or text.
fn is_text(value: &HeaderValue) -> bool {
    let text = value.to_str().unwrap_or_default().to_ascii_lowercase();
    let kind = text.split(';').next().unwrap_or_default().trim();
    kind == "application/json"
        || kind.ends_with("+json")
        || (kind.starts_with("text/") && kind != "text/event-stream")
}

/// Returns whether a header with a list of words has this one.
fn lists(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|part| part.trim().eq_ignore_ascii_case(word))
}

/// Headers that are only true of the bytes as the upstream sent them.
const BOUND_TO_BYTES: [&str; 4] = ["content-digest", "repr-digest", "digest", "content-md5"];

/// Length from which on compression pays.
const LENGTH_MIN: u64 = 16 << 10;

const LEVEL: u32 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        let header = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        list.iter().map(header).collect()
    }

    #[test]
    fn clients_take_gzip_by_name_or_with_a_star() {
        for (value, expected) in [
            ("gzip", true),
            ("br, GZIP;q=0.5", true),
            ("*", true),
            ("identity", false),
            ("*, gzip;q=0", false),
            ("gzip;q=0.0", false),
            ("", false),
        ] {
            assert_eq!(accepts_gzip(&headers(&[("accept-encoding", value)])), expected, "{value}");
        }
        let ranged = headers(&[("accept-encoding", "gzip"), ("range", "bytes=0-1")]);
        assert!(!accepts_gzip(&ranged) && !accepts_gzip(&HeaderMap::new()));
    }

    #[test]
    fn only_large_answers_of_text_are_compressed() {
        let json = ("content-type", "application/json; charset=utf-8");
        for good in
            [&[json][..], &[json, ("content-length", "16384")], &[("content-type", "text/plain")]]
        {
            assert!(may_be_encoded(&headers(good)), "{good:?}");
        }
        for bad in [
            &[][..],
            &[("content-type", "application/octet-stream")],
            &[("content-type", "text/event-stream")],
            &[json, ("content-length", "16383")],
            &[json, ("content-encoding", "br")],
            &[json, ("cache-control", "private, no-transform")],
            &[json, ("content-range", "bytes 0-1/2")],
            &[json, ("content-digest", "x")],
        ] {
            assert!(!may_be_encoded(&headers(bad)), "{bad:?}");
        }
    }
}

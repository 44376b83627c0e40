//! Parsing of ids in the paths of requests.

use percent_encoding::percent_decode_str;
use wsproxy_proto::names::Id;

use crate::http::rejection::Rejection;

/// Parses a percent-encoded id. `name` names the parameter in the error text.
///
/// # Errors
/// 400: `raw` is not an id.
pub fn parse_id(name: &str, raw: &str) -> Result<Id, Rejection> {
    let text = percent_decode_str(raw)
        .decode_utf8()
        .map_err(|_| Rejection::bad_id(format!("{name} is not UTF-8.")))?;
    Id::parse(&text).map_err(|error| Rejection::bad_id(format!("{name} {error}.")))
}

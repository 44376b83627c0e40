//! What the fuzz targets do with their input; the plain tests do it with the committed seeds.

use http::header::{HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_EXTENSIONS};
use http::uri::PathAndQuery;
use http::{Method, Version};
use wsproxy_proto::history::{After, Envelope, Position};
use wsproxy_proto::json::validate;
use wsproxy_proto::ws::client::{ClientRequest, Response, read_response};
use wsproxy_proto::ws::deflate::{Deflater, Deflaters, Policy, negotiate};
use wsproxy_proto::ws::frame::{Opcode, Role};
use wsproxy_proto::ws::handshake::{read_upgrade, subprotocols};
use wsproxy_proto::ws::receiver::Limits;

use crate::support::{Ear, MASK, NO_TAKEOVER, Said, TAKEOVER, frame};

const LIMITS: Limits = Limits { message_bytes_max: 2000, fragments_max: 6 };

/// One byte of settings, one that decides the split, and what the peer sends.
pub(crate) fn receiver(data: &[u8]) {
    let [settings, split, bytes @ ..] = data else { return };
    let role = if settings & 1 == 0 { Role::Server } else { Role::Client };
    let deflate = [None, Some(NO_TAKEOVER), Some(TAKEOVER)][usize::from(settings >> 1) % 3];
    let mut whole = Ear::new(role, LIMITS, deflate);
    whole.hear(bytes);
    let mut parts = Ear::new(role, LIMITS, deflate);
    let (mut rest, mut state) = (bytes, u32::from(*split));
    while !rest.is_empty() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let most = 1 + (state >> 8) as usize % (1 << (split % 8));
        let (chunk, after) = rest.split_at(most.min(rest.len()));
        parts.hear(chunk);
        rest = after;
        assert!(parts.receiver.heap_bytes() <= 2 * LIMITS.message_bytes_max + 512 + (48 << 10));
    }
    assert_eq!((&parts.said, parts.error), (&whole.said, whole.error));
    // Whether something is kept depends on what came, not on how.
    assert_eq!(parts.receiver.heap_bytes() == 0, whole.receiver.heap_bytes() == 0);
    for said in &whole.said {
        let length = match said {
            Said::Text(text) => text.len(),
            Said::Binary(bytes) => bytes.len(),
            _ => 0,
        };
        assert!(length <= LIMITS.message_bytes_max);
    }
}

/// One byte of settings; the rest is compressed and inflated again, and taken for compressed.
pub(crate) fn deflate(data: &[u8]) {
    let [settings, bytes @ ..] = data else { return };
    let limits = Limits { message_bytes_max: bytes.len(), fragments_max: 1 };
    let takeover = settings & 1 == 1;
    let params = if takeover { TAKEOVER } else { NO_TAKEOVER };
    let (level, bits) = (1 + u32::from(settings >> 1) % 9, 9 + (settings >> 4) % 7);
    let said = Said::Binary(bytes.to_vec());

    let mut deflater = Deflater::new(level, bits, takeover);
    let mut ear = Ear::new(Role::Server, limits, Some(params));
    for _ in 0..2 {
        let payload = deflater.compress(bytes).to_vec();
        ear.hear(&frame(true, true, Opcode::Binary, &payload, Some(MASK)));
    }
    assert_eq!((&ear.said[..], ear.error), (&[said.clone(), said.clone()][..], None));

    if let Some(payload) = Deflaters::new(level).compress(bits, bytes) {
        let mut ear = Ear::new(Role::Server, limits, Some(NO_TAKEOVER));
        ear.hear(&frame(true, true, Opcode::Binary, payload, Some(MASK)));
        assert_eq!((&ear.said[..], ear.error), (&[said][..], None));
    }

    let mut ear = Ear::new(Role::Server, LIMITS, Some(params));
    let damaged = frame(true, true, Opcode::Binary, bytes, Some(MASK));
    ear.hear(&damaged).hear(&damaged);
    assert!(ear.error.is_some() || ear.said.len() == 2);
}

/// Header lines of a request, and the same bytes as a server's answer.
pub(crate) fn handshake(data: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in data.split(|byte| *byte == b'\n').take(50) {
        let mut parts = line.splitn(2, |byte| *byte == b':');
        let name = HeaderName::from_bytes(parts.next().unwrap_or_default());
        let value = HeaderValue::from_bytes(parts.next().unwrap_or_default());
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    if let Ok(upgrade) = read_upgrade(&Method::GET, Version::HTTP_11, &headers) {
        assert_eq!(upgrade.accept.len(), 28);
    }
    assert!(subprotocols(&headers).all(|name| !name.is_empty() && !name.contains(',')));
    for client_context_takeover in [false, true] {
        let policy = Policy { client_context_takeover, ..Policy::default() };
        let Some((params, answer)) = negotiate(&headers, &policy) else { continue };
        assert!(HeaderValue::from_str(&answer).is_ok());
        assert!(params.server_no_context_takeover);
        assert!((9..=15).contains(&params.server_max_window_bits));
        assert!((8..=15).contains(&params.client_max_window_bits));
        for name in ["server_max_window_bits", "client_max_window_bits"] {
            let asked = headers.get_all(SEC_WEBSOCKET_EXTENSIONS).iter();
            let mut asked = asked.filter_map(|value| value.to_str().ok());
            assert!(!answer.contains(name) || asked.any(|value| value.contains(name)));
        }
    }
    let request = ClientRequest::new(
        HeaderValue::from_static("example.org"),
        PathAndQuery::from_static("/"),
        *b"the sample nonce",
    );
    let request = request.subprotocol("one").deflate(TAKEOVER);
    match read_response(data, &request) {
        Ok(Response::Accepted { consumed, subprotocol, .. }) => {
            assert!(consumed <= data.len() && subprotocol.is_none_or(|name| name == "one"));
        }
        Ok(Response::Refused { consumed, .. }) => assert!(consumed <= data.len()),
        Ok(Response::Incomplete) | Err(_) => {}
    }
}

/// A text, judged by us and by `serde_json`, which allows 127 levels, and whose limit on the
/// size of numbers we do not share.
pub(crate) fn json(data: &[u8]) {
    let verdict = validate(data, 127);
    let oracle = serde_json::from_slice::<serde_json::Value>(data);
    let oracle = oracle.map_err(|error| error.to_string());
    let too_large = matches!(&oracle, Err(text) if text.starts_with("number out of range"));
    if !too_large {
        assert_eq!(verdict.is_ok(), oracle.is_ok(), "{verdict:?} {oracle:?}");
    }
    if let Err(error) = verdict {
        assert!(error.offset <= data.len());
    }
}

/// A message of a channel, a position, and what a client gives as its last event id.
pub(crate) fn history(data: &[u8]) {
    if let Some(envelope) = Envelope::parse(data) {
        assert_eq!(Envelope::parse(&envelope.encode()), Some(envelope));
        // Nothing is read that would be written otherwise.
        assert_eq!(envelope.encode(), data);
    }
    if let Some(position) = Position::parse(data) {
        assert_eq!(position.to_string().as_bytes(), data);
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(after) = After::parse(text) {
        let again = after.as_ref().map_or_else(String::new, After::to_string);
        assert_eq!(After::parse(&again), Ok(after));
        assert!(again == text);
        assert!(again.len() <= 128 && !again.contains([' ', '\n', '\r', '\0']));
    }
}

//! Tests of the headers of answers.

use proptest::prelude::*;
use wsproxy_proto::tunnel::headers::{HeaderBlock, Headers};

use super::*;

fn block(lines: &[(&str, &str)]) -> SharedHeaders {
    let mut block = HeaderBlock::new();
    lines.iter().for_each(|(name, value)| block.push(name.as_bytes(), value.as_bytes()).unwrap());
    SharedHeaders::new(block.headers())
}

fn made(status: u16, lines: &[(&str, &str)], asked: &Asked<'_>) -> Result<HeaderMap, Code> {
    let status = StatusCode::from_u16(status).unwrap();
    map(status, &block(lines), Source::Upstream, asked).map_err(|refusal| refusal.code)
}

fn passed(lines: &[(&str, &str)]) -> HeaderMap {
    let mut made = made(200, lines, &ASKED).unwrap();
    assert_eq!(made.remove(SOURCE).unwrap(), "upstream");
    made
}

fn expected(lines: &[(&'static str, &str)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in lines {
        map.append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
    }
    map
}

#[test]
fn ordinary_headers_pass_in_order() {
    let lines = [
        ("content-type", "text/plain"),
        ("content-length", "5"),
        ("x-a", "1"),
        ("x-a", "\u{e4}\t2"),
        ("access-control-allow-origin", "*"),
        ("set-cookie", "a=b"),
        ("set-cookie", "c=d"),
        ("retry-after", "3"),
        ("sec-websocket-accept", "x"),
        ("x_custom", ""),
    ];
    assert_eq!(passed(&lines), expected(&lines));
}

#[test]
fn headers_of_the_hop_and_of_the_gateway_do_not_pass() {
    for name in [
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "transfer_encoding",
        "upgrade",
        "http2-settings",
        "x-wsproxy-source",
        "x-wsproxy-error",
        "x_wsproxy_source",
        "strict-transport-security",
        "clear-site-data",
        "service-worker-allowed",
        "alt-svc",
        "public-key-pins",
    ] {
        assert_eq!(passed(&[(name, "x-value")]), HeaderMap::new(), "{name}");
    }
}

#[test]
fn connection_of_the_upstream_removes_its_own_headers_at_most() {
    let lines = [
        ("connection", "x-a, Content-Length, x-wsproxy-source, close"),
        ("content-length", "5"),
        ("x-a", "1"),
        ("x-b", "2"),
    ];
    let all = made(200, &lines, &ASKED).unwrap();
    let rest = [("content-length", "5"), ("x-b", "2"), (SOURCE, "upstream")];
    assert_eq!(all, expected(&rest));
}

#[test]
fn a_length_is_one_number() {
    let length = |values: &[&str]| {
        let lines: Vec<_> = values.iter().map(|value| ("content-length", *value)).collect();
        made(200, &lines, &ASKED).map(|map| map.get_all(header::CONTENT_LENGTH).iter().count())
    };
    assert_eq!([length(&[]), length(&["5"]), length(&["5", "5"])], [Ok(0), Ok(1), Ok(1)]);
    for bad in [&["5", "6"][..], &["5, 5"], &["-1"], &["+1"], &["a"], &[""], &["5 "], &["5", ""]] {
        assert_eq!(length(bad), Err(Code::UpstreamProtocol), "{bad:?}");
    }
    // HEAD, 204 and 304 tell the length of a body that does not come.
    for status in [204, 304] {
        let made = made(status, &[("content-length", "7")], &ASKED).unwrap();
        assert_eq!(made[header::CONTENT_LENGTH], "7");
    }
}

#[test]
fn a_location_leads_through_the_gateway() {
    for (value, expected) in [
        ("/", "/clusters/c1/proxy/"),
        ("/a?b#c", "/clusters/c1/proxy/a?b#c"),
        ("/\\evil.example", "/clusters/c1/proxy/\\evil.example"),
        ("/clusters/c1/proxy", "/clusters/c1/proxy"),
        ("/clusters/c1/proxy/a", "/clusters/c1/proxy/a"),
        ("/clusters/c1/proxyx", "/clusters/c1/proxy/clusters/c1/proxyx"),
        ("/clusters/c2/proxy/a", "/clusters/c1/proxy/clusters/c2/proxy/a"),
        ("http://gateway.example/a", "/clusters/c1/proxy/a"),
        ("HTTPS://Gateway.Example/a", "/clusters/c1/proxy/a"),
        ("https://gateway.example", "/clusters/c1/proxy"),
        ("https://gateway.example?a", "/clusters/c1/proxy?a"),
        (
            "https://gateway.example/clusters/c1/proxy/a",
            "https://gateway.example/clusters/c1/proxy/a",
        ),
        ("//gateway.example/a", "/clusters/c1/proxy/a"),
        ("https://gateway.example:8443/a", "https://gateway.example:8443/a"),
        ("https://gateway.example.evil/a", "https://gateway.example.evil/a"),
        ("https://gateway.example@evil.example/a", "https://gateway.example@evil.example/a"),
        ("https://Shop.example/a", "/clusters/c1/proxy/a"),
        ("https://other.example/a", "https://other.example/a"),
        ("//other.example/a", "//other.example/a"),
        ("///a", "///a"),
        ("a/b", "a/b"),
        ("../a", "../a"),
        ("?a", "?a"),
        ("#a", "#a"),
        ("", ""),
        ("mailto:a@b", "mailto:a@b"),
        ("https:/a", "https:/a"),
        ("https:", "https:"),
    ] {
        assert_eq!(passed(&[("location", value)])[header::LOCATION], expected, "{value}");
    }
    let nameless = Asked { hosts: &[b""], ..ASKED };
    for value in ["https:///a", "///a"] {
        let made = made(302, &[("location", value)], &nameless).unwrap();
        assert_eq!(made[header::LOCATION], value);
    }
}

#[test]
fn a_cookie_is_of_the_upstream_alone() {
    for (value, expected) in [
        ("a=b", "a=b"),
        ("a=b; Path=/", "a=b; Path=/clusters/c1/proxy"),
        ("a=b; path=/x/; HttpOnly", "a=b; Path=/clusters/c1/proxy/x/; HttpOnly"),
        ("a=b;PATH = /x ;Secure", "a=b; Path=/clusters/c1/proxy/x;Secure"),
        ("a=b; Domain=example.org", "a=b"),
        ("a=b; domain=.example.org; Path=/; Max-Age=1", "a=b; Path=/clusters/c1/proxy; Max-Age=1"),
        ("a=b; Domain = x ;DOMAIN=y; Secure", "a=b; Secure"),
        ("a=b; domain", "a=b"),
        ("a=b; Path=/; Path=/y", "a=b; Path=/clusters/c1/proxy; Path=/clusters/c1/proxy/y"),
        ("a=b; Path=/clusters/c1/proxy/x", "a=b; Path=/clusters/c1/proxy/x"),
        ("a=b; Path=/clusters/c2/proxy", "a=b; Path=/clusters/c1/proxy/clusters/c2/proxy"),
        ("a=b; Path=", "a=b; Path="),
        ("a=b; Path=x", "a=b; Path=x"),
        ("a=Domain=x; Secure", "a=Domain=x; Secure"),
        ("Domain=x; Secure", "Domain=x; Secure"),
        ("", ""),
        (";", ";"),
        (
            "a=b; SameSite=None;; Expires=Wed, 09 Jun 2027 10:18:14 GMT",
            "a=b; SameSite=None;; Expires=Wed, 09 Jun 2027 10:18:14 GMT",
        ),
    ] {
        assert_eq!(passed(&[("set-cookie", value)])[header::SET_COOKIE], expected, "{value}");
    }
}

#[test]
fn a_cookie_of_the_whole_host_is_removed() {
    for value in ["__Host-a=b; Path=/; Secure", " __host-a=b", "__HOST-a=b; Secure; Path=/x"] {
        let lines = [("set-cookie", value), ("set-cookie", "c=d")];
        let cookies: Vec<_> = passed(&lines).get_all(header::SET_COOKIE).iter().cloned().collect();
        assert_eq!(cookies, ["c=d"], "{value}");
    }
    // This name says nothing of the path.
    let secure = passed(&[("set-cookie", "__Secure-a=b; Path=/; Secure")]);
    assert_eq!(secure[header::SET_COOKIE], "__Secure-a=b; Path=/clusters/c1/proxy; Secure");
    assert_eq!(passed(&[("set-cookie", "__Hos")])[header::SET_COOKIE], "__Hos");
}

#[test]
fn an_upgrade_is_granted_as_it_was_asked_for() {
    let wanted = HeaderValue::from_static("SPDY/3.1");
    let asked = Asked { upgrade: Some(&wanted), ..ASKED };
    let grant = |lines: &[_], asked| made(101, lines, asked);
    let lines = [
        ("upgrade", "SPDY/3.1"),
        ("connection", "Upgrade"),
        ("sec-websocket-protocol", "v4.channel.k8s.io"),
        ("content-length", "0"),
    ];
    let granted = [
        ("sec-websocket-protocol", "v4.channel.k8s.io"),
        ("upgrade", "SPDY/3.1"),
        ("connection", "upgrade"),
        (SOURCE, "upstream"),
    ];
    assert_eq!(grant(&lines, &asked), Ok(expected(&granted)));
    // The library of an agent may have removed `Connection`.
    assert!(grant(&lines[..1], &asked).is_ok());
    for bad in [
        &[("upgrade", "h2c")][..],
        &[("upgrade", "websocket")],
        &[("upgrade", "SPDY/3.1"), ("upgrade", "h2c")],
        &[],
    ] {
        assert_eq!(grant(bad, &asked), Err(Code::UpstreamProtocol), "{bad:?}");
    }
    assert_eq!(grant(&lines, &ASKED), Err(Code::UpstreamProtocol));
    // Another status is an ordinary answer.
    let made = made(403, &lines, &asked).unwrap();
    assert!(!made.contains_key(header::UPGRADE) && !made.contains_key(header::CONNECTION));
}

#[test]
fn trailers_are_announced_to_clients_that_take_them() {
    let lines = [("trailer", "grpc-status, content-length"), ("x-a", "1")];
    let asked = Asked { accepts_trailers: true, ..ASKED };
    let all = made(200, &lines, &asked).unwrap();
    assert_eq!(all[header::TRAILER], "grpc-status");
    assert_eq!(passed(&lines), expected(&lines[1..]));
}

#[test]
fn no_header_begins_another_line() {
    for block in [
        &b"\x03x-a\0\x05a\r\nb:"[..],
        b"\x03x-a\0\x01\0",
        b"\x04x\r\na\0\0",
        b"\x03X-A\0\0",
        b"\x03x a\0\0",
        b"\0\0\0",
        b"\x01a\0\x05b",
    ] {
        assert_eq!(Headers::parse(block), None, "{block:?}");
    }
}

#[test]
fn every_party_that_answers_is_named() {
    for source in [Source::Upstream, Source::Agent, Source::Gateway, Source::Cache] {
        let lines = block(&[(SOURCE, "forged"), ("x_wsproxy_source", "forged")]);
        let made = map(StatusCode::OK, &lines, source, &ASKED).unwrap();
        assert_eq!((made.len(), &made[SOURCE]), (1, &HeaderValue::from_static(source.label())));
    }
}

#[test]
fn a_block_full_of_headers_is_no_harm() {
    let names: Vec<_> = (0..8000).map(|n| format!("x{n}")).collect();
    let lines: Vec<_> = names.iter().map(|name| (name.as_str(), "")).collect();
    assert_eq!(passed(&lines).len(), 8000);
    let lines: Vec<_> = (0..9000).map(|_| ("connection", "a,b,c")).take(3000).collect();
    assert_eq!(passed(&lines), HeaderMap::new());
}

proptest! {
    #[test]
    fn no_answer_speaks_for_the_gateway(
        name in "(x[-_]wsproxy[-_]a|connection|upgrade|trailer|te|keep-alive|proxy-a|alt-svc|transfer[-_]encoding)",
        value in "[ -~]{0,20}",
        path in "[ -~]{0,24}",
    ) {
        let cookie = format!("a=b;{path}");
        let lines = [(name.as_str(), value.as_str()), ("location", path.as_str()), ("set-cookie", cookie.as_str())];
        let made = passed(&lines);
        prop_assert!(made.keys().all(|name| name == header::LOCATION || name == header::SET_COOKIE));
        if let Some(location) = made.get(header::LOCATION).filter(|_| path.starts_with('/')) {
            let location = location.to_str().unwrap();
            prop_assert!(location.starts_with("//") || location.starts_with(ASKED.prefix));
        }
        let cookie = made.get(header::SET_COOKIE).map_or("", |value| value.to_str().unwrap());
        prop_assert!(!cookie.to_ascii_lowercase().split(';').skip(1).any(|part| part.trim_start().starts_with("domain=")));
    }
}

const ASKED: Asked<'static> = Asked {
    prefix: "/clusters/c1/proxy",
    hosts: &[b"gateway.example", b"shop.example"],
    upgrade: None,
    accepts_trailers: false,
};

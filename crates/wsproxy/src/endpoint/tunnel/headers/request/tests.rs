//! Tests of the headers of requests.

use http::Request;
use proptest::prelude::*;
use wsproxy_proto::trace_context::TraceContext;

use super::*;

/// A request with these lines, besides its host.
fn parts(lines: &[(&str, &str)]) -> Parts {
    let mut parts = bare(lines);
    parts.headers.insert(header::HOST, HeaderValue::from_static("gateway.example"));
    parts
}

fn bare(lines: &[(&str, &str)]) -> Parts {
    let (mut parts, ()) = Request::builder().uri("/").body(()).unwrap().into_parts();
    for (name, value) in lines {
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
        parts.headers.append(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
    }
    parts
}

fn rules(cluster: &Id) -> Rules<'_> {
    let (passes_authorization, passes_cookies) = (false, false);
    Rules { cluster, via: "wsproxy-00112233aabbccdd", passes_authorization, passes_cookies }
}

fn sender() -> Sender {
    let peer = "192.0.2.1".parse().unwrap();
    let written = ForwardedHeader::Auto;
    Sender { peer, client: peer, is_trusted: false, written, is_tls: true }
}

fn marks() -> Marks {
    let trace = TraceContext::parse(TRACE.as_bytes()).unwrap();
    Marks { trace, state: None, request_id: "r-1".into() }
}

fn cluster() -> Id {
    Id::parse("c1").unwrap()
}

/// The headers that every request has in the end.
fn added() -> Vec<(String, String)> {
    owned(&[
        ("host", "gateway.example"),
        ("x-forwarded-for", "192.0.2.1"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "gateway.example"),
        ("x-forwarded-prefix", "/clusters/c1/proxy"),
        ("via", "1.1 wsproxy-00112233aabbccdd"),
        ("traceparent", TRACE),
        ("x-request-id", "r-1"),
    ])
}

fn owned(lines: &[(&str, &str)]) -> Vec<(String, String)> {
    lines.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
}

#[test]
fn the_hosts_are_those_of_the_client_and_of_trusted_proxies() {
    let hosts_of = |lines: &[(&str, &str)], is_trusted: bool| {
        let (cluster, sender) = (cluster(), Sender { is_trusted, ..sender() });
        let block = block(&parts(lines), None, &rules(&cluster), &sender, &marks()).unwrap();
        let text = |host: &&[u8]| String::from_utf8(host.to_vec()).unwrap();
        hosts(block.headers()).iter().map(text).collect::<Vec<_>>()
    };
    let own = "gateway.example";
    assert_eq!(hosts_of(&[], false), [own, own]);
    let lines = [("x-forwarded-host", "a.example, b.example:8443")];
    assert_eq!(hosts_of(&lines, true), ["a.example", "b.example:8443", own]);
    assert_eq!(hosts_of(&lines, false), [own, own]);
    let lines = [("forwarded", "for=192.0.2.7;Host=\"a.example:1\";proto=https, host=b.example")];
    assert_eq!(hosts_of(&lines, true), ["a.example:1", "b.example", own, own]);
    assert_eq!(hosts_of(&lines, false), [own, own]);
}

fn read(block: &HeaderBlock) -> Vec<(String, String)> {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    block.headers().iter().map(|(name, value)| (text(name), text(value))).collect()
}

fn made(parts: &Parts, rules: &Rules<'_>, sender: &Sender) -> Result<Vec<(String, String)>, Code> {
    let made = block(parts, None, rules, sender, &marks());
    made.as_ref().map(read).map_err(|refusal| refusal.code)
}

/// Headers of the client's that pass with the default rules.
fn passed(lines: &[(&str, &str)]) -> Result<Vec<(String, String)>, Code> {
    let all = made(&parts(lines), &rules(&cluster()), &sender())?;
    Ok(all.into_iter().filter(|line| !added().contains(line)).collect())
}

/// Values of a header in the end.
fn values(parts: &Parts, sender: &Sender, name: &str) -> Vec<String> {
    let made = made(parts, &rules(&cluster()), sender).unwrap();
    made.into_iter().filter(|line| line.0 == name).map(|line| line.1).collect()
}

#[test]
fn ordinary_headers_pass_and_the_gateway_adds_its_own() {
    let lines = [
        ("accept", "*/*"),
        ("accept", "text/plain"),
        ("content-type", "application/json"),
        ("content-length", "5"),
        ("expect", "100-continue"),
        ("origin", "https://example.org"),
        ("sec-websocket-key", "a"),
        ("range", "bytes=0-"),
        ("x-custom", "\u{e4} \u{1f600}"),
        ("x-empty", ""),
    ];
    let made = made(&parts(&lines), &rules(&cluster()), &sender()).unwrap();
    assert_eq!(made, [owned(&lines), added()].concat());
}

#[test]
fn headers_of_the_hop_and_of_the_gateway_do_not_pass() {
    for name in [
        "connection",
        "keep-alive",
        "proxy-authorization",
        "Proxy-Connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "http2-settings",
        "authorization",
        "cookie",
        "Impersonate-User",
        "impersonate-extra-scopes",
        "IMPERSONATE_GROUP",
        "x-remote-user",
        "X-Remote-Extra-A",
        "X-Wsproxy-Authorization",
        "x-wsproxy-peer",
        "X_Wsproxy_Foo",
        "x-wsproxy_foo",
        "x-forwarded-for",
        "x-forwarded-user",
        "x-forwarded-prefix",
        "X_Forwarded_For",
        "forwarded",
        "x-real-ip",
        "traceparent",
        "tracestate",
        "x-request-id",
        "transfer_encoding",
        "content_length",
        "Content_Type",
    ] {
        let value = if name == "transfer-encoding" { "chunked" } else { "x-value" };
        let parts = parts(&[(name, value)]);
        assert_eq!(made(&parts, &rules(&cluster()), &sender()).unwrap(), added(), "{name}");
    }
    // A name with an underscore that has no rule passes.
    assert_eq!(passed(&[("x_custom", "1")]).unwrap(), owned(&[("x_custom", "1")]));
}

#[test]
fn connection_removes_what_it_names_and_nothing_that_is_added() {
    let lines = [("connection", "close, X-A"), ("x-a", "1"), ("x-b", "2"), ("close", "3")];
    assert_eq!(passed(&lines).unwrap(), owned(&[("x-b", "2")]));
    for name in ["impersonate-user", "X_Forwarded_For", "via", "Host", "x-wsproxy-a", "expect"] {
        let lines = [("connection", "keep-alive"), ("connection", name)];
        assert_eq!(passed(&lines), Err(Code::BadHeader), "{name}");
    }
    assert_eq!(passed(&[("connection", "a b")]), Err(Code::BadHeader));
}

#[test]
fn a_head_that_two_servers_read_differently_is_refused() {
    for lines in [
        &[("content-length", "5"), ("transfer-encoding", "chunked")][..],
        &[("content-length", "5"), ("content-length", "5")],
        &[("content-length", "5"), ("content-length", "6")],
        &[("content-length", "5, 5")],
        &[("content-length", "+5")],
        &[("content-length", "0x5")],
        &[("content-length", "-1")],
        &[("content-length", " 5")],
        &[("content-length", "")],
        &[("transfer-encoding", "gzip, chunked")],
        &[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")],
        &[("transfer-encoding", "identity")],
        &[("x-a", "a\tb")],
        &[("host", "b")],
    ] {
        // `parts` would replace a host.
        let mut request = bare(lines);
        request.headers.append(header::HOST, HeaderValue::from_static("a"));
        assert_eq!(
            made(&request, &rules(&cluster()), &sender()),
            Err(Code::BadHeader),
            "{lines:?}"
        );
    }
    assert_eq!(made(&bare(&[]), &rules(&cluster()), &sender()), Err(Code::BadHeader));
    assert!(passed(&[("transfer-encoding", "Chunked")]).is_ok());
    // The library refuses other control bytes, and so no value has them here.
    for value in ["a\r\nb: c", "a\0", "a\x1f", "a\x7f", "a\r\n b"] {
        assert!(HeaderValue::from_bytes(value.as_bytes()).is_err());
    }
    let mut old = bare(&[]);
    old.version = Version::HTTP_10;
    let made = made(&old, &rules(&cluster()), &sender()).unwrap();
    assert!(made.contains(&("via".into(), "1.0 wsproxy-00112233aabbccdd".into())));
    assert!(!made.iter().any(|(name, _)| name == "host" || name == "x-forwarded-host"));
}

#[test]
fn a_request_that_was_here_before_is_a_loop() {
    let name = "wsproxy-00112233aabbccdd";
    for via in [
        format!("1.1 {name}"),
        format!("1.1 a, 1.0 {name}"),
        format!("HTTP/1.1 {name} (comment)"),
        format!("1.1 {}", name.to_uppercase()),
        format!("1.1 a ({name})"),
        format!("1.1  {name},"),
    ] {
        assert_eq!(passed(&[("via", &via)]), Err(Code::Loop), "{via}");
        assert_eq!(passed(&[("via", "1.1 a"), ("via", &via)]), Err(Code::Loop));
    }
    let others = [("via", "1.1 wsproxy-ffffffffffffffff"), ("via", "1.1 wsproxy-")];
    let mut request = parts(&others);
    let expected = [others[0].1, others[1].1, "1.1 wsproxy-00112233aabbccdd"];
    assert_eq!(values(&request, &sender(), "via"), expected);
    // It cannot be hidden.
    let connection = HeaderValue::from_static("via");
    request.headers.insert(header::CONNECTION, connection);
    assert_eq!(made(&request, &rules(&cluster()), &sender()), Err(Code::BadHeader));
}

#[test]
fn the_name_in_via_is_of_the_deployment_and_the_cluster() {
    let name = via_name("eu", &cluster());
    assert_eq!(name, via_name("eu", &cluster()));
    assert!(name.len() == 24 && name.starts_with("wsproxy-"));
    assert_ne!(name, via_name("us", &cluster()));
    assert_ne!(name, via_name("eu", &Id::parse("c2").unwrap()));
}

#[test]
fn credentials_and_cookies_pass_where_the_rules_say_so() {
    let lines = [("authorization", "Bearer a"), ("cookie", "a=b"), ("cookie", "c=d")];
    let cluster = cluster();
    let both = Rules { passes_authorization: true, passes_cookies: true, ..rules(&cluster) };
    let all = made(&parts(&lines), &both, &sender()).unwrap();
    assert_eq!(all, [owned(&lines), added()].concat());
    assert_eq!(passed(&lines).unwrap(), []);
    let authorization = Rules { passes_cookies: false, ..both };
    let all = made(&parts(&lines), &authorization, &sender()).unwrap();
    assert_eq!(all, [owned(&lines[..1]), added()].concat());
}

#[test]
fn upgrades_and_trailers_have_their_headers() {
    let lines = [
        ("connection", "upgrade, te"),
        ("upgrade", "websocket"),
        ("te", "gzip, trailers"),
        ("trailer", "x-sum, host"),
    ];
    let upgrade = HeaderValue::from_static("websocket");
    let made = block(&parts(&lines), Some(&upgrade), &rules(&cluster()), &sender(), &marks());
    let made = read(&made.unwrap());
    let wanted = owned(&[("te", "trailers"), ("trailer", "x-sum"), ("upgrade", "websocket")]);
    assert_eq!(made[1..4], wanted);
    assert_eq!(made.len(), added().len() + 3);
    // No trailers, no `Trailer`.
    assert_eq!(passed(&[("trailer", "x-sum")]).unwrap(), []);
}

#[test]
fn a_host_in_the_target_counts_before_the_header() {
    let mut request = parts(&[]);
    request.uri = "http://other.example:8080/clusters/c1/proxy".parse().unwrap();
    for name in ["host", "x-forwarded-host"] {
        assert_eq!(values(&request, &sender(), name), ["other.example:8080"]);
    }
}

#[test]
fn only_trusted_proxies_name_clients() {
    let lines = [
        ("x-forwarded-for", "198.51.100.7"),
        ("x-forwarded-for", "203.0.113.1, 10.0.0.2"),
        ("x-forwarded-proto", "http"),
        ("x-forwarded-host", "public.example"),
        ("x-forwarded-port", "8443"),
        ("x-forwarded-prefix", "/outer"),
        ("x-real-ip", "198.51.100.7"),
        ("x_forwarded_for", "6.6.6.6"),
        ("x_forwarded_proto", "gopher"),
    ];
    let client = "203.0.113.1".parse().unwrap();
    let trusted = Sender { is_trusted: true, client, ..sender() };
    let request = parts(&lines);
    let of = |name| values(&request, &trusted, name);
    assert_eq!(of("x-forwarded-for"), ["198.51.100.7, 203.0.113.1, 10.0.0.2, 192.0.2.1"]);
    assert_eq!(of("x-forwarded-proto"), ["http"]);
    assert_eq!(of("x-forwarded-host"), ["public.example"]);
    assert_eq!(of("x-forwarded-port"), ["8443"]);
    assert_eq!(of("x-forwarded-prefix"), ["/clusters/c1/proxy"]);
    assert_eq!(of("x-real-ip"), ["198.51.100.7"]);
    assert_eq!(of("x_forwarded_for"), [] as [&str; 0]);
    assert_eq!(of("x_forwarded_proto"), [] as [&str; 0]);
    assert_eq!(passed(&lines).unwrap(), []);
}

#[test]
fn a_chain_that_a_client_may_have_written_is_replaced() {
    let lines = [("x-forwarded-for", "6.6.6.6"), ("forwarded", "for=203.0.113.1")];
    let request = parts(&lines);
    let client = "203.0.113.1".parse().unwrap();
    let trusted = |written, client| Sender { is_trusted: true, client, written, ..sender() };
    let peer = sender().peer;
    for (sender, chain, forwarded) in [
        (
            trusted(ForwardedHeader::Forwarded, client),
            "203.0.113.1, 192.0.2.1",
            Some("for=203.0.113.1"),
        ),
        (
            trusted(ForwardedHeader::XForwardedFor, "6.6.6.6".parse().unwrap()),
            "6.6.6.6, 192.0.2.1",
            None,
        ),
        // They contradict each other.
        (trusted(ForwardedHeader::Auto, peer), "192.0.2.1", None),
        (trusted(ForwardedHeader::Auto, client), "6.6.6.6, 192.0.2.1", Some("for=203.0.113.1")),
        (sender(), "192.0.2.1", None),
    ] {
        assert_eq!(values(&request, &sender, "x-forwarded-for"), [chain], "{sender:?}");
        let expected: Vec<_> = forwarded.into_iter().collect();
        assert_eq!(values(&request, &sender, "forwarded"), expected, "{sender:?}");
    }
}

#[test]
fn a_client_finds_its_trace_state_again() {
    let marks = Marks { state: Some("a=1".into()), ..marks() };
    let made = block(&parts(&[]), None, &rules(&cluster()), &sender(), &marks).unwrap();
    assert!(read(&made).contains(&("tracestate".into(), "a=1".into())));
}

#[test]
fn a_head_that_no_block_can_hold_is_too_large() {
    let long = "a".repeat(256);
    assert_eq!(passed(&[(&long, "")]), Err(Code::HeadTooLarge));
    assert!(passed(&[(&long[..255], "")]).is_ok());
    let value = "v".repeat(40_000);
    assert_eq!(passed(&[("x-a", &value), ("x-b", &value)]), Err(Code::HeadTooLarge));
    let names: Vec<_> = (0..16_000).map(|n| format!("x-{n}")).collect();
    let bomb: Vec<_> = names.iter().map(|name| (name.as_str(), "")).collect();
    assert_eq!(passed(&bomb), Err(Code::HeadTooLarge));
    let options = "a,".repeat(30_000);
    assert_eq!(passed(&[("connection", &options)]).unwrap(), []);
}

proptest! {
    /// Whatever a client sends: a header of the gateway is there once, with the gateway's value.
    #[test]
    fn no_client_writes_a_header_of_the_gateway(
        lines in proptest::collection::vec(
            (
                "(X[-_]Forwarded[-_](For|Proto|Host|Prefix|User)|X[-_](Wsproxy|Remote)[-_]A|Impersonate[-_]User|\
                  Forwarded|X-Real-IP|Authorization|Cookie|Connection|Via|Host|Traceparent|X[-_]Request[-_]Id)",
                "[a-z,. -]{0,12}|impersonate-user|x-forwarded-for|x-b|upgrade",
            ),
            0..6,
        ),
    ) {
        let lines: Vec<_> = lines.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        if let Ok(made) = made(&bare(&lines), &rules(&cluster()), &sender()) {
            let known = added();
            for (name, value) in &made {
                let canonical = name.replace('_', "-");
                prop_assert!(name != "via" || !lines.is_empty() || known.contains(&(name.clone(), value.clone())));
                let is_named = ["x-wsproxy", "x-remote", "impersonate", "authorization", "cookie", "connection"];
                prop_assert!(!is_named.iter().any(|prefix| canonical.starts_with(prefix)), "{name}");
                if canonical.starts_with("x-forwarded") && canonical != "x-forwarded-host" {
                    prop_assert!(known.contains(&(name.clone(), value.clone())), "{name}: {value}");
                }
            }
            for name in ["x-forwarded-for", "x-forwarded-prefix", "x-forwarded-proto", "traceparent", "x-request-id"] {
                prop_assert_eq!(made.iter().filter(|line| line.0 == name).count(), 1, "{}", name);
            }
        }
    }
}

const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

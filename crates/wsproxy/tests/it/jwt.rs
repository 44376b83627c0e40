//! Tokens of an issuer that publishes its keys: rotation, and an issuer that fails in every way.

use std::{
    io::Write,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt, future::join_all};
use jsonwebtoken::Algorithm;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use serde_json::json;
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy::{
    auth::{
        fixed_keys::{FixedKeys, KeyRing},
        jwt::{Claims, JwtError, JwtVerifier},
    },
    config,
};

use crate::support::{
    binary::Binary,
    eventually,
    issuer::{Answer, Issuer, SigningKey, now},
    redis_server::free_port,
    soon,
};

/// A verifier and the tasks behind it.
struct Gateway {
    verifier: JwtVerifier,
    tasks: TaskTracker,
    end: CancellationToken,
}

impl Gateway {
    fn new(config: &config::JwtConfig) -> Self {
        let (tasks, end) = (TaskTracker::new(), CancellationToken::new());
        let keys = FixedKeys::new(KeyRing::read(config).unwrap());
        let verifier = JwtVerifier::new(config, &keys, &tasks, end.clone()).unwrap();
        Self { verifier, tasks, end }
    }

    async fn verify(&self, token: &str) -> Result<Claims, JwtError> {
        soon("a verdict", self.verifier.verify(token, now())).await
    }

    fn verify_now(&self, token: &str) -> Result<Claims, JwtError> {
        self.verifier.verify_now(token, now())
    }

    /// Fetches that were begun, and those that failed.
    fn fetches(&self) -> (u64, u64) {
        let counters = self.verifier.jwks_counters().unwrap();
        (counters.fetches.value(), counters.failures.value())
    }
}

fn config(url: String, refresh: Duration) -> config::JwtConfig {
    config::JwtConfig {
        jwks_url: Some(url),
        jwks_refresh: refresh,
        jwks_timeout: Duration::from_secs(20),
        algorithms: vec![Algorithm::ES256],
        ..config::JwtConfig::default()
    }
}

#[tokio::test]
async fn only_the_first_token_waits_for_the_jwks() {
    let key = SigningKey::new("a");
    let issuer = Issuer::start(Answer::keys(&[&key])).await;
    let gateway = Gateway::new(&config(issuer.url(), HOUR));
    assert_eq!(gateway.verify_now(&key.token()), Err(JwtError::Unavailable));
    assert_eq!(gateway.verify(&key.token()).await.unwrap().user.as_str(), "u-1");
    for _ in 0..3 {
        assert!(gateway.verify_now(&key.token()).is_ok());
    }
    assert_eq!((issuer.requests(), gateway.fetches()), (1, (1, 0)));
    let forged = SigningKey::new("b").sign(Some("a".into()));
    assert_eq!(gateway.verify(&forged).await, Err(JwtError::Signature));
    assert_eq!(issuer.requests(), 1);
}

#[tokio::test]
async fn a_new_key_is_accepted_after_one_fetch() {
    let (old, new) = (SigningKey::new("old"), SigningKey::new("new"));
    let issuer = Issuer::start(Answer::keys(&[&old])).await;
    let gateway = Gateway::new(&config(issuer.url(), HOUR));
    assert!(gateway.verify(&old.token()).await.is_ok());
    issuer.answer(Answer::keys(&[&old, &new]));
    let tokens = [new.token(), new.token(), old.token(), new.token()];
    for result in join_all(tokens.iter().map(|token| gateway.verify(token))).await {
        assert!(result.is_ok());
    }
    assert_eq!(issuer.requests(), 2);
}

#[tokio::test]
async fn a_new_key_is_accepted_from_tokens_that_name_none() {
    let (old, new) = (SigningKey::new("old"), SigningKey::new("new"));
    let issuer = Issuer::start(Answer::keys(&[&old])).await;
    let gateway = Gateway::new(&config(issuer.url(), HOUR));
    assert!(gateway.verify(&old.sign(None)).await.is_ok());
    issuer.answer(Answer::keys(&[&old, &new]));
    assert!(gateway.verify(&new.sign(None)).await.is_ok());
    assert_eq!(issuer.requests(), 2);
}

#[tokio::test]
async fn made_up_keys_cost_the_issuer_one_request_in_ten_seconds() {
    let (key, other) = (SigningKey::new("a"), SigningKey::new("b"));
    let issuer = Issuer::start(Answer::keys(&[&key])).await;
    let gateway = Gateway::new(&config(issuer.url(), HOUR));
    assert!(gateway.verify(&key.token()).await.is_ok());
    for _ in 0..3 {
        let tokens: Vec<_> = (0..40).map(|n| other.sign(Some(format!("made-up-{n}")))).collect();
        for result in join_all(tokens.iter().map(|token| gateway.verify(token))).await {
            assert_eq!(result, Err(JwtError::UnknownKey));
        }
    }
    assert_eq!((issuer.requests(), gateway.fetches()), (2, (2, 0)));
    assert!(gateway.verify_now(&key.token()).is_ok());
}

#[tokio::test]
async fn a_key_that_is_withdrawn_is_refused_after_the_refresh() {
    let (old, new) = (SigningKey::new("old"), SigningKey::new("new"));
    let issuer = Issuer::start(Answer::keys(&[&old, &new])).await;
    let gateway = Gateway::new(&config(issuer.url(), OFTEN));
    assert!(gateway.verify(&old.token()).await.is_ok());
    issuer.answer(Answer::keys(&[&new]));
    let refused = || gateway.verify_now(&old.token()) == Err(JwtError::UnknownKey);
    eventually("the old key is refused", refused).await;
    assert!(gateway.verify_now(&new.token()).is_ok());
    issuer.answer(Answer::keys(&[]));
    let refused = || gateway.verify_now(&new.token()) == Err(JwtError::UnknownKey);
    eventually("all keys are withdrawn", refused).await;
}

#[tokio::test]
async fn known_keys_stay_in_use_while_the_issuer_is_down() {
    let (old, new) = (SigningKey::new("old"), SigningKey::new("new"));
    let issuer = Issuer::start(Answer::keys(&[&old])).await;
    let gateway = Gateway::new(&config(issuer.url(), OFTEN));
    assert!(gateway.verify(&old.token()).await.is_ok());
    issuer.answer(Answer::Nothing);
    eventually("fetches fail", || gateway.fetches().1 > 2).await;
    assert!(gateway.verify(&old.token()).await.is_ok());
    // It is unknown whether this token is good: the client is to come back.
    assert_eq!(gateway.verify(&new.token()).await, Err(JwtError::Unavailable));
    issuer.answer(Answer::keys(&[&new]));
    eventually("the new key is known", || gateway.verify_now(&new.token()).is_ok()).await;
    assert_eq!(gateway.verify_now(&old.token()), Err(JwtError::UnknownKey));
}

#[tokio::test]
async fn nothing_is_decided_before_the_issuer_was_reached() {
    let absent = free_port();
    let gateway = Gateway::new(&config(format!("http://127.0.0.1:{absent}/jwks.json"), HOUR));
    assert_eq!(gateway.verify(&SigningKey::new("a").token()).await, Err(JwtError::Unavailable));

    let key = SigningKey::new("a");
    let issuer = Issuer::start(Answer::Nothing).await;
    let gateway = Gateway::new(&config(issuer.url(), OFTEN));
    assert_eq!(gateway.verify(&key.token()).await, Err(JwtError::Unavailable));
    issuer.answer(Answer::keys(&[&key]));
    eventually("the keys are known", || gateway.verify_now(&key.token()).is_ok()).await;
}

#[tokio::test]
async fn what_is_no_set_of_keys_is_no_answer() {
    let key = SigningKey::new("a");
    let good = json!({ "keys": [key.jwk] }).to_string();
    let elsewhere = Issuer::start(Answer::keys(&[&key])).await;
    let redirect = format!("302 Found\r\nlocation: {}", elsewhere.url());
    let answers = [
        Answer::body(""),
        Answer::body("<html>Sign in</html>"),
        Answer::body("{}"),
        Answer::body("{\"keys\":{}}"),
        Answer::body("{\"keys\":[]}"),
        Answer::body("{\"keys\":[1,null,\"x\"]}"),
        Answer::body(&good[..good.len() - 1]),
        Answer::body(&"[".repeat(100_000)),
        Answer::body(&format!("{{\"keys\":[\"{}\"]}}", "x".repeat(256 * 1024))),
        Answer::with_status("404 Not Found", &good),
        Answer::with_status("500 Internal Server Error", &good),
        Answer::with_status(&redirect, &good),
        Answer::Bytes(format!("HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n{good}")),
        Answer::Bytes("SSH-2.0-OpenSSH_9.9\r\n".into()),
        Answer::Endless,
    ];
    for answer in answers {
        let issuer = Issuer::start(answer.clone()).await;
        let gateway = Gateway::new(&config(issuer.url(), HOUR));
        let result = gateway.verify(&key.token()).await;
        let answer = format!("{answer:?}").chars().take(80).collect::<String>();
        assert_eq!(result, Err(JwtError::Unavailable), "{answer}");
        assert_eq!(gateway.fetches().1, 1, "{answer}");
    }
    assert_eq!(elsewhere.requests(), 0);
}

#[tokio::test]
async fn an_answer_without_end_is_left() {
    let issuer = Issuer::start(Answer::Endless).await;
    let gateway = Gateway::new(&config(issuer.url(), HOUR));
    eventually("the fetch fails", || gateway.fetches().1 == 1).await;
    // What is beyond the bound sits in buffers of the kernel.
    assert!(issuer.written() < 16 * 1024 * 1024, "{}", issuer.written());
}

#[tokio::test]
async fn a_slow_issuer_delays_only_tokens_with_unknown_keys() {
    let (key, other) = (SigningKey::new("a"), SigningKey::new("b"));
    let issuer = Issuer::start(Answer::keys(&[&key])).await;
    let timeout = Duration::from_millis(300);
    let config = config::JwtConfig { jwks_timeout: timeout, ..config(issuer.url(), HOUR) };
    let gateway = Gateway::new(&config);
    assert!(gateway.verify(&key.token()).await.is_ok());
    issuer.answer(Answer::Silence);
    let token = other.token();
    let (start, mut waiting) = (Instant::now(), Box::pin(gateway.verify(&token)));
    assert_eq!((&mut waiting).now_or_never(), None);
    assert!(gateway.verify_now(&key.token()).is_ok());
    assert!(gateway.verify(&key.token()).await.is_ok());
    assert_eq!(waiting.await, Err(JwtError::Unavailable));
    assert!(start.elapsed() >= timeout);
    eventually("the fetch is given up", || gateway.fetches().1 == 1).await;
    assert!(gateway.verify_now(&key.token()).is_ok());
}

#[tokio::test]
async fn a_jwks_key_is_found_and_published_secrets_are_ignored() {
    let key = SigningKey::new("a");
    let mut for_others = SigningKey::new("a").jwk;
    for_others["use"] = "enc".into();
    let secret = "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0";
    let keys = json!({ "keys": [
        { "kty": "oct", "kid": "s", "k": secret, "alg": "HS256" },
        for_others,
        { "kty": "XYZ", "kid": "a" },
        7,
        key.jwk,
    ]});
    let issuer = Issuer::start(Answer::body(&keys.to_string())).await;
    let config = config::JwtConfig {
        algorithms: vec![Algorithm::ES256, Algorithm::HS256],
        secret_key: Some("a secret that is not published....".into()),
        ..config(issuer.url(), HOUR)
    };
    let gateway = Gateway::new(&config);
    assert!(gateway.verify(&key.token()).await.is_ok());
    let header = jsonwebtoken::Header { kid: Some("s".into()), ..Default::default() };
    let published = jsonwebtoken::EncodingKey::from_base64_secret(secret).unwrap();
    let claims = json!({ "sub": "root", "exp": now() + 600 });
    let forged = jsonwebtoken::encode(&header, &claims, &published).unwrap();
    assert_eq!(gateway.verify(&forged).await, Err(JwtError::Signature));
}

#[tokio::test]
async fn jwks_needs_a_trusted_tls_certificate() {
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority =
        rcgen::CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    let (pair, params) =
        (KeyPair::generate().unwrap(), CertificateParams::new(vec!["127.0.0.1".into()]));
    let certificate = params.unwrap().signed_by(&pair, &authority).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(pair.serialize_der()));
    let tls = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)
        .unwrap();
    let key = SigningKey::new("a");
    let tls = TlsAcceptor::from(Arc::new(tls));
    let issuer = Issuer::start_with(Answer::keys(&[&key]), Some(tls)).await;
    let stranger = config(issuer.url().replace("http:", "https:"), HOUR);
    let mut ca_file = tempfile::NamedTempFile::new().unwrap();
    ca_file.write_all(authority.pem().as_bytes()).unwrap();
    let friend = config::JwtConfig { ca_file: Some(ca_file.path().into()), ..stranger.clone() };
    assert!(Gateway::new(&friend).verify(&key.token()).await.is_ok());
    assert_eq!(issuer.requests(), 1);
    assert_eq!(Gateway::new(&stranger).verify(&key.token()).await, Err(JwtError::Unavailable));
    assert_eq!(issuer.requests(), 1);
}

#[tokio::test]
async fn published_keys_without_issuer_or_audience_are_warned_of_once() {
    let issuer = Issuer::start(Answer::keys(&[&SigningKey::new("a")])).await;
    let (url, own) = (issuer.url(), ("WSPROXY_JWT__ISSUER", "https://issuer.example/"));
    let start = async |further: &[(&str, &str)]| {
        let mut environment = vec![
            ("WSPROXY_ENDPOINTS__EVENTS", "true"),
            ("WSPROXY_JWT__ALGORITHMS", "ES256"),
            ("WSPROXY_JWT__JWKS_URL", &url),
        ];
        environment.extend(further);
        let log = Binary::start(&environment).await.log();
        ["jwt.issuer", "jwt.audience"].map(|key| log.matches(&format!("without {key}:")).count())
    };
    assert_eq!(start(&[]).await, [1, 1]);
    assert_eq!(start(&[own]).await, [0, 1]);
    assert_eq!(start(&[own, ("WSPROXY_JWT__AUDIENCE", "gateway")]).await, [0, 0]);
}

#[tokio::test]
async fn fetching_ends_at_once_when_the_instance_does() {
    let issuer = Issuer::start(Answer::Silence).await;
    let gateway = Gateway::new(&config(issuer.url(), HOUR));
    eventually("the issuer is asked", || issuer.requests() == 1).await;
    gateway.end.cancel();
    gateway.tasks.close();
    tokio::time::timeout(Duration::from_secs(10), gateway.tasks.wait()).await.unwrap();
}

const HOUR: Duration = Duration::from_secs(3600);
const OFTEN: Duration = Duration::from_millis(20);

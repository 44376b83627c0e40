//! An issuer of tokens that publishes its keys over HTTP, well or badly.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::KeyPair;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;

/// The server's treatment of a request.
#[derive(Debug, Clone)]
pub enum Answer {
    /// Closes the connection without an answer.
    Nothing,
    /// Reads the request, and that is all.
    Silence,
    /// This, byte for byte.
    Bytes(String),
    /// The head of an answer, and then `x` for as long as anybody reads.
    Endless,
}

impl Answer {
    /// 200 with this body.
    pub fn body(body: &str) -> Self {
        Self::with_status("200 OK", body)
    }

    /// A status line, further header lines after it, and this body.
    pub fn with_status(status: &str, body: &str) -> Self {
        let length = body.len();
        Self::Bytes(format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n{body}"))
    }

    /// A JWKS with these keys.
    pub fn keys(keys: &[&SigningKey]) -> Self {
        let keys: Vec<_> = keys.iter().map(|key| &key.jwk).collect();
        Self::body(&json!({ "keys": keys }).to_string())
    }
}

/// The server. Dropping it stops it.
pub struct Issuer {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    answer: Mutex<Answer>,
    requests: AtomicUsize,
    written: AtomicUsize,
}

impl Issuer {
    pub async fn start(answer: Answer) -> Self {
        Self::start_with(answer, None).await
    }

    pub async fn start_with(answer: Answer, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (requests, written) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let shared = Arc::new(Shared { answer: Mutex::new(answer), requests, written });
        let task = tokio::spawn(serve(listener, tls, Arc::clone(&shared)));
        Self { address, shared, task }
    }

    pub fn url(&self) -> String {
        format!("http://{}/jwks.json", self.address)
    }

    /// From now on.
    pub fn answer(&self, answer: Answer) {
        *self.shared.answer.lock().unwrap() = answer;
    }

    /// Requests that were read so far.
    pub fn requests(&self) -> usize {
        self.shared.requests.load(SeqCst)
    }

    /// Bytes of endless answers that gateways took.
    pub fn written(&self) -> usize {
        self.shared.written.load(SeqCst)
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, tls: Option<TlsAcceptor>, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (shared, tls) = (Arc::clone(&shared), tls.clone());
        tokio::spawn(async move {
            match tls {
                None => respond::<TcpStream>(stream, &shared).await,
                Some(tls) => respond(tls.accept(stream).await?, &shared).await,
            }
        });
    }
}

async fn respond<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    shared: &Shared,
) -> std::io::Result<()> {
    let (mut request, mut buffer) = (Vec::new(), [0; 1024]);
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read(&mut buffer).await? {
            0 => return Ok(()),
            n => request.extend_from_slice(&buffer[..n]),
        }
    }
    assert!(request.starts_with(b"GET /jwks.json HTTP/1.1\r\n"));
    let answer = shared.answer.lock().unwrap().clone();
    shared.requests.fetch_add(1, SeqCst);
    match answer {
        Answer::Nothing => {}
        Answer::Silence => while stream.read(&mut buffer).await? > 0 {},
        Answer::Bytes(bytes) => {
            stream.write_all(bytes.as_bytes()).await?;
            stream.shutdown().await?;
        }
        Answer::Endless => {
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n{\"keys\":[\"").await?;
            loop {
                stream.write_all(&[b'x'; 1024]).await?;
                shared.written.fetch_add(1024, SeqCst);
            }
        }
    }
    Ok(())
}

/// A key pair of an issuer.
pub struct SigningKey {
    pub id: String,
    pub jwk: Value,
    key: EncodingKey,
}

impl SigningKey {
    /// ES256, which costs little to make.
    pub fn new(id: &str) -> Self {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let [x, y] =
            [1..33, 33..65].map(|part| BASE64_URL_SAFE_NO_PAD.encode(&pair.public_key_raw()[part]));
        let jwk = json!({
            "kty": "EC", "crv": "P-256", "x": x, "y": y, "use": "sig", "alg": "ES256", "kid": id,
        });
        let key = EncodingKey::from_ec_pem(pair.serialize_pem().as_bytes()).unwrap();
        Self { id: id.into(), jwk, key }
    }

    /// A token that names this key.
    pub fn token(&self) -> String {
        self.sign(Some(self.id.clone()))
    }

    /// A token that names this key, or another, or none.
    pub fn sign(&self, kid: Option<String>) -> String {
        let header = Header { kid, ..Header::new(Algorithm::ES256) };
        let claims = json!({ "sub": "u-1", "exp": now() + 600 });
        jsonwebtoken::encode(&header, &claims, &self.key).unwrap()
    }
}

/// Unix seconds.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

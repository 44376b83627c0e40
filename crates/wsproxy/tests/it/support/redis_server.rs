//! A redis-server process of a test's own, which can be killed, stopped, restarted and asked.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A running server; dropping it kills it.
pub struct RedisServer {
    directory: TempDir,
    port: u16,
    child: Option<Child>,
    options: Options,
}

/// Options of a server.
#[derive(Default, Clone)]
pub struct Options {
    /// Password of the default user.
    pub password: Option<String>,
    /// Whether the port speaks TLS, with a certificate for `localhost` of the CA in [`RedisServer::ca_file`].
    pub tls: bool,
    /// Further arguments of `redis-server`.
    pub arguments: Vec<String>,
    /// Further variables of its environment.
    pub environment: Vec<(&'static str, String)>,
}

/// A server's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A string of any kind.
    Text(String),
    /// An error.
    Error(String),
    /// A number.
    Integer(i64),
    /// Nothing.
    Null,
    /// Several.
    Array(Vec<Self>),
}

impl RedisServer {
    /// A server on a free port, without password, persistence or TLS.
    pub fn start() -> Self {
        Self::start_with(Options::default())
    }

    /// A server with options.
    pub fn start_with(options: Options) -> Self {
        let mut server = Self::absent_with(options);
        server.restart();
        server
    }

    /// A port, address and folder for a server that is not started yet; [`Self::restart`] does.
    pub fn absent() -> Self {
        Self::absent_with(Options::default())
    }

    fn absent_with(options: Options) -> Self {
        let directory = tempfile::tempdir().unwrap();
        if options.tls {
            write_certificates(&directory);
        }
        Self { directory, port: free_port(), child: None, options }
    }

    /// Starts it, empty, on the same port as before.
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "it runs");
        // Another test may have taken the port between the look and the start; a server that ran keeps it.
        for _ in 0..5 {
            self.child = Some(self.spawn());
            if self.is_ready() {
                return;
            }
            self.kill();
        }
        let log = fs::read_to_string(self.path("log")).unwrap_or_default();
        panic!("redis-server does not start:\n{log}");
    }

    fn spawn(&self) -> Child {
        let port = self.port.to_string();
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        command.args(["--daemonize", "no", "--repl-diskless-sync-delay", "0", "--hz", "100"]);
        command.arg("--dir").arg(self.directory.path());
        command.arg("--unixsocket").arg(self.path("socket"));
        command.arg("--logfile").arg(self.path("log"));
        if self.options.tls {
            command.args(["--port", "0", "--tls-port", &port, "--tls-auth-clients", "no"]);
            command.arg("--tls-cert-file").arg(self.path("server.pem"));
            command.arg("--tls-key-file").arg(self.path("server.key"));
            command.arg("--tls-ca-cert-file").arg(self.ca_file());
        } else {
            command.args(["--port", &port]);
        }
        if let Some(password) = &self.options.password {
            command.args(["--requirepass", password]);
        }
        command.args(&self.options.arguments);
        command.envs(self.options.environment.iter().cloned());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().expect("redis-server is installed")
    }

    fn is_ready(&mut self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if self.child.as_mut().is_none_or(|child| child.try_wait().unwrap().is_some()) {
                return false;
            }
            if self.try_call(&["PING"]).is_ok_and(|answer| answer == Answer::Text("PONG".into())) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }

    /// `redis://127.0.0.1:port`, with the password; `rediss://localhost:port` with TLS.
    pub fn url(&self) -> String {
        self.url_on(self.port)
    }

    /// The same URL with another port, for a proxy.
    pub fn url_on(&self, port: u16) -> String {
        let password =
            self.options.password.as_ref().map(|word| format!(":{word}@")).unwrap_or_default();
        match self.options.tls {
            true => format!("rediss://{password}localhost:{port}"),
            false => format!("redis://{password}127.0.0.1:{port}"),
        }
    }

    /// Saves a snapshot of all data; answers it.
    pub fn snapshot(&self) -> Vec<u8> {
        assert_eq!(self.call(&["SAVE"]), Answer::Text("OK".into()));
        fs::read(self.path("dump.rdb")).unwrap()
    }

    /// Puts a snapshot where the next start finds it.
    pub fn put_snapshot(&self, snapshot: &[u8]) {
        fs::write(self.path("dump.rdb"), snapshot).unwrap();
    }

    /// Removes all data that a next start would find.
    pub fn forget(&self) {
        let _ = fs::remove_file(self.path("dump.rdb"));
        let _ = fs::remove_dir_all(self.path("appendonlydir"));
    }

    /// Publishes with history, as a worker with nothing but a Redis client does; answers the id.
    pub fn keep(&self, channel: &str, payload: &str) -> String {
        let log = format!("{{{channel}}}:log");
        let limits = ["1000", "1048576", "3600000"];
        let words =
            ["EVAL", PUBLISH, "1", &log, channel, payload, limits[0], limits[1], limits[2], ""];
        match self.call(&words) {
            Answer::Array(parts) => match parts.get(1) {
                Some(Answer::Text(id)) => id.clone(),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }

    /// `unix:///…/socket`.
    pub fn unix_url(&self) -> String {
        format!("unix://{}", self.path("socket").display())
    }

    /// The TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The certificate that signed the server's.
    pub fn ca_file(&self) -> PathBuf {
        self.path("ca.pem")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// SIGKILL: no farewell.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
            let _ = fs::remove_file(self.path("socket"));
        }
    }

    /// SIGSTOP: the kernel still answers for it, it does not.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn cont(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        send_signal(self.child.as_ref(), signal);
    }

    /// Executes a command over the server's Unix socket, as the default user.
    #[track_caller]
    pub fn call(&self, words: &[&str]) -> Answer {
        succeeded(words, self.try_call(words))
    }

    /// The same; an answer may be an error.
    pub fn try_call(&self, words: &[&str]) -> std::io::Result<Answer> {
        self.try_call_as(self.options.password.as_deref(), words)
    }

    /// Executes a command after its password was changed to this one.
    #[track_caller]
    pub fn call_as(&self, password: &str, words: &[&str]) -> Answer {
        self.try_call_as(Some(password), words).unwrap()
    }

    fn try_call_as(&self, password: Option<&str>, words: &[&str]) -> std::io::Result<Answer> {
        let mut stream = UnixStream::connect(self.path("socket"))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        exchange(&mut stream, password.as_slice(), words)
    }

    /// Makes it a replica of another port, which need not exist.
    pub fn replica_of(&self, port: u16) {
        self.call(&["REPLICAOF", "127.0.0.1", &port.to_string()]);
    }

    /// Makes it a master again.
    pub fn replica_of_no_one(&self) {
        self.call(&["REPLICAOF", "NO", "ONE"]);
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Answer {
    /// The number, where it is one.
    #[track_caller]
    pub fn integer(&self) -> i64 {
        let Self::Integer(number) = self else { panic!("{self:?} is no number") };
        *number
    }
}

/// A port without a listener now. It lies below those that the kernel gives to outgoing
/// connections, so that no other socket takes it while a server is down, and it is handed out only once.
pub fn free_port() -> u16 {
    static TAKEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut taken = TAKEN.lock().unwrap();
    loop {
        let port = rand::random_range(15_000..32_000);
        if !taken.contains(&port) && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            taken.insert(port);
            return port;
        }
    }
}

/// Sends a signal to a process that runs.
pub(super) fn send_signal(child: Option<&Child>, signal: Signal) {
    let pid = child.expect("it runs").id();
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
}

/// Executes a command over a new connection, behind a login: what `AUTH` takes, or nothing.
pub(super) fn exchange(
    stream: &mut (impl Read + Write),
    login: &[&str],
    words: &[&str],
) -> std::io::Result<Answer> {
    if !login.is_empty() {
        stream.write_all(&spell(&[&["AUTH"], login].concat()))?;
        read(&mut BufReader::new(&mut *stream))?;
    }
    stream.write_all(&spell(words))?;
    read(&mut BufReader::new(stream))
}

/// The answer to a command that must succeed.
#[track_caller]
pub(super) fn succeeded(words: &[&str], answer: std::io::Result<Answer>) -> Answer {
    match answer {
        Ok(Answer::Error(error)) => panic!("{words:?}: {error}"),
        Ok(answer) => answer,
        Err(error) => panic!("{words:?}: {error}"),
    }
}

/// Spells a command.
pub fn spell(words: &[&str]) -> Vec<u8> {
    let mut command = format!("*{}\r\n", words.len());
    for word in words {
        command += &format!("${}\r\n{word}\r\n", word.len());
    }
    command.into_bytes()
}

/// Reads one answer.
pub fn read(reader: &mut impl BufRead) -> std::io::Result<Answer> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let Some((kind, rest)) = line.trim_end().split_at_checked(1) else {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    };
    Ok(match kind {
        "+" => Answer::Text(rest.into()),
        "-" => Answer::Error(rest.into()),
        ":" => Answer::Integer(rest.parse().unwrap()),
        "$" | "*" if rest == "-1" => Answer::Null,
        "$" => {
            let mut bytes = vec![0; rest.parse::<usize>().unwrap() + 2];
            reader.read_exact(&mut bytes)?;
            bytes.truncate(bytes.len() - 2);
            Answer::Text(String::from_utf8_lossy(&bytes).into_owned())
        }
        "*" => {
            let count = rest.parse::<usize>().unwrap();
            Answer::Array((0..count).map(|_| read(reader)).collect::<Result<_, _>>()?)
        }
        _ => panic!("odd answer {line:?}"),
    })
}

fn write_certificates(directory: &TempDir) {
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_certificate = ca.self_signed(&ca_key).unwrap();
    let issuer = Issuer::new(ca, ca_key);
    let key = KeyPair::generate().unwrap();
    let names = vec!["localhost".to_owned()];
    let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
    fs::write(directory.path().join("ca.pem"), ca_certificate.pem()).unwrap();
    fs::write(directory.path().join("server.pem"), certificate.pem()).unwrap();
    fs::write(directory.path().join("server.key"), key.serialize_pem()).unwrap();
}

/// The script with which workers publish.
const PUBLISH: &str = include_str!("../../../../../spec/scripts/publish.lua");

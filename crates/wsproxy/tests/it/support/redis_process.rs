//! A redis-server process with a configuration file of its own, of which several make a deployment.

use std::{
    fs,
    io::BufReader,
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use rustix::process::Signal;

use super::redis_server::{Answer, exchange, read, send_signal, succeeded};

/// One process; dropping it kills it.
pub struct Server {
    port: u16,
    login: &'static [&'static str],
    arguments: Vec<String>,
    log: String,
    child: Option<Child>,
    is_stopped: AtomicBool,
}

/// A subscriber of one channel; dropping it hangs up.
pub struct Subscriber(BufReader<TcpStream>);

impl Server {
    /// A server that is not started yet. `login` is what `AUTH` takes; empty for none.
    pub fn of(
        folder: &Path,
        port: u16,
        login: &'static [&'static str],
        file: &Path,
        options: &[&str],
    ) -> Self {
        let mut arguments = vec![file.display().to_string()];
        arguments.extend(options.iter().map(|option| (*option).to_owned()));
        let log = folder.join(format!("{port}.log")).display().to_string();
        Self { port, login, arguments, log, child: None, is_stopped: AtomicBool::new(false) }
    }

    /// The TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether it is started, and not stopped.
    pub fn is_running(&self) -> bool {
        self.child.is_some() && !self.is_stopped.load(Ordering::Relaxed)
    }

    /// Starts it, with the file that it has changed, and waits for it.
    pub fn start(&mut self) {
        self.spawn();
        self.started();
    }

    /// Starts it.
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let mut command = Command::new("redis-server");
        command.args(&self.arguments).args(["--logfile", &self.log]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(command.spawn().expect("redis-server is installed"));
        self.is_stopped.store(false, Ordering::Relaxed);
    }

    /// Waits until it answers.
    pub fn started(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.try_call(&["PING"]).is_ok_and(|answer| answer == Answer::Text("PONG".into())) {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            assert!(Instant::now() < deadline, "it does not start:\n{log}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGKILL: no farewell.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGSTOP: the kernel still answers for it, it does not.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    /// SIGCONT.
    pub fn cont(&self) {
        self.signal(Signal::CONT);
        self.is_stopped.store(false, Ordering::Relaxed);
    }

    fn signal(&self, signal: Signal) {
        send_signal(self.child.as_ref(), signal);
    }

    /// Executes a command, which must succeed.
    #[track_caller]
    pub fn call(&self, words: &[&str]) -> Answer {
        succeeded(words, self.try_call(words))
    }

    /// Executes a command.
    pub fn try_call(&self, words: &[&str]) -> std::io::Result<Answer> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        exchange(&mut stream, self.login, words)
    }

    /// Subscribes to a channel over a connection of its own.
    pub fn subscribe(&self, channel: &str) -> Subscriber {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        exchange(&mut stream, self.login, &["SUBSCRIBE", channel]).unwrap();
        Subscriber(BufReader::new(stream))
    }

    /// Number of subscribers of a channel at this server.
    pub fn subscribers(&self, channel: &str) -> i64 {
        match self.call(&["PUBSUB", "NUMSUB", channel]) {
            Answer::Array(parts) => parts[1].integer(),
            other => panic!("{other:?}"),
        }
    }
}

impl Subscriber {
    /// The next message, once it has come.
    pub fn next(&mut self) -> String {
        match read(&mut self.0).unwrap() {
            Answer::Array(parts) => match &parts[..] {
                [_, _, Answer::Text(message)] => message.clone(),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Replaces each text, which must be there.
pub fn replaced(text: &str, changes: &[(&str, &str)]) -> String {
    changes.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "the file has no {from:?}");
        text.replace(from, to)
    })
}

/// Waits up to a minute, and looks often: times are measured by this.
pub async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

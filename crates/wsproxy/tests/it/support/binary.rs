//! The program itself: signals, exit codes, logs, descriptors.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use rustix::process::{Pid, Signal, kill_process};

use super::{eventually, gateway::API_KEY, http};

/// A running `wsproxy serve`; dropping it kills it.
pub struct Binary {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Binary {
    /// Starts it on a free port with further variables of the environment (empty: not set), at log level debug.
    pub async fn start(environment: &[(&str, &str)]) -> Self {
        let command = Command::new(env!("CARGO_BIN_EXE_wsproxy"));
        Self::start_command(command, environment).await
    }

    /// The same under a limit of open files.
    pub async fn start_with_files(files: u32, environment: &[(&str, &str)]) -> Self {
        let mut command = Command::new("sh");
        let program = env!("CARGO_BIN_EXE_wsproxy");
        command.args(["-c", &format!("ulimit -n {files} && exec \"$0\" \"$@\""), program]);
        Self::start_command(command, environment).await
    }

    /// The same on the unix socket that the environment names; it has no address.
    pub async fn start_on_socket(environment: &[(&str, &str)]) -> Self {
        let command = Command::new(env!("CARGO_BIN_EXE_wsproxy"));
        let binary = Self::spawn(command, environment);
        binary.line("Listening.").await;
        binary
    }

    async fn start_command(command: Command, environment: &[(&str, &str)]) -> Self {
        let mut binary = Self::spawn(command, environment);
        let line = binary.line("Listening.").await;
        binary.address = line["address"].as_str().unwrap().parse().unwrap();
        binary
    }

    fn spawn(mut command: Command, environment: &[(&str, &str)]) -> Self {
        command.arg("serve").env_clear();
        command.env("PATH", "/usr/bin:/bin");
        command.envs([
            ("PORT", "0"),
            ("WSPROXY_SERVER__BIND", "127.0.0.1"),
            ("WSPROXY_SERVER__THREADS", "1"),
            ("WSPROXY_SERVER__DRAIN_DELAY", "0s"),
            ("WSPROXY_SERVER__DRAIN_SPREAD", "0s"),
            ("WSPROXY_API__KEYS", API_KEY),
            ("LOG_LEVEL", "debug"),
        ]);
        for (name, value) in environment {
            match *value {
                "" => command.env_remove(name),
                value => command.env(name, value),
            };
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let lines = Arc::clone(&log);
        let reader = std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).for_each(|line| lines.lock().unwrap().push(line));
        });
        let address = ([127, 0, 0, 1], 0).into();
        Self { child, log, reader: Some(reader), address }
    }

    /// Waits for a log line with this message.
    pub async fn line(&self, message: &str) -> serde_json::Value {
        let mut found = None;
        eventually(message, || {
            found = self.lines(message).into_iter().next();
            found.is_some()
        })
        .await;
        found.unwrap()
    }

    /// The log lines so far with this message.
    pub fn lines(&self, message: &str) -> Vec<serde_json::Value> {
        let log = self.log.lock().unwrap();
        let lines = log.iter().map(|line| {
            serde_json::from_str::<serde_json::Value>(line)
                .unwrap_or_else(|_| panic!("no JSON: {line}"))
        });
        lines.filter(|line| line["message"] == message).collect()
    }

    /// Waits for this many log lines with this message: a line is read some time after its cause.
    pub async fn lines_when(&self, message: &str, count: usize) -> Vec<serde_json::Value> {
        eventually(message, || self.lines(message).len() >= count).await;
        self.lines(message)
    }

    /// Everything that was logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The CPU time that it has used.
    pub fn cpu_time(&self) -> std::time::Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // Behind the name in parentheses: the state, then user and system time as the 12th and 13th field.
        let fields = stat.rsplit_once(") ").unwrap().1.split(' ').skip(11).take(2);
        let ticks: u64 = fields.map(|field| field.parse::<u64>().unwrap()).sum();
        // A tick of these files is always 10 ms.
        std::time::Duration::from_millis(ticks * 10)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id().cast_signed()).unwrap(), signal).unwrap();
        // One thread takes the signal, and the others go on until then.
        while signal == Signal::STOP && !self.has_stopped() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// Whether every thread of it is stopped.
    fn has_stopped(&self) -> bool {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let mut states = threads.map(|thread| {
            let stat = std::fs::read_to_string(thread.unwrap().path().join("stat"));
            stat.is_ok_and(|stat| {
                stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
            })
        });
        states.all(|is_stopped| is_stopped)
    }

    /// Waits for its end; the log is complete then.
    pub async fn exited(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("the program ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        self.reader.take().unwrap().join().unwrap();
        status.unwrap()
    }

    /// A request of a worker, with its key.
    pub async fn api(&self, method: &str, path: &str, body: &str) -> http::Response {
        let key = format!("Bearer {API_KEY}");
        let headers = [("authorization", key.as_str())];
        http::request(self.address, method, path, &headers, body.as_bytes()).await
    }

    /// A token for a session, made by its API.
    pub async fn token(&self, session: &str) -> String {
        let path = format!("/api/v1/sessions/{session}/token");
        self.api("POST", &path, "").await.json()["token"].as_str().unwrap().to_owned()
    }

    /// The value of a series of `/metrics`.
    pub async fn metric(&self, series: &str) -> f64 {
        let response = http::request(self.address, "GET", "/metrics", &[], b"").await;
        http::metric(&response.body, series)
    }
}

impl Drop for Binary {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! Requests through a tunnel, or through what stands in its place: speed, cost, memory, and how streams bear each other.

mod away;
mod bulk;
mod cuts;
mod fair;
mod leave;
mod link;
mod small;
mod stalled;
mod waiting;

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::clock::now_ns;
use crate::options::seconds;
use crate::procfs::Processes;
use crate::report::Report;
use crate::tunnel::client::{Connection, Site};

/// Options of the scenarios.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Behaviour of the clients.
    #[arg(value_enum)]
    case: Case,
    #[command(flatten)]
    site: Site,
    /// Address of the service itself (`wsproxy-bench upstream`), to ask for what it has seen.
    #[arg(long)]
    upstream: Option<SocketAddr>,
    /// Processes between the client and the service; their children are included. Needed for CPU and memory.
    #[arg(long, value_delimiter = ',')]
    pid: Vec<u32>,
    /// Address at which the link takes commands (`wsproxy-bench relay --control`).
    #[arg(long)]
    control: Option<SocketAddr>,
    /// Number of clients.
    #[arg(short = 'n', long, default_value_t = 1_000)]
    connections: u32,
    /// `small`: numbers of requests at once.
    #[arg(long, value_delimiter = ',', default_value = "1,32,1000")]
    at_once: Vec<u32>,
    /// Bytes of a large body.
    #[arg(long, default_value_t = 100_000_000)]
    bytes: u64,
    /// `bulk`: large bodies in each direction, after one that is not measured.
    #[arg(long, default_value_t = 10)]
    times: u32,
    /// `bulk`: without the one that is not measured, so that nothing has grown yet.
    #[arg(long)]
    fresh: bool,
    /// `away`, `cuts`: requests per second.
    #[arg(long, default_value_t = 60)]
    rate: u32,
    /// `away`: seconds for which the link is away.
    #[arg(long, default_value = "3", value_parser = seconds)]
    down: Duration,
    /// `deadlines`: seconds after which the server ends a request without a head, or without a byte of its body.
    #[arg(long, default_value = "2", value_parser = seconds)]
    deadline: Duration,
    /// Seconds of each measured phase.
    #[arg(long, default_value = "5", value_parser = seconds)]
    duration: Duration,
    /// Results as JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Behaviour of the clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Case {
    /// Large bodies down and up, one after the other.
    Bulk,
    /// Small requests, some at once.
    Small,
    /// Most clients stop reading.
    Stalled,
    /// Most requests wait for their head.
    Waiting,
    /// Watches that are idle, as many as there may be and one more.
    Watches,
    /// A fast reader beside a slow one.
    Fair,
    /// Clients leave while they read, wait, or have stopped reading.
    Leave,
    /// Heads do not come, and bodies stand still, until the server's deadlines.
    Deadlines,
    /// Small requests beside large bodies on a slow link.
    Link,
    /// The link is away for a while.
    Away,
    /// The link is cut again and again, while POSTs are counted.
    Cuts,
}

/// Runs the scenario.
///
/// # Errors
/// The run could not take place.
pub fn run(options: &Options) -> Result<Report> {
    // One thread: the other cores are for what is measured.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let name = options.case.to_possible_value();
    let name = name.map(|value| value.get_name().to_owned()).unwrap_or_default();
    let mut report = Report::new(&format!("tunnel {name}"), "http");
    runtime.block_on(async {
        let report = &mut report;
        match options.case {
            Case::Bulk => bulk::run(options, report).await,
            Case::Small => small::run(options, report).await,
            Case::Stalled => stalled::run(options, report).await,
            Case::Waiting => waiting::run(options, report).await,
            Case::Watches => waiting::watches(options, report).await,
            Case::Fair => fair::run(options, report).await,
            Case::Leave => leave::run(options, report).await,
            Case::Deadlines => leave::deadlines(options, report).await,
            Case::Link => link::run(options, report).await,
            Case::Away => away::run(options, report).await,
            Case::Cuts => cuts::run(options, report).await,
        }
    })?;
    Ok(report)
}

impl Options {
    fn processes(&self) -> Processes {
        Processes::new(&self.pid)
    }

    /// Returns the resident memory of each process and its children, in bytes.
    fn memory(&self) -> Vec<u64> {
        self.pid.iter().map(|pid| Processes::new(&[*pid]).memory().resident).collect()
    }

    /// Returns the service without anything before it.
    fn direct(&self) -> Result<Site> {
        Ok(Site::direct(self.upstream.context("this case needs --upstream")?))
    }

    /// Lets the link be away from now on, for a while.
    async fn away(&self, pause: Duration) -> Result<()> {
        let control = self.control.context("this case needs --control")?;
        let mut stream = TcpStream::connect(control).await?;
        stream.write_all(format!("away {}\n", pause.as_millis()).as_bytes()).await?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).await?;
        Ok(())
    }
}

/// Sends small requests one after the other on one connection; notes their times as `name_p50_ms` and so on.
async fn probe(
    options: &Options,
    report: &mut Report,
    name: &str,
    count: u32,
    pause: Duration,
) -> Result<()> {
    let mut times = histogram()?;
    let mut failed = 0u32;
    let request = options.site.request("GET", "/small", None);
    let mut connection = options.site.connect().await?;
    for _ in 0..count {
        let start = now_ns();
        match timeout(PATIENCE, connection.get(&request)).await {
            Ok(Ok(head)) if head.status == 200 => times.saturating_record(now_ns() - start),
            _ => {
                failed += 1;
                connection = options.site.connect().await?;
            }
        }
        sleep(pause).await;
    }
    report.quantiles(name, &times);
    report.problem_if(failed > 0, || format!("{failed} of {count} small requests failed ({name})"));
    Ok(())
}

/// Opens many requests a few at a time, each until its connection is ready as `open` says.
async fn open_all<F>(count: u32, open: impl Fn(u32) -> F) -> Result<Vec<Connection>>
where
    F: Future<Output = Result<Connection>> + Send + 'static,
{
    let (mut opened, mut opening) = (Vec::new(), JoinSet::new());
    for number in 0..count {
        if opening.len() >= OPENING_MAX
            && let Some(one) = opening.join_next().await
        {
            opened.push(one??);
        }
        opening.spawn(open(number));
    }
    while let Some(one) = opening.join_next().await {
        opened.push(one??);
    }
    Ok(opened)
}

/// Waits until the memory of the processes has stopped changing; returns it.
async fn settled_memory(options: &Options, patience: Duration) -> Vec<u64> {
    let end = now_ns() + crate::clock::ns(patience);
    let mut before = options.memory();
    loop {
        sleep(Duration::from_secs(2)).await;
        let now = options.memory();
        let steady = now.iter().zip(&before).all(|(now, before)| now.abs_diff(*before) < 1 << 20);
        if steady || now_ns() > end {
            return now;
        }
        before = now;
    }
}

/// Returns the largest growth of one process, in MiB.
fn growth_mib(after: &[u64], before: &[u64]) -> f64 {
    let growth = after.iter().zip(before).map(|(after, before)| after.saturating_sub(*before));
    growth.max().unwrap_or_default() as f64 / f64::from(1 << 20)
}

/// Returns the memory of all TCP sockets of this host, in MiB: the kernel's part, which no process shows.
fn socket_mib() -> f64 {
    let text = std::fs::read_to_string("/proc/net/sockstat").unwrap_or_default();
    let pages = text
        .lines()
        .find(|line| line.starts_with("TCP:"))
        .and_then(|line| line.split_once(" mem ")?.1.split(' ').next()?.parse::<f64>().ok());
    pages.unwrap_or_default() / 256.0
}

fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1_000, 600_000_000_000, 3)?)
}

const PATIENCE: Duration = Duration::from_secs(30);
const OPENING_MAX: usize = 64;

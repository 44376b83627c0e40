//! The load generator's command: reads the arguments, runs, and says by its exit code whether all went well.

use std::process::ExitCode;

use clap::Parser;
use wsproxy_bench::cli;

fn main() -> ExitCode {
    raise_descriptor_limit();
    match cli::run(cli::Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("wsproxy-bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Raises the limit of descriptors to the host's maximum: each client needs one.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Without it a smaller fleet still works, and a larger one says what it lacks.
    let _ = setrlimit(Resource::Nofile, limit);
}

//! The gateway program.

use std::process::ExitCode;

fn main() -> ExitCode {
    wsproxy::cli::main()
}

// For small, long-lived objects that grow and shrink in bursts. Idle connections take a quarter less memory than
// with glibc's allocator, and nearly all of it is freed when they close. jemalloc costs a minute of C build;
// `--no-default-features --features mimalloc` avoids that.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[cfg(all(feature = "mimalloc", not(feature = "jemalloc")))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

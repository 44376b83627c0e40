//! The gateway program.

use std::process::ExitCode;

// Thousands of small, long-lived objects that grow and shrink in bursts: jemalloc packs idle
// connections a quarter denser than glibc's allocator does and gives nearly all of it back when
// they close. It costs a minute of C build; `--no-default-features --features mimalloc` does
// without.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[cfg(all(feature = "mimalloc", not(feature = "jemalloc")))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    wsproxy::cli::main()
}

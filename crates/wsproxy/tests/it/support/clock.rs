//! A wall clock that programs of a test share, and that a test sets.

use std::{fs, path::PathBuf, process::Command};

use tempfile::TempDir;

/// The clock. Timers of the programs keep the right time.
pub struct Clock {
    directory: TempDir,
}

impl Clock {
    /// A clock that is right.
    pub fn new() -> Self {
        let clock = Self { directory: tempfile::tempdir().unwrap() };
        clock.set(0);
        let mut compiler = Command::new("cc");
        compiler.args(["-O1", "-shared", "-fPIC", "-o"]).arg(clock.path("clock.so")).arg(SOURCE);
        assert!(compiler.status().unwrap().success());
        clock
    }

    /// Sets it so many seconds ahead of the right time, for programs that run as well.
    pub fn set(&self, seconds: i64) {
        // Replaced as a whole, so that no program reads half of it.
        fs::write(self.path("new"), format!("{seconds:+}")).unwrap();
        fs::rename(self.path("new"), self.path("clock")).unwrap();
    }

    /// Variables of the environment of a program that is to have this clock.
    pub fn environment(&self) -> [(&'static str, String); 2] {
        let path = |name| self.path(name).to_str().unwrap().to_owned();
        [("LD_PRELOAD", path("clock.so")), ("CHAOS_CLOCK", path("clock"))]
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// The library that programs load before all others. The package `faketime` does not work in a redis-server.
const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/chaos/clock.c");

//! CPU time and memory of other processes, from `/proc`; does not know their purpose.

use std::collections::BTreeMap;
use std::fs;

/// The processes whose consumption is measured together.
#[derive(Debug, Clone, Default)]
pub struct Processes {
    roots: Vec<u32>,
    alone: bool,
}

/// CPU time at one moment.
#[derive(Debug, Clone, Default)]
pub struct CpuSample {
    /// Nanoseconds on a CPU, per thread.
    threads: BTreeMap<u32, u64>,
    /// Nanoseconds on a CPU per process, in the coarse unit of the kernel's ticks.
    ticks: u64,
}

/// Memory at one moment, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// All resident pages.
    pub resident: u64,
    /// Resident pages of the process alone: heap and stacks.
    pub anonymous: u64,
}

/// Memory of the kernel at one moment, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kernel {
    /// Pages of all slabs: sockets, files, entries of epoll. 0 where `/proc/slabinfo` cannot be read (root only).
    pub slab: u64,
    /// Memory of the host.
    pub total: u64,
    /// Memory that programs could still get.
    pub available: u64,
}

impl Kernel {
    /// Returns the memory now.
    #[must_use]
    pub fn now() -> Self {
        let slabs = fs::read_to_string("/proc/slabinfo").unwrap_or_default();
        let host = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |name: &str| -> u64 {
            let line = host.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0) * 1024
        };
        Self {
            slab: slabs.lines().filter_map(slab_bytes).map(|(_, bytes)| bytes).sum(),
            total: field("MemTotal:"),
            available: field("MemAvailable:"),
        }
    }
}

impl Processes {
    /// Watches these processes and their children, which are looked up at each sample.
    #[must_use]
    pub fn new(roots: &[u32]) -> Self {
        Self { roots: roots.to_vec(), alone: false }
    }

    /// Watches this process without its children, as the server may be one of them.
    #[must_use]
    pub fn own() -> Self {
        Self { roots: vec![std::process::id()], alone: true }
    }

    /// Returns true when there is no process to measure.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.roots.is_empty()
    }

    /// Takes a sample of the CPU time.
    #[must_use]
    pub fn cpu(&self) -> CpuSample {
        let mut sample = CpuSample::default();
        for pid in self.all() {
            sample.ticks += stat_ticks(pid).unwrap_or(0);
            for thread in children_of(&format!("/proc/{pid}/task")) {
                let path = format!("/proc/{pid}/task/{thread}/schedstat");
                let spent = fs::read_to_string(path)
                    .ok()
                    .and_then(|text| text.split(' ').next().and_then(|first| first.parse().ok()));
                if let Some(spent) = spent {
                    sample.threads.insert(thread, spent);
                }
            }
        }
        sample
    }

    /// Takes a sample of the memory.
    #[must_use]
    pub fn memory(&self) -> Memory {
        let mut total = Memory::default();
        for pid in self.all() {
            let memory = memory_of(pid).unwrap_or_default();
            total.resident += memory.resident;
            total.anonymous += memory.anonymous;
        }
        total
    }

    fn all(&self) -> Vec<u32> {
        let mut found = self.roots.clone();
        let mut at = if self.alone { found.len() } else { 0 };
        while let Some(&pid) = found.get(at) {
            for thread in children_of(&format!("/proc/{pid}/task")) {
                let path = format!("/proc/{pid}/task/{thread}/children");
                let children = fs::read_to_string(path).unwrap_or_default();
                for child in children.split_whitespace().filter_map(|child| child.parse().ok()) {
                    if !found.contains(&child) {
                        found.push(child);
                    }
                }
            }
            at += 1;
        }
        found
    }
}

impl CpuSample {
    /// Returns the CPU nanoseconds spent since an earlier sample.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> u64 {
        let vanished = earlier.threads.keys().any(|thread| !self.threads.contains_key(thread));
        if vanished || self.threads.is_empty() {
            // A thread that ended took its precise figure with it; the process' ticks still have it.
            return self.ticks.saturating_sub(earlier.ticks) * NS_PER_TICK;
        }
        let spent = |(thread, now): (&u32, &u64)| {
            now.saturating_sub(earlier.threads.get(thread).copied().unwrap_or(0))
        };
        self.threads.iter().map(spent).sum()
    }
}

/// Returns true when a process has ended. A zombie has ended too.
#[must_use]
pub fn has_ended(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit_once(") ").map(|(_, rest)| rest.starts_with(['Z', 'X'])))
        .unwrap_or(true)
}

fn children_of(directory: &str) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

fn stat_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

fn memory_of(pid: u32) -> Option<Memory> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
    };
    Some(Memory { resident: field("Rss:")?, anonymous: field("Anonymous:")? })
}

/// Name and bytes of a line of `/proc/slabinfo`: `name active objects size per_slab pages : … : slabdata active slabs …`.
fn slab_bytes(line: &str) -> Option<(&str, u64)> {
    let mut words = line.split_whitespace();
    let name = words.next().filter(|name| !name.starts_with(['#', '-']))?;
    let pages: u64 = words.nth(4)?.parse().ok()?;
    let slabs: u64 = line.rsplit_once("slabdata")?.1.split_whitespace().nth(1)?.parse().ok()?;
    Some((name, slabs * pages * PAGE_BYTES))
}

/// Size of a page where the load generator runs: x86-64, and arm64 as distributions build it.
const PAGE_BYTES: u64 = 4096;
/// Length of a tick: the kernel reports 100 of them per second to user space on all supported architectures.
const NS_PER_TICK: u64 = 10_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_consumption_is_seen() {
        let own = Processes::own();
        let before = own.cpu();
        let mut sum = 0u64;
        while own.cpu().since(&before) < 2_000_000 {
            sum = sum.wrapping_add((0..10_000u64).sum());
        }
        assert!(sum > 0);
        let memory = own.memory();
        assert!(memory.resident > 100_000 && memory.anonymous <= memory.resident, "{memory:?}");
        assert!(!has_ended(std::process::id()));
        assert!(has_ended(u32::MAX));
    }

    #[test]
    fn bytes_of_a_slab_are_those_of_its_pages() {
        let line = "TCP  26 30 2368 13 8 : tunables 0 0 0 : slabdata 2 3 0";
        assert_eq!(slab_bytes(line), Some(("TCP", 3 * 8 * 4096)));
        assert_eq!(slab_bytes("# name <active_objs> <num_objs> <objsize> <a> <b> : x"), None);
        assert_eq!(slab_bytes("slabinfo - version: 2.1"), None);
        let now = Kernel::now();
        assert!(now.available > 0 && now.available < now.total, "{now:?}");
    }

    #[test]
    fn ticks_stand_in_when_a_thread_has_vanished() {
        let earlier = CpuSample { threads: [(1, 5), (2, 7)].into(), ticks: 3 };
        let both = CpuSample { threads: [(1, 15), (2, 7), (3, 4)].into(), ticks: 5 };
        assert_eq!(both.since(&earlier), 14);
        let one = CpuSample { threads: [(1, 15)].into(), ticks: 5 };
        assert_eq!(one.since(&earlier), 2 * NS_PER_TICK);
    }
}

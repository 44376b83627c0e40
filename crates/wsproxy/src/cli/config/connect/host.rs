//! Open files and the queue of new connections, as the kernel of this machine allows them.

use rustix::process::{Resource, getrlimit};

use super::Finding;
use crate::{config::Config, descriptors::Descriptors, http::listener::open::BACKLOG};

pub(super) fn examine(config: &Config) -> Vec<Finding> {
    let limit = getrlimit(Resource::Nofile);
    vec![
        open_files(config.limits.max_connections, (limit.current, limit.maximum)),
        accept_queue(std::fs::read_to_string(SOMAXCONN).ok().as_deref()),
    ]
}

fn open_files(wanted: usize, (soft, hard): (Option<u64>, Option<u64>)) -> Finding {
    let part = "descriptors";
    let told = |limit: Option<u64>| limit.map_or_else(|| "unlimited".to_owned(), |n| n.to_string());
    let limits = format!("open files: soft limit {}, hard limit {}", told(soft), told(hard));
    // An instance raises the soft limit to the hard one.
    let limit = hard.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX / 2);
    let possible = match Descriptors::of(limit) {
        Ok(descriptors) => descriptors.connections,
        Err(error) => return Finding::error(part, format!("{limits}: {error}"), RAISE),
    };
    let what = format!("{limits}, enough for {possible} connections");
    if wanted > possible {
        let what = format!("{what}, but limits.max_connections is {wanted}");
        return Finding::warning(part, what, RAISE);
    }
    if possible < FEW {
        return Finding::warning(part, what, RAISE);
    }
    Finding::ok(part, what)
}

fn accept_queue(text: Option<&str>) -> Finding {
    let part = "somaxconn";
    let Some(most) = text.and_then(|text| text.trim().parse::<i32>().ok()) else {
        return Finding::warning(
            part,
            format!("{SOMAXCONN} cannot be read"),
            "look at it yourself",
        );
    };
    let what = format!("net.core.somaxconn is {most}");
    if most < BACKLOG {
        let what = format!("{what}, so that fewer than {BACKLOG} new connections can wait");
        let advice =
            format!("sysctl net.core.somaxconn={BACKLOG} or more: clients come back at once");
        return Finding::warning(part, what, advice);
    }
    Finding::ok(part, what)
}

const RAISE: &str =
    "raise the hard limit: LimitNOFILE= of systemd, --ulimit nofile= of Docker, or ulimit -n";

/// Connections below which the limit was probably not meant.
const FEW: usize = 1000;

const SOMAXCONN: &str = "/proc/sys/net/core/somaxconn";

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    #[test]
    fn limits_are_judged_by_the_connections_that_they_allow() {
        let level = |wanted, soft, hard| open_files(wanted, (Some(soft), Some(hard))).level;
        assert_eq!(level(0, 1024, 1 << 20), Level::Ok);
        assert_eq!(level(0, 1024, 1024), Level::Warning);
        assert_eq!(level(100_000, 1024, 65_536), Level::Warning);
        assert_eq!(level(0, 64, 64), Level::Error);
        assert_eq!(open_files(0, (None, None)).level, Level::Ok);
        assert_eq!(accept_queue(Some("65535\n")).level, Level::Ok);
        assert_eq!(accept_queue(Some("128\n")).level, Level::Warning);
        assert_eq!(accept_queue(None).level, Level::Warning);
    }
}

//! The address of the present master. Of one server it is constant; with Sentinel the task in `sentinel` keeps it. In a
//! Cluster it is the node at which the instance subscribes, which `cluster` chooses.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::redis::address::{RedisEndpoint, RedisServers};

/// Address of the present master, shared by all connections of an instance.
pub(super) struct Topology {
    /// There is one server for ever.
    is_constant: bool,
    master: watch::Sender<Option<Arc<RedisEndpoint>>>,
    /// Latest answer of each sentinel, in the order of the configuration.
    answers: Mutex<Answers>,
}

#[derive(Default)]
struct Answers {
    masters: Vec<Option<NamedMaster>>,
    /// Number of the failover of the present master.
    epoch: u64,
    /// Reason why the sentinel that failed last named none.
    trouble: Option<String>,
}

/// The master that a sentinel names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NamedMaster {
    /// The address.
    pub(super) endpoint: RedisEndpoint,
    /// Number of the failover that made this server the master: of two answers the one with the larger number is newer.
    pub(super) epoch: u64,
}

impl Topology {
    /// Creates the topology of the servers that a URL names.
    pub(super) fn new(servers: &RedisServers) -> Self {
        let (master, count) = match servers {
            RedisServers::One(endpoint) => (Some(Arc::new(endpoint.clone())), 0),
            RedisServers::Sentinel { sentinels, .. } => (None, sentinels.len()),
            RedisServers::Cluster { .. } => (None, 0),
        };
        let trouble = matches!(servers, RedisServers::Cluster { .. }).then(|| NO_NODE.to_owned());
        let answers = Answers { masters: vec![None; count], trouble, ..Answers::default() };
        let is_constant = matches!(servers, RedisServers::One(_));
        Self { is_constant, master: watch::Sender::new(master), answers: Mutex::new(answers) }
    }

    /// Returns the master now; `None` before a sentinel has named one.
    pub(super) fn now(&self) -> Option<Arc<RedisEndpoint>> {
        self.master.borrow().clone()
    }

    /// Waits until there is a master.
    pub(super) async fn master(&self) -> Arc<RedisEndpoint> {
        loop {
            let mut changes = self.master.subscribe();
            let found = changes.wait_for(Option::is_some).await;
            if let Some(master) = found.ok().and_then(|found| found.clone()) {
                return master;
            }
        }
    }

    /// Resolves once another server than `old` is the master.
    pub(super) async fn left(&self, old: &Arc<RedisEndpoint>) {
        if self.is_constant {
            // Each message polls this.
            return std::future::pending().await;
        }
        let mut changes = self.master.subscribe();
        // The sender lives in `self`, so that the wait ends by a change only.
        let _ = changes.wait_for(|now| now.as_ref() != Some(old)).await;
    }

    /// Names another node of a Cluster at which the instance subscribes.
    pub(super) fn name(&self, node: Option<Arc<RedisEndpoint>>) {
        self.master.send_replace(node);
    }

    /// Notes the reason why no node of a Cluster can be asked. The node at which the instance subscribes stays.
    pub(super) fn unnamed(&self, why: String) {
        self.answers.lock().trouble = Some(why);
    }

    /// Returns the reason why there is no master yet.
    pub(super) fn trouble(&self) -> Option<String> {
        match self.now() {
            Some(_) => None,
            None => Some(self.answers.lock().trouble.clone().unwrap_or_else(|| NOT_YET.to_owned())),
        }
    }

    /// Notes the answer of a sentinel. Returns the new master if the answer changes it.
    pub(super) fn answered(
        &self,
        sentinel: usize,
        answer: NamedMaster,
    ) -> Option<Arc<RedisEndpoint>> {
        let mut answers = self.answers.lock();
        answers.masters[sentinel] = Some(answer);
        let now = self.now();
        let (NamedMaster { endpoint, epoch }, votes) = newest(&answers.masters, now.as_deref())?;
        if now.is_some() && *epoch < answers.epoch && votes * 2 <= answers.masters.len() {
            // A sentinel that was away knows an old master only, while those that know better do not answer.
            return None;
        }
        let (master, epoch) = (Arc::new(endpoint.clone()), *epoch);
        answers.epoch = epoch;
        if now.as_ref() == Some(&master) {
            return None;
        }
        self.master.send_replace(Some(master.clone()));
        Some(master)
    }

    /// Forgets the answer of a sentinel that cannot be asked. The master stays, also without any sentinel: Redis serves
    /// on without them.
    pub(super) fn silent(&self, sentinel: usize, why: String) {
        let mut answers = self.answers.lock();
        answers.masters[sentinel] = None;
        answers.trouble = Some(why);
    }
}

/// Returns the master of the newest failover that any sentinel knows, and the number of sentinels that name it. Sentinels that know of no newer one, such as a
/// sentinel that was away, do not count. Of several masters with one number, as after a new set-up of the sentinels, the
/// one that most of them name counts, and `now` before others.
fn newest<'a>(
    answers: &'a [Option<NamedMaster>],
    now: Option<&RedisEndpoint>,
) -> Option<(&'a NamedMaster, usize)> {
    let newest = answers.iter().flatten().map(|answer| answer.epoch).max()?;
    let named = || answers.iter().flatten().filter(|answer| answer.epoch == newest);
    let counted = named().map(|one| (one, named().filter(|other| *other == one).count()));
    counted.max_by_key(|(named, votes)| (*votes, Some(&named.endpoint) == now))
}

const NO_NODE: &str = "no node of the Cluster has answered yet";

const NOT_YET: &str = "no sentinel has named a master yet";

#[cfg(test)]
mod tests {
    use super::*;

    fn at(port: u16) -> RedisEndpoint {
        RedisEndpoint::Tcp { host: "10.0.0.1".into(), port, tls: false }
    }

    fn named(port: u16, epoch: u64) -> NamedMaster {
        NamedMaster { endpoint: at(port), epoch }
    }

    fn of_three() -> Topology {
        let sentinels = vec![at(1), at(2), at(3)];
        Topology::new(&RedisServers::Sentinel { sentinels, master: "m".into() })
    }

    #[tokio::test]
    async fn one_server_is_the_master_for_ever() {
        let topology = Topology::new(&RedisServers::One(at(6379)));
        let master = topology.master().await;
        assert_eq!((&*master, topology.trouble()), (&at(6379), None));
        let left = tokio::time::timeout(std::time::Duration::ZERO, topology.left(&master));
        assert!(left.await.is_err());
    }

    #[tokio::test]
    async fn the_master_of_the_newest_failover_counts() {
        let topology = of_three();
        assert!(topology.trouble().unwrap().contains("no sentinel"));
        let old = topology.answered(0, named(6379, 1)).unwrap();
        assert_eq!(topology.answered(1, named(6379, 1)), None);
        let new = topology.answered(2, named(6380, 2)).unwrap();
        topology.left(&old).await;
        assert_eq!(topology.master().await, new);
        // A sentinel that was away names the old master, and so do two.
        assert_eq!(topology.answered(0, named(6379, 1)), None);
        assert_eq!(topology.answered(1, named(6379, 1)), None);
        assert_eq!(topology.now(), Some(new));
    }

    #[test]
    fn the_master_stays_while_all_sentinels_are_away() {
        let topology = of_three();
        topology.answered(0, named(6379, 4));
        topology.silent(0, "refused".into());
        assert_eq!(topology.now().as_deref(), Some(&at(6379)));
        assert_eq!(topology.trouble(), None);
    }

    #[test]
    fn an_older_master_counts_only_for_most_of_the_sentinels() {
        let topology = of_three();
        topology.answered(0, named(6379, 4));
        topology.silent(0, "refused".into());
        assert_eq!(topology.answered(1, named(6380, 0)), None);
        assert_eq!(topology.now().as_deref(), Some(&at(6379)));
        // Sentinels that were set up anew count their failovers from 0.
        assert_eq!(topology.answered(2, named(6380, 0)).as_deref(), Some(&at(6380)));
        assert_eq!(topology.answered(2, named(6380, 1)), None);
    }

    #[test]
    fn of_equal_numbers_the_majority_counts() {
        let topology = of_three();
        topology.answered(0, named(6379, 0));
        assert_eq!(topology.answered(1, named(6380, 0)), None);
        assert_eq!(topology.answered(2, named(6380, 0)).as_deref(), Some(&at(6380)));
    }

    #[test]
    fn the_last_trouble_is_told_while_there_is_no_master() {
        let topology = of_three();
        topology.silent(1, "s2: refused".into());
        assert_eq!(topology.trouble().as_deref(), Some("s2: refused"));
    }
}

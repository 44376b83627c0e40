//! Members of a room over several instances without IO: whatever happens to instances, connections and Redis, all
//! survivors end with the same members and entities, and tell of each join and leave once.

mod instance;
mod known;
mod redis;

use std::collections::BTreeMap;

use proptest::prelude::*;
use wsproxy_proto::rooms::{
    mirror::{MISSING_MAX, Mirror},
    wire::{self, Record},
};

use crate::{
    rooms_state::{instance::Instance, redis::Redis},
    support::{cases, same_each_time},
};

/// Step of a run.
#[derive(Debug, Clone, Copy)]
enum Step {
    Open(usize, usize),
    Close(usize, usize),
    RunLeave(usize),
    Deliver(usize, u8),
    Answer(usize, usize),
    Begin(usize),
    RunCommand(usize),
    Change(usize, char, u8, u8),
    Advance(u64),
    /// The instance dies, and another one takes its place. The reaper finds its members later.
    Kill(usize),
    Reap,
    Lose(usize),
    Link(usize),
    /// Redis is emptied.
    Empty,
    /// The lease of the instance was lost, so that the reaper took its members for dead.
    LoseLease(usize),
    Rejoin(usize, usize),
}

fn step(has_disasters: bool) -> impl Strategy<Value = Step> {
    let (instance, client) = (0..INSTANCES, 0..CLIENTS);
    let op = prop::sample::select(vec!['s', 's', 'u', 'u', 'd', 'p']);
    let usual = prop_oneof![
        6 => (client.clone(), instance.clone()).prop_map(|(c, i)| Step::Open(c, i)),
        3 => (client.clone(), instance.clone()).prop_map(|(c, i)| Step::Close(c, i)),
        3 => instance.clone().prop_map(Step::RunLeave),
        12 => (instance.clone(), 1..4_u8).prop_map(|(i, n)| Step::Deliver(i, n)),
        16 => (instance.clone(), 0..4_usize).prop_map(|(i, n)| Step::Answer(i, n)),
        6 => instance.clone().prop_map(Step::Begin),
        8 => instance.clone().prop_map(Step::RunCommand),
        8 => (client.clone(), op, 0..2_u8, any::<u8>())
            .prop_map(|(c, op, entity, value)| Step::Change(c, op, entity, value)),
        2 => (0..3_000_000_u64).prop_map(Step::Advance),
        1 => instance.clone().prop_map(Step::Kill),
        2 => Just(Step::Reap),
    ];
    let disaster = prop_oneof![
        3 => instance.clone().prop_map(Step::Lose),
        5 => instance.clone().prop_map(Step::Link),
        1 => Just(Step::Empty),
        1 => instance.clone().prop_map(Step::LoseLease),
        5 => (client, instance).prop_map(|(c, i)| Step::Rejoin(c, i)),
        1 => (0..12_000_000_u64).prop_map(Step::Advance),
    ];
    if has_disasters { prop_oneof![4 => usual, 1 => disaster].boxed() } else { usual.boxed() }
}

struct World {
    redis: Redis,
    instances: Vec<Instance>,
    /// Servers that are dead, and still have records.
    dead: Vec<u64>,
    servers: u64,
}

impl World {
    fn new(has_disasters: bool) -> Self {
        let instances = (0..INSTANCES).map(|slot| Instance::new(slot, slot as u64 + 1)).collect();
        let redis = Redis::new(MEMBERS_MAX, INSTANCES, !has_disasters);
        Self { redis, instances, dead: Vec::new(), servers: INSTANCES as u64 }
    }

    fn run(&mut self, step: Step) {
        let (redis, instances) = (&mut self.redis, &mut self.instances);
        match step {
            Step::Open(client, i) => instances[i].open(NAMES[client], redis),
            Step::Close(client, i) => instances[i].close(NAMES[client]),
            Step::RunLeave(i) => _ = instances[i].run_leave(redis),
            Step::Deliver(i, times) => {
                for _ in 0..times {
                    instances[i].deliver(redis);
                }
            }
            Step::Answer(i, which) => _ = instances[i].answer(which, redis),
            Step::Begin(i) => _ = instances[i].begin(redis),
            Step::RunCommand(i) => _ = instances[i].run_command(redis),
            Step::Change(client, op, entity, value) => {
                let entity = ["e", "f"][usize::from(entity)];
                let data = match op {
                    's' => vec![value; 4],
                    'u' => vec![value % 4, value],
                    _ => vec![value],
                };
                for instance in instances {
                    instance.change(op, NAMES[client], entity, &data);
                }
            }
            Step::Advance(micros) => redis.now += micros,
            Step::Kill(i) => {
                self.dead.push(instances[i].server);
                self.servers += 1;
                instances[i] = Instance::new(i, self.servers);
                redis.channels[i] = None;
            }
            Step::Reap => {
                for server in std::mem::take(&mut self.dead) {
                    self.reap(server);
                }
            }
            Step::Lose(i) => instances[i].lose(redis),
            Step::Link(i) => instances[i].link(redis),
            Step::Empty => redis.empty(),
            Step::LoseLease(i) => self.reap(self.instances[i].server),
            Step::Rejoin(client, i) => instances[i].rejoin(NAMES[client], redis),
        }
        assert!(self.redis.members.len() <= MEMBERS_MAX);
    }

    fn reap(&mut self, server: u64) {
        for (client, record) in self.redis.members.clone() {
            let record = Record::parse(&record).unwrap();
            if record.connection().unwrap().server == server {
                self.redis.leave(&client, record.connection);
            }
        }
    }

    /// Lets all that is under way happen, and each connection be a member again.
    fn settle(&mut self, has_disasters: bool) {
        self.run(Step::Reap);
        for i in 0..INSTANCES {
            self.run(Step::Link(i));
        }
        self.rest();
        for i in 0..INSTANCES {
            (0..CLIENTS).for_each(|client| self.run(Step::Rejoin(client, i)));
            self.rest();
            // Members join again where Redis or a lease was lost. Behind that the gateway reads its rooms again.
            if has_disasters {
                self.instances[i].doubt(&self.redis);
                self.rest();
            }
        }
        for _ in 0..4 {
            self.run(Step::Advance(MISSING_MAX));
            self.rest();
        }
    }

    fn rest(&mut self) {
        for _ in 0..10_000 {
            let mut is_busy = false;
            for instance in &mut self.instances {
                is_busy |= instance.run_command(&mut self.redis);
                is_busy |= instance.deliver(&mut self.redis);
                is_busy |= instance.answer(0, &mut self.redis);
                is_busy |= instance.run_leave(&mut self.redis);
                is_busy |= instance.begin(&self.redis);
            }
            if !is_busy {
                return;
            }
        }
        panic!("It never comes to rest.");
    }

    /// Checks that all instances know the same, and have told it.
    fn check(&self) {
        for (client, record) in &self.redis.members {
            let connection = Record::parse(record).unwrap().connection().unwrap();
            let holder = self.instances.iter().find(|one| one.server == connection.server);
            let holder = holder.unwrap_or_else(|| panic!("{client} is of a dead instance"));
            assert_eq!(holder.here.get(client), Some(&connection), "{client} is a ghost");
        }
        for instance in &self.instances {
            let server = instance.server;
            for client in instance.here.keys() {
                assert!(self.redis.members.contains_key(client), "{client} of {server} is outside");
            }
            let Some(mirror) = &instance.mirror else { continue };
            assert!(mirror.is_complete());
            let members = mirror
                .members()
                .map(|(client, member)| (client.to_owned(), member.record_text().to_owned()));
            assert_eq!(members.collect::<BTreeMap<_, _>>(), self.redis.members, "of {server}");
            let told = instance.view.members.iter().filter(|(_, seen)| seen.last() == Some(&true));
            let told: Vec<_> = told.map(|(client, _)| client).collect();
            assert_eq!(told, self.redis.members.keys().collect::<Vec<_>>(), "told by {server}");
            let mut entities = BTreeMap::new();
            for (client, member) in mirror.members() {
                for entity in member.entities().filter(|entity| entity.snapshot().is_some()) {
                    let snapshot = entity.snapshot().unwrap().to_vec();
                    entities.insert((client.to_owned(), entity.id().to_owned()), snapshot);
                }
            }
            assert_eq!(instance.view.entities, entities, "entities told by {server}");
        }
    }

    /// Checks that all instances have the entities that Redis has.
    fn check_entities(&self) {
        for instance in &self.instances {
            let entities = instance.view.entities.iter();
            let entities = entities.map(|((client, id), bytes)| (format!("{client} {id}"), bytes));
            let expected =
                self.redis.entities.iter().map(|(id, bytes)| (id.clone(), bytes.to_vec()));
            if instance.mirror.is_some() {
                let entities: BTreeMap<_, _> =
                    entities.map(|(id, bytes)| (id, bytes.clone())).collect();
                assert_eq!(entities, expected.collect(), "of {}", instance.server);
            }
            // News of others about a member are in Redis, or go.
            for (client, member) in instance.mirror.iter().flat_map(Mirror::members) {
                for entity in member.entities().filter(|_| !member.is_here()) {
                    let field = wire::field(client, entity.id());
                    let is_kept = self.redis.positions.contains_key(&field);
                    let is_kept = is_kept || self.redis.entities.contains_key(&field);
                    assert!(is_kept, "{field} is a ghost of {}", instance.server);
                }
            }
        }
    }

    /// Checks that each instance has told of every join and leave since it began, in their order.
    fn check_events(&self) {
        for instance in &self.instances {
            let Some(began) = instance.view.began else { continue };
            let mut expected: BTreeMap<&str, Vec<bool>> = BTreeMap::new();
            for (version, is_join, client) in &self.redis.truth {
                let seen = expected.entry(client).or_default();
                if *version <= began {
                    seen.clear();
                }
                if *version > began || *is_join {
                    seen.push(*is_join);
                }
            }
            expected.retain(|_, seen| !seen.is_empty());
            let seen: BTreeMap<&str, Vec<bool>> = instance
                .view
                .members
                .iter()
                .map(|(client, seen)| (&**client, seen.clone()))
                .collect();
            assert_eq!(seen, expected, "told by {}", instance.server);
        }
    }
}

fn play(has_disasters: bool, steps: &[Step]) -> World {
    let mut world = World::new(has_disasters);
    steps.iter().for_each(|step| world.run(*step));
    world.settle(has_disasters);
    world.check();
    world
}

fn play_calm(steps: &[Step]) {
    let world = play(false, steps);
    world.check_entities();
    world.check_events();
}

proptest! {
    // A search for cases that fail: PROPTEST_RNG_SEED=N ALL_CASES=1 cargo test -p wsproxy-proto --test it rooms_state
    #![proptest_config(same_each_time(cases(1024)))]

    #[test]
    fn rooms_are_the_same_for_all_survivors(steps in prop::collection::vec(step(true), 1..150)) {
        play(true, &steps).check_entities();
    }

    #[test]
    fn rooms_tell_each_join_and_leave_once(steps in prop::collection::vec(step(false), 1..150)) {
        play_calm(&steps);
    }
}

const INSTANCES: usize = 3;
const CLIENTS: usize = 4;
const MEMBERS_MAX: usize = 3;
const NAMES: [&str; CLIENTS] = ["a", "b", "c", "d"];

//! Turns on one channel, in any interleaving: each command has one holder, or is handed on.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::endpoint::agents::owner::Owner;

/// An entry of the channel.
#[derive(Debug, Clone, Copy)]
enum Entry {
    Command(u32),
    Marker(Marker),
}

/// A connection, as its instance has it.
struct Reader {
    id: Uuid,
    server: Box<str>,
    turn: Turn,
    start: usize,
    /// Entries from here to the end of the subscription are read next.
    next: usize,
    end: Option<usize>,
    has_claimed: bool,
    answer: Option<Claimed>,
    is_leaving: bool,
    is_released: bool,
}

/// The channel, the owner's key, and all connections.
#[derive(Default)]
struct World {
    channel: Vec<Entry>,
    holder: Option<usize>,
    generation: u64,
    commands: u32,
    readers: Vec<Reader>,
    /// Connections that run or answer a command.
    mine: HashMap<u32, Vec<usize>>,
    handed_on: Vec<u32>,
    /// Commands that only some of several newcomers heard, while no connection held the place.
    excused: Vec<u32>,
}

impl World {
    fn connect(&mut self, on: u8) {
        let id = Uuid::from_u128(self.readers.len() as u128 + 1);
        self.readers.push(Reader {
            id,
            server: if on.is_multiple_of(2) { "one".into() } else { "two".into() },
            turn: new(id),
            start: self.channel.len(),
            next: self.channel.len(),
            end: None,
            has_claimed: false,
            answer: None,
            is_leaving: false,
            is_released: false,
        });
    }

    fn claim(&mut self, at: usize) {
        if self.readers[at].has_claimed {
            return;
        }
        let listening = self.readers.iter().filter(|reader| reader.end.is_none());
        let mut servers: Vec<_> = listening.map(|reader| reader.server.clone()).collect();
        servers.sort();
        servers.dedup();
        let is_tombstone = self.generation > 0 && self.holder.is_none();
        let replaced = self.holder.map(|holder| {
            let Reader { id, server, .. } = &self.readers[holder];
            Owner { connection: *id, server: server.clone() }
        });
        let is_alone = is_tombstone || servers.len() <= 1;
        if self.holder.is_none() {
            // Several newcomers open at once. The one that claims first does not have what only the others heard.
            let start = self.readers[at].start;
            self.excused.extend(self.channel[..start].iter().filter_map(|entry| match entry {
                Entry::Command(id) => Some(*id),
                Entry::Marker(_) => None,
            }));
        }
        self.generation += 1;
        let former = self.holder.map(|holder| self.readers[holder].id);
        self.holder = Some(at);
        let generation = self.generation;
        let reader = &mut self.readers[at];
        reader.has_claimed = true;
        reader.answer = Some(Claimed::Held { generation, replaced, is_alone });
        let connection = Some(reader.id);
        self.channel.push(Entry::Marker(Marker { connection, generation, former }));
    }

    fn deliver(&mut self, at: usize) {
        let reader = &mut self.readers[at];
        if reader.next >= reader.end.unwrap_or(self.channel.len()) {
            return;
        }
        let entry = self.channel[reader.next];
        reader.next += 1;
        let verdict = match entry {
            Entry::Command(id) => match reader.turn.command(&id.to_le_bytes()) {
                Verdict::Mine => return self.mine.entry(id).or_default().push(at),
                verdict => verdict,
            },
            Entry::Marker(marker) => reader.turn.marker(marker),
        };
        self.decide(at, verdict);
    }

    fn answer(&mut self, at: usize) {
        let reader = &mut self.readers[at];
        if let Some(answer) = reader.answer.take() {
            let verdict = reader.turn.claimed(&answer, &reader.server.clone());
            self.decide(at, verdict);
        }
    }

    fn decide(&mut self, at: usize, verdict: Verdict) {
        let reader = &mut self.readers[at];
        match verdict {
            Verdict::Settled => {}
            Verdict::Replaced | Verdict::Released => {
                reader.is_leaving = true;
                if verdict == Verdict::Replaced {
                    reader.is_released = true;
                    reader.end = Some(reader.next);
                }
            }
            Verdict::Mine | Verdict::Wait => return,
            Verdict::Full => panic!("too many commands are kept"),
        }
        for (_, payload) in reader.turn.take_kept() {
            self.mine.entry(number(&payload)).or_default().push(at);
        }
    }

    /// Releases the place of a connection that has ended.
    fn release(&mut self, at: usize) {
        let reader = &mut self.readers[at];
        if !reader.is_leaving || !reader.has_claimed || reader.is_released {
            return;
        }
        reader.is_released = true;
        if self.holder == Some(at) {
            self.holder = None;
            let former = Some(self.readers[at].id);
            let generation = self.generation;
            self.channel.push(Entry::Marker(Marker { connection: None, generation, former }));
        }
    }

    /// Unsubscribes a connection whose turn is over, reads what is on its way, and hands on what is left.
    fn unsubscribe(&mut self, at: usize) {
        let reader = &mut self.readers[at];
        if !reader.turn.is_over() || reader.end.is_some() {
            return;
        }
        reader.end = Some(self.channel.len());
        while self.readers[at].next < self.channel.len() {
            self.deliver(at);
        }
        let kept = self.readers[at].turn.take_kept();
        self.handed_on.extend(kept.into_iter().map(|(_, payload)| number(&payload)));
    }

    fn step(&mut self, operation: u8, which: u8) {
        let count = self.readers.len();
        if operation == 0 && count < 12 {
            return self.connect(which);
        }
        if operation <= 2 {
            self.channel.push(Entry::Command(self.commands));
            self.commands += 1;
            return;
        }
        if count == 0 {
            return;
        }
        let at = which as usize % count;
        match operation {
            3 => self.claim(at),
            4..=6 => self.deliver(at),
            7 => self.answer(at),
            8 => self.readers[at].is_leaving |= self.readers[at].turn.is_holding(),
            9 => self.release(at),
            _ => self.unsubscribe(at),
        }
    }

    /// Lets everything happen that is on its way. All connections leave but the last one, which holds the place.
    fn settle(&mut self) {
        self.connect(0);
        for _ in 0..3 {
            for at in 0..self.readers.len() {
                self.claim(at);
                self.answer(at);
                while self.readers[at].next < self.readers[at].end.unwrap_or(self.channel.len()) {
                    self.deliver(at);
                }
                self.release(at);
                self.unsubscribe(at);
            }
        }
    }
}

fn new(connection: Uuid) -> Turn {
    Turn::new(connection, Arc::default())
}

/// The marker of a connection, which does not say who held the place before.
fn marker(connection: u128, generation: u64) -> Marker {
    Marker { connection: Some(Uuid::from_u128(connection)), generation, former: None }
}

fn number(payload: &[u8]) -> u32 {
    u32::from_le_bytes(payload.try_into().unwrap())
}

proptest! {
    #[test]
    fn each_command_has_one_holder(steps in prop::collection::vec((0_u8..11, any::<u8>()), 0..200)) {
        let mut world = World::default();
        let mut heard = Vec::new();
        for (operation, which) in steps {
            let before = world.commands;
            world.step(operation, which);
            if world.commands > before && world.readers.iter().any(|reader| reader.end.is_none()) {
                heard.push(before);
            }
        }
        world.settle();
        for id in heard {
            let owners = world.mine.get(&id).map_or(0, Vec::len);
            prop_assert!(owners <= 1, "{id} has {owners} holders");
            let is_handed_on = world.handed_on.contains(&id);
            let is_excused = world.excused.contains(&id);
            prop_assert!(owners == 1 || is_handed_on || is_excused, "{id} has no holder");
        }
    }
}

#[test]
fn commands_of_a_doubt_wait_for_the_own_marker() {
    let mut turn = new(Uuid::from_u128(1));
    let held = Claimed::Held { generation: 7, replaced: None, is_alone: true };
    assert_eq!(turn.command(b"first"), Verdict::Wait);
    assert_eq!(turn.marker(marker(1, 7)), Verdict::Wait);
    assert_eq!(turn.command(b"second"), Verdict::Wait);
    assert_eq!(turn.claimed(&held, "one"), Verdict::Settled);
    let kept: Vec<_> = turn.take_kept().into_iter().map(|(_, payload)| payload).collect();
    assert_eq!(kept, ["first", "second"]);
    assert_eq!(turn.command(b"third"), Verdict::Mine);
    turn.lost();
    assert_eq!(turn.command(b"fourth"), Verdict::Wait);
    assert_eq!(turn.claimed(&held, "one"), Verdict::Wait);
    assert_eq!(turn.marker(marker(1, 7)), Verdict::Settled);
    assert_eq!(turn.take_kept().into_iter().count(), 1);
    // An older marker that comes late changes nothing; a newer one ends the turn.
    assert_eq!(turn.marker(marker(2, 6)), Verdict::Wait);
    assert_eq!(turn.marker(marker(2, 8)), Verdict::Replaced);
    assert_eq!(turn.command(b"fifth"), Verdict::Wait);
    assert_eq!(turn.take_kept().into_iter().count(), 0);
}

/// A turn that was lost while it held the place, with two commands since then.
fn doubting() -> Turn {
    let mut turn = new(Uuid::from_u128(1));
    turn.marker(marker(1, 7));
    let held = Claimed::Held { generation: 7, replaced: None, is_alone: true };
    assert_eq!(turn.claimed(&held, "one"), Verdict::Settled);
    turn.lost();
    assert_eq!([turn.command(b"a"), turn.command(b"b")], [Verdict::Wait, Verdict::Wait]);
    turn
}

#[test]
fn commands_of_a_doubt_are_its_own_where_the_marker_says_so() {
    for (holder, verdict) in [(Some(2), Verdict::Replaced), (None, Verdict::Released)] {
        for (former, own) in [(Some(1), 2), (Some(3), 0), (None, 0)] {
            let mut turn = doubting();
            let connection = holder.map(Uuid::from_u128);
            let former = former.map(Uuid::from_u128);
            assert_eq!(turn.marker(Marker { connection, generation: 8, former }), verdict);
            let in_doubt = turn.counters.in_doubt.value();
            let kept = turn.take_kept().into_iter().count();
            assert_eq!((kept, in_doubt), (own, 2 - own as u64), "{former:?}");
        }
    }
    let mut turn = doubting();
    turn.drop_doubted();
    assert_eq!((turn.counters.in_doubt.value(), turn.take_kept().into_iter().count()), (2, 0));
}

#[test]
fn a_loss_before_the_own_marker_keeps_no_command_of_the_holder_before() {
    let me = Uuid::from_u128(1);
    let replaced = Some(Owner { connection: Uuid::from_u128(9), server: "two".into() });
    for (replaced, count) in [(None, 1), (replaced, 0)] {
        let mut turn = new(me);
        turn.command(b"before");
        let claimed = Claimed::Held { generation: 7, replaced, is_alone: false };
        assert_eq!(turn.claimed(&claimed, "one"), Verdict::Wait);
        turn.lost();
        assert_eq!(turn.marker(marker(1, 7)), Verdict::Settled);
        assert_eq!(turn.take_kept().into_iter().count(), count);
    }
    // Without the answer to the claim, only the commands behind the own marker are surely its own.
    let mut turn = new(me);
    turn.command(b"before");
    turn.marker(marker(1, 7));
    turn.command(b"behind");
    turn.lost();
    assert_eq!(turn.marker(marker(1, 7)), Verdict::Settled);
    let kept: Vec<_> = turn.take_kept().into_iter().map(|(_, payload)| payload).collect();
    assert_eq!(kept, ["behind"]);
}

#[test]
fn a_newcomer_leaves_the_commands_of_a_living_holder_to_it() {
    let owner = |server: &str| Owner { connection: Uuid::from_u128(9), server: server.into() };
    for (replaced, is_alone, count) in [
        (None, true, 1),
        (None, false, 1),
        (Some(owner("one")), true, 0),
        (Some(owner("two")), false, 0),
        // Its instance was killed: it does not subscribe any more.
        (Some(owner("two")), true, 1),
    ] {
        let mut turn = new(Uuid::from_u128(1));
        turn.command(b"before");
        turn.marker(marker(1, 7));
        let claimed = Claimed::Held { generation: 7, replaced: replaced.clone(), is_alone };
        assert_eq!(turn.claimed(&claimed, "one"), Verdict::Settled);
        assert_eq!(turn.take_kept().into_iter().count(), count, "{replaced:?} {is_alone}");
    }
}

#[test]
fn kept_commands_are_bounded() {
    let mut turn = new(Uuid::from_u128(1));
    let kept = (0..5000).filter(|_| turn.command(b"x") == Verdict::Wait).count();
    assert_eq!(kept, KEPT_MAX);
    let run = turn.take_kept().into_iter().filter(|(is_run, _)| *is_run).count();
    assert_eq!(run, RUN_MAX);
    let large = vec![0; KEPT_BYTES_MAX / 2];
    assert_eq!(
        [(); 3].map(|()| turn.command(&large)),
        [Verdict::Wait, Verdict::Wait, Verdict::Full]
    );
}

//! Sequences of steps that once failed, made as short as possible.

use crate::rooms_state::{
    Step::{
        Advance, Answer, Begin, Change, Close, Deliver, Empty, Kill, Link, Lose, LoseLease, Open,
        Reap, Rejoin, RunCommand, RunLeave,
    },
    play, play_calm,
};

/// A reading finds a member in a later life. The news behind it have an entity of the earlier one, and then the leave.
#[test]
#[rustfmt::skip]
fn entity_of_an_earlier_life_in_the_news_of_a_reading() {
    play_calm(&[
        Open(3, 2), Begin(2), Answer(2, 0), Answer(2, 0), Answer(2, 0), Answer(2, 0), Answer(2, 0),
        Answer(2, 0), Open(0, 0), Change(3, 's', 0, 0), RunCommand(2), Close(3, 2), RunLeave(2), Open(3, 0),
    ]);
}

/// A reading finds a member in a later life. An entity of the earlier one and its leave arrive behind the reading.
#[test]
#[rustfmt::skip]
fn entity_of_an_earlier_life_behind_a_reading() {
    play_calm(&[
        Open(0, 1), Open(0, 0), Answer(0, 0), Begin(0), Answer(0, 0), Answer(0, 0), Answer(0, 0), Open(3, 0),
        Answer(0, 0), Answer(0, 0), Answer(0, 0), Change(3, 's', 0, 0), RunCommand(0), Open(0, 2), Kill(0),
        Reap, Begin(1), Answer(1, 0), Open(3, 1),
    ]);
}

/// A member is elsewhere at the end of a reading. Its last change here was not in Redis yet when the reading began.
#[test]
#[rustfmt::skip]
fn change_here_that_a_reading_lacks() {
    play_calm(&[
        Open(3, 1), Open(3, 0), Begin(0), Answer(0, 0), Answer(0, 0), Answer(0, 0), Open(3, 1), Answer(0, 0),
        Answer(0, 0), Open(0, 0), Answer(0, 0), Answer(0, 0), Change(0, 's', 0, 0), Begin(0), Answer(0, 0),
        RunCommand(0), Open(0, 1), Open(1, 0),
    ]);
}

/// A member moves away and comes back. What it updates then had never come to others: its spawn was refused.
#[test]
#[rustfmt::skip]
fn update_of_what_was_refused() {
    play_calm(&[
        Open(1, 1), Begin(1), Open(0, 1), Open(1, 0), Begin(0), Open(1, 0), Open(1, 1), Answer(0, 0),
        Open(1, 1), Answer(0, 0), Answer(0, 0), Answer(0, 0), Answer(1, 1), Answer(0, 0), Answer(0, 0),
        Answer(0, 0), Change(1, 's', 1, 0), Open(1, 0), Deliver(0, 3), Open(2, 0), RunCommand(0), Answer(0, 0),
        Change(1, 'u', 1, 0),
    ]);
}

/// A reading knows a member before its join here is answered. A change here comes before the leave of the earlier life.
#[test]
#[rustfmt::skip]
fn change_here_before_the_leave_of_an_earlier_life() {
    play_calm(&[
        Open(0, 1), Answer(1, 0), Begin(1), Answer(1, 0), Open(3, 0), Kill(0), Open(2, 2), Open(0, 2),
        Open(0, 2), Reap, Answer(1, 0), Answer(1, 0), Open(2, 1), Open(3, 1), Answer(1, 0), Answer(1, 0),
        Answer(1, 0), Answer(1, 0), Change(3, 's', 0, 0),
    ]);
}

/// A reading lacks a member whose leave, join here and leave are on their way.
#[test]
#[rustfmt::skip]
fn leave_and_join_that_a_reading_overtakes() {
    play_calm(&[
        Open(0, 0), Begin(0), Answer(0, 0), Open(1, 1), Open(0, 1), Answer(0, 0), Answer(0, 0), Answer(0, 0),
        Open(0, 1), Open(0, 0), Open(2, 0), Answer(0, 1), Open(0, 1), Open(0, 1), Open(2, 1), Kill(1),
        Answer(0, 0), Answer(0, 0), Answer(0, 0), Open(0, 1), Reap, Open(0, 1), Open(1, 0), Answer(0, 0),
        Open(2, 0), Close(1, 0),
    ]);
}

/// A member moves away and comes back while the room is read for the first time.
#[test]
#[rustfmt::skip]
fn member_that_moves_while_a_room_is_first_read() {
    play_calm(&[
        Open(0, 1), Begin(1), Answer(1, 0), Answer(1, 0), Open(3, 1), Answer(1, 0), Open(2, 0), Answer(0, 0),
        Answer(1, 0), Answer(1, 0), Answer(1, 0), Answer(1, 0), Change(3, 's', 0, 0), RunCommand(1), Begin(0),
        Deliver(0, 1), Open(3, 0), Open(0, 0), Deliver(0, 2), Answer(0, 0), Open(2, 1), Answer(0, 0),
        Answer(0, 1), Open(1, 0), Open(3, 1), Open(3, 0),
    ]);
}

/// A join here is answered behind a reading that lacks the member: it has left since.
#[test]
#[rustfmt::skip]
fn join_here_whose_leave_a_reading_has_seen() {
    play_calm(&[
        Open(1, 1), Answer(1, 0), Open(1, 2), Begin(1), Answer(1, 0), Answer(1, 0), Open(0, 0), Open(3, 1),
        Answer(1, 0), Answer(1, 0), Answer(1, 0), Answer(0, 0), Open(0, 0), Begin(1), Open(0, 0), Open(1, 1),
        Open(0, 0), Open(0, 0), Open(1, 0), Answer(0, 0), Kill(0),
    ]);
}

/// Two readings overtake a join and a leave. Both are told when the channel brings them.
#[test]
#[rustfmt::skip]
fn join_and_leave_that_two_readings_overtake() {
    play_calm(&[
        Open(0, 0), Open(0, 0), Open(0, 2), Open(0, 0), Open(0, 0), Open(0, 0), Open(0, 0), Open(0, 0),
        Open(0, 0), Answer(2, 0), Open(0, 0), Begin(2), Open(1, 0), Answer(2, 0), Open(0, 0), Answer(2, 0),
        Kill(0), Answer(2, 0), Answer(2, 0), Open(1, 2), Reap, Open(0, 0), Open(2, 0), Answer(0, 0), Kill(0),
        Open(1, 2),
    ]);
}

/// A member leaves from elsewhere and joins here, before the news of its first join here and of all since.
#[test]
#[rustfmt::skip]
fn change_here_in_an_earlier_life() {
    play_calm(&[
        Open(3, 0), Answer(0, 0), Begin(0), Answer(0, 0), Answer(0, 0), Answer(0, 0), Answer(0, 0), Answer(0, 0),
        Change(3, 's', 0, 0), RunCommand(0), Open(3, 2), Open(0, 0), Kill(2), Reap, Open(3, 0), Answer(0, 1),
    ]);
}

/// A reading of positions runs before an entity is despawned, and is answered behind the news of that.
#[test]
#[rustfmt::skip]
fn position_of_an_entity_that_ended_while_positions_are_read() {
    play_calm(&[
        Open(0, 0), Answer(0, 0), Begin(0), Answer(0, 0), Answer(0, 0), Answer(0, 0), Answer(0, 0), Answer(0, 0),
        Open(1, 1), Answer(1, 0), Begin(1), Answer(1, 0), Answer(1, 0), Answer(1, 0), Answer(1, 0), Answer(1, 0),
        Change(0, 's', 0, 0), Change(0, 'p', 0, 0), RunCommand(0), RunCommand(0), Deliver(1, 3),
        Advance(2_000_000), Begin(1), Answer(1, 0), Answer(1, 0), Change(0, 'd', 0, 0), RunCommand(0),
        Deliver(1, 1),
    ]);
}

/// Redis was emptied, so that the spawn of a member's entity is refused. The member joins again with its entities, of which
/// other instances hear nothing.
#[test]
#[rustfmt::skip]
fn spawn_that_was_refused_before_a_member_joins_again() {
    play(true, &[
        Open(0, 1), Begin(1), Answer(1, 0), Answer(1, 0), Answer(1, 0), Open(1, 0), Answer(1, 0), Answer(1, 0),
        Answer(1, 0), Empty, Change(0, 's', 0, 0),
    ]).check_entities();
}

/// A connection joins again that has lost its place, and does not know it yet. Before its join is refused, it has written
/// its entities.
#[test]
#[rustfmt::skip]
fn entity_of_a_connection_that_has_lost_its_place() {
    play(true, &[
        Open(2, 0), Begin(0), Answer(0, 0), Answer(0, 0), Open(0, 2), Answer(0, 0), Answer(0, 0), Begin(2),
        Answer(0, 0), Answer(2, 0), Answer(0, 0), Answer(2, 0), Open(2, 2), Change(2, 's', 0, 0), Rejoin(2, 0),
    ]).check_entities();
}

/// The place of a member passes from one connection here to the next and to a third. The spawn of its entity is refused
/// twice, and an update between is not.
#[test]
#[rustfmt::skip]
fn update_between_spawns_that_were_refused() {
    play_calm(&[
        Open(2, 0), Begin(0), Answer(0, 0), Answer(0, 0), Answer(0, 0), Answer(0, 0), Answer(0, 0), Open(0, 0),
        Answer(0, 0), Open(1, 2), Begin(2), Answer(0, 0), Open(2, 0), Change(0, 's', 0, 0), Change(2, 's', 1, 0),
        Open(0, 0), Answer(2, 1), RunCommand(0), Answer(0, 0), Change(2, 'u', 1, 0), RunCommand(0), RunCommand(0),
        Open(2, 0),
    ]);
}

/// A join here is answered behind a reading that lacks the member, and behind its own news. The leave comes last.
#[test]
#[rustfmt::skip]
fn join_here_between_a_reading_and_its_leave() {
    play_calm(&[
        Open(2,0),Open(0,1),Open(2,0),Close(0,0),Open(2,0),Open(2,2),Begin(2),Answer(2,0),Open(2,0),Deliver(2,1),Answer(2,0),Open(2,1),Answer(2,0),Answer(2,0),Kill(1),Deliver(2,2),Answer(2,0),Reap,Open(3,0),Open(0,0),Answer(2,0),Begin(2),Open(3,2),Answer(2,0),Open(1,2),Open(1,0),Kill(0),
    ]);
}

/// A position and the end of its entity are under way while the member moves away and comes back. The position is published
/// all the same, and its end is refused.
#[test]
#[rustfmt::skip]
fn position_of_a_connection_whose_member_comes_back() {
    play_calm(&[
        Open(0, 0), Open(0, 0), Open(0, 2), Begin(2), Answer(2, 0), Answer(2, 0), Answer(2, 0), Answer(2, 0),
        Answer(2, 0), Answer(2, 0), Change(0, 'p', 1, 0), Open(0, 0), Open(0, 2), Open(1, 0),
        Change(0, 'd', 1, 0), RunCommand(2),
    ]);
}

/// A position of a connection is heard before the room is first read. The member has left and joined since, at the same
/// instance.
#[test]
#[rustfmt::skip]
fn position_of_an_earlier_connection_of_the_same_instance() {
    play_calm(&[
        Open(0, 0), Open(1, 2), Open(1, 0), Begin(2), Open(0, 2), Answer(2, 0), Answer(2, 0), Answer(2, 0),
        Answer(0, 0), Answer(2, 0), Open(1, 0), Answer(2, 0), Answer(2, 0), Answer(2, 0), Change(0, 'p', 0, 0),
        RunLeave(0), Close(0, 2), RunLeave(2), Open(0, 2),
    ]);
}

/// The place of a member passes from here to elsewhere and back before the room is first read. The reading knows the
/// second connection here, and lacks what was changed elsewhere.
#[test]
#[rustfmt::skip]
fn entity_from_elsewhere_between_two_connections_here() {
    play_calm(&[
        Open(2, 1), Begin(1), Open(1, 0), Open(2, 2), Answer(2, 0), Open(1, 0), Open(1, 0), Begin(2), Close(0, 0),
        Answer(2, 0), Answer(2, 0), Answer(1, 1), Answer(2, 0), Open(1, 0), Answer(2, 0), Answer(2, 0),
        Deliver(1, 2), Open(0, 0), Change(2, 's', 0, 0), RunCommand(2), Open(2, 1),
    ]);
}

/// A member comes from elsewhere, is taken for dead and joins again with the same connection. The news of its first join here
/// are not those of its second.
#[test]
#[rustfmt::skip]
fn change_here_between_the_news_of_two_joins_of_a_connection() {
    play(true, &[
        Open(1, 0), Open(1, 2), LoseLease(2), Answer(2, 0), Begin(2), Rejoin(1, 2), Answer(2, 0), Answer(2, 0),
        Answer(2, 0), Answer(2, 0), Answer(2, 0), Answer(2, 0), Change(1, 's', 0, 0),
    ]).check_entities();
}

/// A reading knows a member before the channel tells of its join elsewhere. It comes here, and the news of that join are not
/// those of its coming.
#[test]
#[rustfmt::skip]
fn change_here_before_the_news_of_a_join_elsewhere() {
    play_calm(&[
        Open(0, 0), Answer(0, 0), Begin(0), Answer(0, 0), Answer(0, 0), Answer(0, 0), Answer(0, 0), Answer(0, 0),
        Open(1, 2), Answer(2, 0), Open(3, 0), Answer(0, 0), Begin(2), Answer(2, 0), Answer(2, 0), Answer(2, 0),
        Answer(2, 0), Answer(2, 0), Change(3, 's', 0, 7), RunCommand(0), Open(3, 2), Answer(2, 0), Deliver(0, 3),
        Deliver(0, 3), Change(3, 's', 0, 9), RunCommand(2), Deliver(2, 3),
    ]);
}

/// A member joins again that was taken for dead. Its connection changes an entity before that is answered, and loses its place
/// to the next one here. A reading brings the entity, and the old leave comes behind it.
#[test]
#[rustfmt::skip]
fn change_between_a_join_again_and_the_next_connection() {
    play(true, &[
        Open(1, 1), Open(0, 0), Answer(0, 0), Open(0, 2), Answer(1, 0), Open(3, 1), Begin(1), Answer(1, 0),
        Answer(1, 0), Open(0, 1), Answer(1, 0), Answer(1, 0), Answer(1, 0), Open(0, 0), Open(0, 0), LoseLease(1),
        Answer(1, 2), Rejoin(3, 1), Change(3, 's', 0, 0), RunCommand(1), Open(3, 1), Open(0, 0),
    ]).check_entities();
}

/// As before, but the old leave comes while the room is read.
#[test]
#[rustfmt::skip]
fn old_leave_while_the_room_is_read_for_a_refused_change() {
    play(true, &[
        Open(3, 1), Answer(1, 0), Begin(1), Answer(1, 0), Answer(1, 0), Answer(1, 0), Answer(1, 0), Answer(1, 0),
        Deliver(1, 1), LoseLease(1), Rejoin(3, 1), Change(3, 's', 0, 0), RunCommand(1), Open(3, 1), Answer(1, 0),
        RunCommand(1), Answer(1, 0), Begin(1), Deliver(1, 1),
    ]).check_entities();
}

/// A member joins again with its entity, and the next connection here has its place before that is answered. A reading knows
/// the next connection already, and the old leave comes behind it.
#[test]
#[rustfmt::skip]
fn entity_that_the_connection_before_has_written_again() {
    play(true, &[
        Open(3, 1), Answer(1, 0), Begin(1), Answer(1, 0), Answer(1, 0), Answer(1, 0), Answer(1, 0), Answer(1, 0),
        Change(3, 's', 0, 0), RunCommand(1), Lose(1), Link(1), LoseLease(1), Rejoin(3, 1), Open(3, 1), Begin(1),
        Answer(1, 2), Answer(1, 2), Answer(1, 2), Answer(1, 2), Answer(1, 2), Answer(1, 0), Answer(1, 0),
    ]).check_entities();
}

/// A member changes an entity here and moves away. A reading knows that before the leave of its earlier life comes. The news of
/// the change come from here, so that nothing would bring the entity again.
#[test]
#[rustfmt::skip]
fn old_leave_of_a_member_that_has_moved_away() {
    play_calm(&[
        Open(0, 1), Answer(1, 0), Begin(1), Answer(1, 0), Answer(1, 0), Answer(1, 0), Answer(1, 0), Answer(1, 0),
        Deliver(1, 1), Open(3, 0), Answer(0, 0), Close(3, 0), RunLeave(0), Open(3, 1), Answer(1, 0),
        Change(3, 's', 0, 0), RunCommand(1), Open(3, 0), Change(3, 's', 1, 0), RunCommand(1), Begin(1),
        Answer(1, 0), Answer(1, 0), Answer(1, 0), Answer(1, 0), Answer(1, 0),
    ]);
}

/// A member tells a position without an entity while it joins again. The old leave does not end it, and Redis has lost it.
#[test]
#[rustfmt::skip]
fn position_told_before_an_old_leave() {
    play(true, &[
        Open(0, 0), Answer(0, 0), Begin(0), Answer(0, 0), Answer(0, 0), Answer(0, 0), Answer(0, 0), Open(2, 1),
        Close(0, 0), Answer(0, 0), Open(1, 0), Answer(0, 0), LoseLease(0), Rejoin(1, 0), Change(1, 'p', 0, 0),
        Answer(0, 0), Empty,
    ]).check_entities();
}

/// A member comes here whose entity was updated elsewhere after a spawn that was refused. The first reading lacks the entity,
/// and the update comes behind it.
#[test]
#[rustfmt::skip]
fn update_of_what_was_refused_before_the_member_came_here() {
    play_calm(&[
        Open(1, 2), Answer(2, 0), Begin(2), Answer(2, 0), Answer(2, 0), Answer(2, 0), Answer(2, 0), Answer(2, 0),
        Open(0, 1), Change(1, 's', 0, 0), Open(0, 0), Open(1, 2), RunCommand(2), Open(0, 1), Begin(0), Open(2, 0),
        Answer(2, 0), Answer(0, 1), Change(1, 'u', 0, 0), RunCommand(2), Open(1, 0),
    ]);
}

/// Redis loses a member, so that the end of what the member has moved is refused. Others have heard the position.
#[test]
#[rustfmt::skip]
fn end_of_a_position_that_was_refused_since_redis_was_emptied() {
    play(true, &[
        Open(0, 0), Begin(0), Open(1, 2), Begin(2), Close(0, 0), Answer(2, 0), Answer(2, 0), Answer(0, 0), Answer(0, 0),
        Answer(0, 0), Answer(0, 0), Answer(0, 0), Answer(0, 0), Answer(2, 0), Answer(2, 0), Answer(2, 0), Empty,
        Change(0, 'p', 1, 0), Change(0, 'd', 1, 0),
    ]).check_entities();
}

/// As before, but Redis is emptied while both instances read the room.
#[test]
#[rustfmt::skip]
fn end_of_a_position_that_was_refused_while_the_room_is_read() {
    play(true, &[
        Open(0, 1), Open(2, 2), Answer(2, 0), Close(0, 0), LoseLease(0), Begin(1), Open(2, 1), Answer(2, 0),
        Answer(1, 2), Answer(1, 0), Begin(2), Answer(2, 0), Answer(2, 0), Answer(1, 0), Answer(1, 0), Empty,
        Answer(1, 0), Answer(1, 0), Answer(2, 0), Answer(1, 0), Change(2, 'p', 0, 0), Open(0, 2),
        Change(2, 'd', 0, 0),
    ]).check_entities();
}

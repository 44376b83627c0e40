"""The oracle finds what it says: each kind of broken promise in a small history that is made up."""

import unittest

import names
from oracle import Expectations, Item, Judge, View, judge_channels
from truth import Truth

S = names.session("s")


class Story:
    """A history at Redis and a client's view of it, told in a few words."""

    def __init__(self, channels=(S,), **expected):
        self.truth, self.view = Truth(), View("client", channels)
        self.expected, self.time = Expectations(**expected), 0.0

    def _tick(self):
        self.time += 1
        return self.time

    def kept(self, label, milliseconds, previous=None, server="A", channel=S, own=""):
        """Redis keeps and publishes a message."""
        self.truth.sending(label, channel)
        self.truth.sent[label] = self._tick()
        head = names.forged(names.at_time(milliseconds), names.at_time(previous) if previous else "0-0")
        head = head.removesuffix(b"\n").rstrip(b" ") + b" " + own.encode() + b"\n"
        self.truth.published(server, channel, head + names.mark(label).encode())
        return self

    def comes(self, asked="", opened=None, is_told=True):
        """The client connects, and is told where it is, or that it resumes, or nothing yet."""
        self.view.add(Item("connect", self._tick(), event_id=asked))
        if opened:
            self.view.add(Item("opened", self._tick(), event_id=names.at_time(opened)))
        elif asked and is_told:
            self.view.add(Item("resumed", self._tick(), said={"count": 0}))
        return self

    def gets(self, label, milliseconds=None, own=None, text=""):
        """The client gets a message."""
        position = names.at_time(milliseconds) if milliseconds else None
        self.view.add(Item("message", self._tick(), label, own or position, text))
        return self

    def lost(self, milliseconds, reason="unknown"):
        """The client is told that something is missing."""
        said = {"reason": reason}
        self.view.add(Item("lost", self._tick(), event_id=names.at_time(milliseconds), said=said))
        return self

    def snapshot(self, stream, seq, text, state="open"):
        """The client is shown a token stream."""
        said = {"stream": stream, "seq": seq, "text": text, "state": state}
        self.view.add(Item("snapshot", self._tick(), said=said))
        return self

    def verdicts(self):
        """Returns the complaints."""
        found = Judge(self.view, self.truth, self.expected).run() + judge_channels(self.truth, self.expected)
        return [violation.what for violation in found]


def three():
    """Three messages, of which the client was there before the first."""
    return Story().kept("a", 10).comes(opened=10).kept("b", 20, 10).kept("c", 30, 20)


class Runs(unittest.TestCase):
    """A run of messages is contiguous, or the client was told."""

    def broken(self, story, *words):
        verdicts = story.verdicts()
        self.assertEqual(len(verdicts), 1, verdicts)
        for word in words:
            self.assertIn(word, verdicts[0])

    def test_exact_run_holds(self):
        self.assertEqual(three().gets("b", 20).gets("c", 30).verdicts(), [])

    def test_missing_message_is_named(self):
        self.broken(three().gets("c", 30), "1 message(s) are missing", "b [")

    def test_repeated_message(self):
        self.broken(three().gets("b", 20).gets("b", 20).gets("c", 30), "b came again")

    def test_wrong_position(self):
        self.broken(three().gets("b", 25).gets("c", 30), "came with the id")

    def test_invented_message(self):
        self.broken(three().gets("b", 20).gets("x", 25), "was never published")

    def test_notice_excuses_a_hole(self):
        self.assertEqual(three().lost(20).gets("c", 30).verdicts(), [])

    def test_hole_behind_a_notice(self):
        self.broken(three().kept("d", 40, 30).lost(20).gets("d", 40), "1 message(s) are missing", "c [")

    def test_resumed_run_is_exact(self):
        story = three().gets("b", 20).comes(names.at_time(20))
        self.assertEqual(story.gets("c", 30).verdicts(), [])

    def test_resumed_run_with_a_hole(self):
        story = three().gets("b", 20).kept("d", 40, 30).comes(names.at_time(20))
        self.broken(story.gets("d", 40), "missing")

    def test_message_without_id_comes_again_after_resume(self):
        story = three().gets("b", 20).gets("c").comes(names.at_time(20))
        self.assertEqual(story.gets("c").verdicts(), [])

    def test_message_before_the_word(self):
        story = three().gets("b", 20)
        story.view.add(Item("connect", 99, event_id=names.at_time(20)))
        self.broken(story.gets("c", 30), "before it was told")

    def test_start_begins_with_the_first(self):
        story = Story().kept("a", 10).kept("b", 20, 10).comes("0")
        self.broken(story.gets("b", 20), "missing")

    def test_message_after_opening_is_missed(self):
        story = Story().kept("a", 10).comes(opened=15).kept("b", 20, 10).kept("c", 30, 20)
        self.broken(story.gets("c", 30), "b [")

    def test_announced_messages_never_came(self):
        story = three().gets("b", 20).comes(names.at_time(20))
        story.view.items[-1].said["count"] = 1
        self.broken(story, "never came")

    def test_notice_without_loss(self):
        story = three()
        story.expected.lossless = True
        self.broken(story.lost(20).gets("c", 30), "although Redis has lost nothing")

    def test_doubts_about_an_own_id(self):
        def story(asked, reason, **expected):
            before = Story(**expected).kept("a", 10).comes(opened=10).kept("b", 20, 10, own="mine").gets("b", own="mine")
            return before.comes(asked, is_told=False).lost(25, reason)

        self.assertEqual(story("mine", "ambiguous", lossless=True).verdicts(), [])
        self.broken(story("mine", "ambiguous", calm=True), "although Redis has lost nothing")
        self.broken(story("mine", "unknown", lossless=True), "although Redis has lost nothing")
        self.broken(story(names.at_time(20), "ambiguous", lossless=True), "although Redis has lost nothing")
        later = story("mine", "ambiguous", lossless=True).lost(26, "ambiguous")
        self.broken(later, "although Redis has lost nothing")

    def test_more_notices_than_incidents(self):
        story = three()
        story.expected.notices_max = 1
        self.broken(story.lost(20).lost(20).gets("c", 30), "2 times for one incident")


class Lives(unittest.TestCase):
    """Histories that are not one line."""

    def test_log_that_was_emptied_goes_on(self):
        story = three().kept("d", 40).gets("b", 20).gets("c", 30).gets("d", 40)
        self.assertEqual(story.verdicts(), [])

    def test_message_before_emptying_is_missed(self):
        verdicts = three().kept("d", 40).gets("b", 20).gets("d", 40).verdicts()
        self.assertIn("c [", verdicts[0])

    def test_forgotten_message_needs_a_notice(self):
        story = three()
        story.truth.promoted("B", "A")
        story.kept("gone", 40, 30).kept("new", 50, 30, server="B")
        story.gets("b", 20).gets("c", 30).gets("gone", 40)
        self.assertIn("was told nothing", story.gets("new", 50).verdicts()[0])

    def test_forgotten_message_with_a_notice(self):
        story = three()
        story.truth.promoted("B", "A")
        story.kept("gone", 40, 30).kept("new", 50, 30, server="B")
        story.gets("b", 20).gets("c", 30).gets("gone", 40).lost(30)
        self.assertEqual(story.gets("new", 50).verdicts(), [])

    def test_two_masters_with_one_id(self):
        story = three()
        story.truth.promoted("B", "A")
        story.kept("x", 40, 30).kept("y", 40, 30, server="B").kept("z", 50, 40, server="B")
        story.gets("b", 20).gets("c", 30).gets("x", 40)
        self.assertIn("follows y", story.gets("z", 50).verdicts()[0])

    def test_own_id_may_lead_behind_the_oldest(self):
        story = Story().comes().kept("e1", 10, own="t").kept("x", 20, 10).kept("e2", 30, 20, own="t").kept("y", 40, 30)
        story.gets("e1", own="t").gets("x", 20).gets("e2", own="t").comes("t")
        self.assertEqual(story.gets("x", 20).gets("e2", own="t").gets("y", 40).verdicts(), [])

    def test_own_id_may_not_lead_behind_the_newest(self):
        story = Story().comes().kept("e1", 10, own="t").gets("e1", own="t")
        story.kept("x", 20, 10).kept("e2", 30, 20, own="t").kept("y", 40, 30).comes("t")
        self.assertIn("missing", story.gets("y", 40).verdicts()[0])


class Others(unittest.TestCase):
    """Checks beyond one channel's run."""

    def test_channels_share_one_order(self):
        user = names.user("u")
        story = Story((names.BROADCAST, user)).comes()
        story.kept("a", 10, channel=names.BROADCAST).kept("b", 20, channel=user)
        self.assertIn("published later", story.gets("b", 20).gets("a", 10).verdicts()[0])

    def test_two_members_of_one_name(self):
        story = three().gets("b", 20, text='{"event_id":"1","n":1,"event_id":"2"}').gets("c", 30)
        self.assertIn("two members", story.verdicts()[0])

    def test_plain_message_twice(self):
        story = three()
        story.truth.sending("p", S, "plain")
        self.assertIn("twice", story.gets("p").gets("p").verdicts()[0])

    def test_captured_twice(self):
        story = Story()
        story.truth.sending("p", S, "captured")
        self.assertIn("captured 2 times", story.kept("p", 10).kept("p", 20, 10).verdicts()[0])

    def test_acknowledged_message_is_in_no_history(self):
        story = Story(lossless=True)
        story.truth.sending("p", S)
        story.truth.answered("p", names.at_time(10))
        self.assertIn("in no history", story.verdicts()[0])

    def test_stream_that_ended_stays_open(self):
        story = three().gets("b", 20).gets("c", 30).snapshot("t", 0, "")
        for said in (
            b'{"type":"stream_open","stream":"t"}',
            b'{"type":"stream_end","stream":"t","seq":0,"outcome":"error"}',
        ):
            story.truth.published("A", names.session("x"), names.forged(names.at_time(40), "0-0") + said)
        self.assertIn("not for this client", story.verdicts()[0])


if __name__ == "__main__":
    unittest.main()

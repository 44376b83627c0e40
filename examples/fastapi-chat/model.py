"""A simulated language model: its answer depends on the prompt alone, so that a test can check it."""

import hashlib
import os
import random

TOKENS = int(os.environ.get("CHAT_TOKENS", "150"))

STARTS = ["", "", "", "In the end, ", "Sometimes ", "Every evening, ", "As far as I know, "]
SUBJECTS = ["the river", "a patient gateway", "the café at the corner", "an old lighthouse", "the night train to Zürich"]
VERBS = ["waits for", "remembers", "never loses", "looks after", "keeps", "carries", "listens to"]
OBJECTS = ["a long sentence", "the first snow", "three words", "a quiet friend 😀", "the sign for water, 水,"]
ENDS = ["until the last word has arrived", "as if there were no hurry", "even when the line is cut", "while the others sleep"]


def tokens(prompt: str) -> list[str]:
    """Yields the answer in pieces: whole sentences, about TOKENS words."""
    words = f"You asked: “{prompt}” Here is what I can say.".split(" ")
    dice = random.Random(hashlib.sha256(prompt.encode()).digest())
    while len(words) < TOKENS:
        first, *rest = sentence(dice)
        words += [dice.choice(["", "", "", "\n\n"]) + first, *rest]
    words += ["\n\nThat", "is", "all."]
    # A word comes with the separator before it.
    return [words[0], *(word if word.startswith("\n") else " " + word for word in words[1:])]


def sentence(dice: random.Random) -> list[str]:
    """The words of one sentence."""
    start, *parts = [dice.choice(each) for each in (STARTS, SUBJECTS, VERBS, OBJECTS, ENDS)]
    text = start + " ".join(parts)
    return f"{text[0].upper()}{text[1:]}.".split(" ")

"""A language model that is none: its answer follows from the prompt alone, so that anybody can check it."""

import hashlib
import os
import random

TOKENS = int(os.environ.get("CHAT_TOKENS", "150"))

WORDS = ["the", "river", "stone,", "grün", "slowly", "because", "水", "never", "😀", "window.", "between", "evening\n"]


def tokens(prompt: str) -> list[str]:
    """The answer in the pieces in which it is sent."""
    dice = random.Random(hashlib.sha256(prompt.encode()).digest())
    return [f"“{prompt}”: ", *(dice.choice(WORDS) + " " for _ in range(TOKENS)), "∎"]

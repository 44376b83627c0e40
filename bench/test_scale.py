"""The arithmetic of docs/scaling.md, and the small parts of `bench/run scale`. Run with `python3 -m unittest discover bench`.

`python3 bench/test_scale.py table` prints the table of the page from its constants.
"""

import re
import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
import scale
import tables

PAGE = harness.ROOT / "docs/scaling.md"
# The chat of the page: messages down and up and openings, per connection and second.
DOWN, UP, OPENED = 0.05, 0.01, 0.00083
FULL = 0.6


def constants() -> dict:
    """The first number of each constant of the page."""
    found = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\d,]+(?:\.\d+)?)", PAGE.read_text(), re.M)
    return {name: float(value.replace(",", "")) for name, value in found}


def redis_nodes(n: int, kept: bool) -> tuple:
    """Cores of Redis for all, deployments, and masters of each."""
    known = constants()
    each = DOWN * known["redis_history_us" if kept else "redis_plain_us"] + UP * known["redis_plain_us"]
    all_cores = n * (each + OPENED * known["redis_connect_us"]) / 1e6

    def fits(masters: int, deployments: int) -> bool:
        cores, messages = all_cores / deployments, n * (DOWN + UP) / deployments
        bus = known["bus_send_us"] * (2 * masters - 1) + known["bus_receive_us"] * (masters - 1) if masters > 1 else 0
        return (cores + messages * bus / 1e6) / masters <= FULL

    # One deployment is simpler than two, where a Cluster is enough for it; more of them are as small as they can be.
    choices = [(1, masters) for masters in (1, *range(3, 13))]
    choices += [(deployments, masters) for deployments in range(2, 100) for masters in (1, 3)]
    deployments, masters = next(choice for choice in choices if fits(choice[1], choice[0]))
    return all_cores, deployments, masters


def nodes(deployments: int, masters: int) -> str:
    one = "1 Redis" if masters == 1 else f"{masters} masters"
    return one if deployments == 1 else f"{deployments} deployments of {one}"


def row(n: int) -> list:
    """One row of the page's table."""
    known = constants()
    gateway = n * (known["idle_us"] + DOWN * known["delivery_us"] * known["history_factor"] + UP * known["up_us"]
                   + OPENED * known["connect_us"]) / 1e6
    kept, plain = redis_nodes(n, True), redis_nodes(n, False)
    memory = n * (known["connection_bytes"] + known["kernel_bytes"]) / 1e9
    history = n * (known["redis_channels_bytes"] + known["redis_log_bytes"]) / 1e9
    network = n * (DOWN * 260 + 5) * 8 / 1e6
    return [f"{n:,}", f"{round(n * DOWN):,}", f"{gateway:.2g}", f"{max(2, round(n / 100_000), round(gateway)):,}", f"{memory:.2g} GB",
            f"{kept[0]:.2g}", nodes(*kept[1:]), f"{plain[0]:.2g}", nodes(*plain[1:]), f"{history:.2g} GB", f"{network:,.0f} Mbit/s"]


HEADER = ["connections", "messages/s", "gateway cores", "instances", "gateway and kernel memory", "Redis cores, with history",
          "Redis", "Redis cores, plain", "Redis", "Redis memory with history", "network to clients"]
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)


class Page(unittest.TestCase):
    def test_table_follows_from_the_constants(self):
        self.assertIn(tables.table(HEADER, [row(n) for n in SIZES]), PAGE.read_text())

    def test_every_command_of_the_page_has_its_row(self):
        text = PAGE.read_text()
        groups = {"scale": scale.SCALE}
        named = re.findall(r"`bench/run scale --only ([\w,]+)`", text)
        self.assertTrue(named)
        for only in named:
            for name in only.split(","):
                self.assertIn(name, groups["scale"])


class Parts(unittest.TestCase):
    def test_quantile_counts_each_age_as_often_as_it_stands_for(self):
        ages = [(1_000_000, 98), (9_000_000, 2)]
        self.assertEqual(scale.quantile(ages, 0.5), 1.0)
        self.assertEqual(scale.quantile(ages, 0.99), 9.0)
        self.assertEqual(scale.quantile([], 0.99), float("inf"))

    def test_the_last_of_equal_flags_counts(self):
        self.assertEqual(scale.last_value(["-n", 5, "--x", 1, "-n", 7], "-n", 0), 7)
        self.assertEqual(scale.last_value([], "-n", 3), 3)

    def test_figures_belong_to_a_row(self):
        for figure in scale.SCALE_FIGURES:
            self.assertIn(figure["of"], scale.SCALE)

    def test_commands_are_those_of_redis(self):
        self.assertEqual(scale.command("SET", "a", b"\xff", 1), b"*4\r\n$3\r\nSET\r\n$1\r\na\r\n$1\r\n\xff\r\n$1\r\n1\r\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        print(tables.table(HEADER, [row(n) for n in SIZES]))
    else:
        unittest.main()

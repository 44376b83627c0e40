"""The command of the chaos suite: named scenarios and random rounds, a table of what came of them, and an exit code."""

import argparse
import asyncio
import contextlib
import datetime
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field

import names
import scenarios
from world import World

# No scenario takes longer, unless something hangs.
SCENARIO_SECONDS = 120
# The short form begins no further round after this long, so that it ends within three minutes.
SHORT_SECONDS = 150
# The random rounds of the short form: one in which nothing may be lost, and one in which Redis forgets.
SHORT_SEEDS = (1, 10)


@dataclass
class Result:
    """The result of a scenario or a round."""

    name: str
    seconds: float = 0.0
    violations: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    seen: int = 0
    lost: int = 0
    error: str = ""

    @property
    def verdict(self):
        """One word."""
        return "ERROR" if self.error else "VIOLATED" if self.violations else "held"


async def run_world(name, world, play):
    """Plays in a world, lets it settle, and judges it."""
    result, started = Result(name), time.monotonic()
    try:
        async with world:
            try:
                async with asyncio.timeout(SCENARIO_SECONDS):
                    await play(world)
                    await world.settle()
            except Exception:
                result.error = traceback.format_exc(limit=-6)
            result.violations = await world.judge()
            result.notes = world.notes
            result.seen = sum(client.view.count("message") for client in world.clients)
            result.lost = sum(client.view.count("lost") + client.view.count("gap") for client in world.clients)
            if (result.violations or result.error) and os.environ.get("CHAOS_KEEP"):
                world.keep(os.environ["CHAOS_KEEP"], name)
    except Exception:
        result.error = traceback.format_exc(limit=-6)
    result.seconds = time.monotonic() - started
    return result


def scenario_world(scenario, seed):
    """The world that a scenario asks for."""
    return World(seed, scenario.limits, scenario.settings, scenario.expectations, scenario.moves_clock)


async def run_scenarios(chosen, seed, at_once):
    """Runs scenarios, a few at a time; each has a world of its own."""
    gate = asyncio.Semaphore(at_once)

    async def one(scenario):
        async with gate:
            result = await run_world(scenario.name, scenario_world(scenario, seed), scenario.run)
            show(result)
            return result

    return await asyncio.gather(*(one(each) for each in chosen))


async def run_rounds(seed, minutes, rounds):
    """Random rounds, each with the next seed, until the time is over."""
    import chaos

    results, end = [], time.monotonic() + minutes * 60
    while (rounds and len(results) < rounds) or (not rounds and time.monotonic() < end):
        number = seed + len(results)
        plan = chaos.Plan(number)
        print(f"round --seed {number} --rounds 1: {plan}", flush=True)
        result = await run_world(f"random {number}", plan.world(), plan.play)
        show(result)
        results.append(result)
    return results


# ---- what people read ----


def show(result):
    """A line at once, and what was violated."""
    print(f"{result.verdict:9} {result.seconds:5.1f} s  {result.name}", flush=True)
    for note in result.notes:
        print(f"            {note}")
    if result.error:
        print("    " + result.error.replace("\n", "\n    "))
    shown = {}
    for violation in result.violations:
        key = violation.view.name if violation.view else ""
        shown.setdefault(key, []).append(violation)
    for who, violations in shown.items():
        for violation in violations[:4]:
            print(f"  ! {who + ': ' if who else ''}{violation.what}")
        if len(violations) > 4:
            print(f"  ! … and {len(violations) - 4} more of {who or 'the world'}")
        if violations[0].view:
            print(violations[0].history(), flush=True)


def table(results):
    """A line for each, at the end."""
    lines = [f"{'':9} {'seconds':>7} {'messages':>8} {'notices':>7} {'broken':>6}  what"]
    for each in results:
        measured = f"{each.seconds:7.1f} {each.seen:8} {each.lost:7} {len(each.violations):6}"
        lines.append(f"{each.verdict:9} {measured}  {each.name}")
    bad = sum(each.verdict != "held" for each in results)
    lines.append(f"{len(results) - bad} held, {bad} did not")
    # Repeated, since the lines that were shown at once may be far above.
    lines += [f"{each.name}: {each.error.strip().splitlines()[-1]}" for each in results if each.error]
    return "\n".join(lines)


def write_report(path, seed, seconds, text):
    """The report of a long run, to be committed."""
    commit = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    about = f"{now}, commit {commit}, {seconds / 60:.0f} minutes, random rounds from --seed {seed}."
    pathlib.Path(path).write_text(f"# The last long run of the chaos suite\n\n{about}\n\n```\n{text}\n```\n")


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(prog="tests/chaos/run", description=__doc__)
    parser.add_argument("--list", action="store_true", help="list the named scenarios")
    parser.add_argument("--scenario", action="append", metavar="NAME", help="run this one (again for more; `all`)")
    parser.add_argument("--seed", type=int, help="seed of the first random round; without it a random one; in the short form always the same")
    parser.add_argument("--rounds", type=int, default=0, help="run so many random rounds")
    parser.add_argument("--minutes", type=float, default=0.0, help="run random rounds for so long")
    parser.add_argument("--at-once", type=int, default=4, metavar="N", help="scenarios that run at the same time (4)")
    parser.add_argument("--report", metavar="FILE", help="write what came of it into this file, with the date")
    parser.add_argument("--repeat", type=int, default=1, help="run the scenarios so often")
    return parser.parse_args()


def main():
    """Without arguments: what CI runs, within three minutes."""
    asked, known = arguments(), scenarios.load()
    if asked.list:
        for each in known.values():
            print(f"{each.name:28} {'(slow) ' if each.is_slow else ''}{each.about}")
        return 0
    is_short = not (asked.scenario or asked.rounds or asked.minutes)
    fresh = SHORT_SEEDS[0] if is_short else random.SystemRandom().randrange(1 << 31)
    seed = asked.seed if asked.seed is not None else fresh
    wanted = [each for each in known.values() if not each.is_slow] if is_short else []
    for name in asked.scenario or []:
        if name != "all" and name not in known:
            print(f"There is no scenario {name}; --list shows them.", file=sys.stderr)
            return 64
        wanted += known.values() if name == "all" else [known[name]]
    print(f"{names.BINARY} with the names of {names.FORM}; repeat random rounds with --seed {seed}", flush=True)
    started = time.monotonic()
    try:
        results = asyncio.run(everything(asked, wanted * asked.repeat, seed, is_short))
    except asyncio.CancelledError:
        return 143
    text = table(results)
    print(f"\n{text}")
    if asked.report:
        write_report(asked.report, seed, time.monotonic() - started, text)
    return 0 if all(each.verdict == "held" for each in results) else 1


async def everything(asked, wanted, seed, is_short):
    """Scenarios first, then random rounds: in short two with fixed seeds, so that CI tries the same every time."""
    started = time.monotonic()
    # All that was started is ended, also when this process is ended.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    results = list(await run_scenarios(wanted, seed, asked.at_once)) if wanted else []
    if is_short:
        for first in SHORT_SEEDS:
            if time.monotonic() - started < SHORT_SECONDS:
                results += await run_rounds(first, 0, 1)
            else:
                print(f"There is no time left for the round --seed {first}.", flush=True)
    elif asked.rounds or asked.minutes:
        results += await run_rounds(seed, asked.minutes, asked.rounds)
    return results


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)

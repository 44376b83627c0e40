"""Turns the results of runs into medians, ratios and the committed table."""

import json
import statistics
from pathlib import Path


def median(values: list) -> float | None:
    numbers = [value for value in values if isinstance(value, (int, float))]
    return statistics.median(numbers) if numbers else None


def shown(value, unit: str = "") -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and abs(value) < 100:
        text = f"{value:.2f}".rstrip("0").rstrip(".")
    else:
        text = f"{value:,.0f}"
    return f"{text} {unit}".strip()


def spread(values: list, unit: str = "") -> str:
    """The median with the lowest and highest run beside it."""
    numbers = [value for value in values if isinstance(value, (int, float))]
    if not numbers:
        return "-"
    middle = shown(statistics.median(numbers), unit)
    if len(numbers) == 1:
        return middle
    return f"{middle} ({shown(min(numbers))} to {shown(max(numbers))})"


def verdict(value, figure: dict) -> str:
    if value is None or figure.get("bar") is None:
        return ""
    sign = -1 if figure.get("higher_is_better") else 1
    if figure.get("aim") is not None and sign * value <= sign * figure["aim"]:
        return "aim reached"
    return "bar reached" if sign * value <= sign * figure["bar"] else "**missed**"


def beyond(value, base):
    """The part of a value that another one does not have."""
    return None if value is None or base is None else value - base


def table(header: list, rows: list) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def figures_table(result: dict, group: str = "figures") -> str:
    rows = []
    for figure in result["figures"]:
        sign = ">=" if figure.get("higher_is_better") else "<="
        bounds = [
            f"{sign} {shown(figure[key])}" if figure.get(key) is not None else ""
            for key in ("bar", "aim")
        ]
        got = spread(figure["values"], figure["unit"])
        who_all = ("wsproxy", figure.get("versus"), figure.get("beyond"))
        parts = [f"{who} {spread(figure[who])}" for who in who_all if figure.get(who)]
        said = verdict(median(figure["values"]), figure)
        command = f"`bench/run {group} --only {figure['of']}`" if figure.get("of") else ""
        rows.append([figure["title"], got, "; ".join(parts), *bounds, said, command])
    header = ["what", "median (lowest to highest)", "of which", "bar", "aim", "", "command"]
    return table(header, rows)


TUNNEL_NAMES = {"wsproxy": "gateway and agent", "hyper": "two hyper proxies", "nginx": "two nginx", "ssh": "`ssh -R`",
                "local": "agent at the same instance"}


def tunnel_table(result: dict, group: str = "tunnel") -> str:
    """The gateway with its agent beside all peers. A bar is of the value, of its quotient over a peer's (`over`), or of
    what it is above that (`above`)."""
    measured = {who for figure in result["figures"] for who in figure["all"]}
    names = [who for who in TUNNEL_NAMES if who in measured]
    rows = []
    for figure in result["figures"]:
        unit = figure["unit"]
        row = [figure["title"], *[spread(figure["all"].get(who, []), unit) for who in names]]
        bar, judged = "", median(figure["all"].get("wsproxy", []))
        if figure.get("bar") is not None:
            bar = f"{'>=' if figure.get('higher_is_better') else '<='} {shown(figure['bar'])}"
            base = figure.get("over") or figure.get("above")
            theirs = median(figure["all"].get(base, [])) if base else None
            if figure.get("over"):
                judged = judged / theirs if judged is not None and theirs else None
                bar += f"x {TUNNEL_NAMES[base]}: {shown(judged)}x"
            elif figure.get("above"):
                judged = beyond(judged, theirs)
                bar += f" {unit} above {TUNNEL_NAMES[base]}: {shown(judged)}"
            else:
                bar = f"{bar} {unit}".strip()
        rows.append([*row, bar, verdict(judged, figure), f"`--only {figure['of']}`"])
    return table(["what", *[TUNNEL_NAMES[who] for who in names], "bar", "", f"`bench/run {group}`"], rows)


def peers_table(result: dict) -> str:
    names = result["servers"]
    rows = []
    for figure in result["figures"]:
        base = median(figure["values"].get("wsproxy", []))
        row = [figure["title"]]
        for name in names:
            value = median(figure["values"].get(name, []))
            cell = shown(value, figure["unit"])
            if value and base and name != "wsproxy":
                cell += f" ({value / base:.2f}x)"
            row.append(cell + figure["marks"].get(name, ""))
        rows.append(row)
    return table(["what", *names], rows)


def steps_table(result: dict) -> str:
    """The deliveries and the processors' use at each rate of the ramp; from the median run."""
    runs = result.get("ramp") or []
    runs = [run for run in runs if run.get("steps")]
    if not runs:
        return ""
    run = sorted(runs, key=lambda run: run["highest_rate_held_per_s"])[len(runs) // 2]
    rows = []
    for step in run["steps"]:
        used = [step.get(f"{who}_cpu_percent") for who in ("server", "redis", "client")]
        rows.append([
            shown(step["rate_per_s"]), shown(step.get("deliveries_per_s")),
            shown(step.get("latency_p50_ms"), "ms"), shown(step.get("latency_p99_ms"), "ms"),
            *[shown(value, "%") for value in used], "yes" if step["held"] else "no",
        ])
    header = ["asked/s", "delivered/s", "p50", "p99", "gateway CPU", "Redis CPU", "client CPU", "held"]
    return "\nWhat the ramp used (one core is 100 %):\n\n" + table(header, rows) + "\n"


def page(folder: Path) -> str:
    """The committed page, from every result in the folder."""
    parts = ["# Results\n", "Made by `bench/run figures` and `bench/run peers`; do not edit by hand.\n"]
    shapes = (
        ("figures", figures_table),
        ("history", lambda result: figures_table(result, "history")),
        ("agents", lambda result: figures_table(result, "agents")),
        ("rooms", lambda result: figures_table(result, "rooms")),
        ("tls", lambda result: figures_table(result, "tls")),
        ("operator", lambda result: figures_table(result, "operator")),
        ("tunnel", tunnel_table),
        ("scale", lambda result: figures_table(result, "scale")),
        ("peers", peers_table),
    )
    for name, shape in shapes:
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        told = ", ".join(f"{key} {value}" for key, value in result["conditions"].items())
        parts.append(f"## {name.capitalize()}\n")
        parts.append(f"Medians of {result['runs']} runs. Conditions: {told}.\n")
        parts.append(shape(result) + "\n")
        parts.append(steps_table(result))
        if result["problems"]:
            parts.append("\nProblems that runs reported:\n")
            parts += [f"- {problem}" for problem in result["problems"]]
            parts.append("")
    return "\n".join(part for part in parts if part)

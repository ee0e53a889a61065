"""Runs the cases, keeps what each race found, and writes the table of all of them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.cases import CASES, CLAIMS, MODEL_BOUND, OURS, PAPER, QUERY_BASED, WHITE_BOX, Case, Result, overhead
from benchmarks.networks import bench
from besiege.bench.measure import Failure, Figures, contender, race
from besiege.core.errors import BadInput, nearest

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BESIDE = (PAGE.with_name("universal.md"), PAGE.with_name("shadow.md"))
"""The pages of what no race of single images measures, whose tables this page has too."""
FIGURES = Path(__file__).parent / "figures.json"
"""What every race found when it was last run, from which the page is written."""
COLUMNS = (
    "CPU ms",
    "wall ms",
    "forward",
    "backward",
    "floor ms",
    "floor ms, best batch",
    "floor ms, as given",
    "time / floor",
    "robust accuracy",
    "median distance",
    "mean distance",
)


def table(
    names: Sequence[str] = (), *, images: int = 100, repeat: int = 3, command: str = "", write: bool = False
) -> str:
    """Race ``names``, or all. With ``write``, or without names, the races replace what docs/benchmarks.md has of them.

    Each race is kept as soon as it is run. Progress goes to stderr.

    Raises:
        BadInput: an unknown name, a table to be written without all peers, or no benchmark data.
    """
    known = {case.name for case in CASES}
    for name in names:
        if name not in known:
            raise BadInput(f"there is no benchmark of {name!r}; {nearest(name, known)}")
    write = write or not names
    missing = [library.distribution for library in peers.LIBRARIES.values() if not library.installed]
    if missing and write:
        raise BadInput(
            f"the table needs all peers, but {', '.join(missing)} cannot be imported: run `make bench`, which installs "
            "them (extra `peers`), or name single benchmarks"
        )
    torch.set_num_threads(1)
    results = []
    for case in (case for case in CASES if not names or case.name in names):
        result = measure(case, images, repeat, command, lambda line: print(line, file=sys.stderr, flush=True))
        results.append(result)
        if write:
            keep(result)
    if not write:
        return render(results)
    page = render(kept())
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page)
    return page


def keep(result: Result) -> None:
    """Write ``result`` in place of what the same case found before."""
    entries: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    entries[str(result.case)] = {
        "facts": dict(result.facts),
        "figures": {name: asdict(found) for name, found in result.figures.items()},
    }
    whole = FIGURES.with_suffix(".part")
    whole.write_text(json.dumps(entries, indent=1) + "\n")
    whole.replace(FIGURES)


def kept() -> list[Result]:
    """What is kept of the cases that there are now, in their order."""
    entries: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    return [
        Result(
            case,
            {
                name: Failure(**found) if "why" in found else Figures(**found)
                for name, found in entries[str(case)]["figures"].items()
            },
            entries[str(case)]["facts"],
        )
        for case in CASES
        if str(case) in entries
    ]


def measure(case: Case, images: int, repeat: int, command: str, tell: Callable[[str], None]) -> Result:
    """One race."""
    target, chosen = bench(case.network, min(images, case.images or images))
    contenders = {OURS: contender(case.attack, target, case.model)}
    if not case.alone:
        contenders |= peers.contenders(case.name, case.shared)
    if case.published:
        contenders[PAPER] = contender(case.published, target, case.model)
    laps = min(repeat, case.laps or repeat)
    found = race(
        contenders,
        target.module,
        chosen,
        case.ball,
        repeat=laps,
        seeds=case.seeds,
        tell=lambda line: tell(f"{case.name}: {line}"),
    )
    result = Result(case, found, facts(laps, command))
    tell("\n".join(["", *section(result), ""]))
    return result


def render(results: Sequence[Result]) -> str:
    """The page in Markdown."""
    lines = [
        "# Benchmarks",
        "",
        "Written by the benchmark itself; no figure is typed. Each attack is raced against the same attack of its "
        "peers, in turn in one process, every one followed by its floor: the bare network's passes at the batch sizes "
        "that the attack sent (weights frozen, gradient of the input alone), counted by a wrapper around the network. "
        "Ours lays the network out anew for its search, and its floor is that of the new layout, the lower one; beside "
        "it is the floor of the network as given. "
        "Times are milliseconds an image, on one thread, everything included that a user waits for; passes are an "
        "image's; medians over the laps. What fell is confirmed by a pass of its own, and must lie in [0, 1] and "
        "within the radius. Networks: A, a digits CNN; R, the same trained adversarially; B, a CIFAR-10 ResNet-20. "
        "Images: those that the network classifies correctly.",
        "",
        "## What is to be reached",
        "",
        "| attack | figure | measured | bar | |",
        "|---|---|---:|---:|---|",
        *_claims(results),
        "",
        "## The races",
        *(line for result in results for line in ["", *section(result)]),
        *(line for page in BESIDE for line in ["", *_tabled(page)]),
    ]
    return "\n".join(lines) + "\n"


def _tabled(page: Path) -> list[str]:
    """The title of another page, its table, and where its words are."""
    lines = page.read_text().splitlines()
    title = f"### {lines[0].removeprefix('# ')}; see [{page.name}]({page.name})"
    return [title, "", *(line for line in lines if line.startswith("|"))]


def facts(laps: int, command: str) -> dict[str, str]:
    """Where and with what a race was run."""
    version = importlib.metadata.version
    return {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "laps": str(laps),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "software": ", ".join(f"{name} {version(name)}" for name in ("besiege", "torch", "numpy"))
        + f", Python {platform.python_version()}",
        "peers": ", ".join(
            f"{library.distribution} {version(library.distribution)}"
            for library in peers.LIBRARIES.values()
            if library.installed
        ),
    }


def section(result: Result) -> list[str]:
    """One race as a Markdown table."""
    ran = next((found for found in result.figures.values() if not isinstance(found, Failure)), None)
    lines = [
        f"### {result.case}" + (f"; {ran.images} images" if ran else ""),
        "",
        "| | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name, found in result.figures.items():
        if isinstance(found, Failure):
            lines.append(f"| {name} | does not run: {_cell(found.why)} |" + " |" * (len(COLUMNS) - 1))
            continue
        cells = (
            f"{found.cpu_ms:.3g}",
            f"{found.wall_ms:.3g}",
            f"{found.forward:.1f}",
            f"{found.backward:.1f}",
            f"{found.floor_ms:.3g}",
            f"{found.best_floor_ms:.3g} ({found.best_batch})",
            "–" if found.given_ms is None else f"{found.given_ms:.3g}",
            f"{found.overhead:.2f}",
            f"{100 * found.robust_accuracy:.1f} %",
            "–" if found.median_distance is None else f"{found.median_distance:.4g}",
            "–" if found.mean_distance is None else f"{found.mean_distance:.4g}",
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if result.facts:
        lines += ["", "; ".join(f"{name}: {fact}" for name, fact in result.facts.items() if fact) + "."]
    return lines


def _claims(results: Sequence[Result]) -> list[str]:
    lines = []
    raced = [result for result in results if not result.case.alone]
    by_name = {name: result for result in raced for name in (result.case.name, result.case.key, result.case.place)}
    for claim in CLAIMS:
        if claim.name not in by_name:
            continue
        try:
            measured, bar = claim.figure(by_name[claim.name]), claim.bar(by_name[claim.name])
        except BadInput as error:
            lines.append(f"| {claim.name} | {claim.what} | not measured: {_cell(str(error))} | | |")
            continue
        lines.append(_row(claim.name, claim.what, measured, bar))
    places = (("B", "the ResNet-20"), ("AR", "the digits CNNs, which take 0.05 ms an image"))
    each = [((name,), bar, True) for name, bar in QUERY_BASED.items()]
    for names, bar, given in ((MODEL_BOUND, 1.1, False), (WHITE_BOX, 1.15, False), *each):
        for networks, which in places:
            floor = "the same passes of the network as given" if given else "the floor"
            what = f"CPU time over {floor} on {which}, median over {', '.join(names)}"
            try:
                lines.append(_row("all", what, overhead(results, networks, names, given=given), bar))
            except BadInput as error:
                lines.append(f"| all | {what} | not measured: {_cell(str(error))} | | |")
    return lines


def _row(name: str, what: str, measured: float, bar: float) -> str:
    return f"| {name} | {what} | {measured:.4g} | {bar:.4g} | {'met' if measured <= bar else '**missed**'} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:200]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())

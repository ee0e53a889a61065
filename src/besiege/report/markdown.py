"""An audit as Markdown, for a pull request or a job's summary."""

from __future__ import annotations

from collections.abc import Iterable

from besiege.report import summary
from besiege.results.audit import Audit
from besiege.results.record import Interval


def render(audit: Audit) -> str:
    """The verdict, the thresholds, every attack with its interval, the checks and what was left out."""
    rows = [("clean", "", audit.n, audit.clean_accuracy, audit.clean_interval)]
    rows += [(r.attack, str(r.threat), r.n, r.robust_accuracy, r.robust_interval) for r in audit.records]
    lines = [f"# {_plain(audit.target)} on {_plain(audit.data)}", ""]
    lines += [f"- {'passed' if gate.passed else '**failed**'}: {gate}" for gate in audit.gates]
    lines += [f"- worst case within {w}: {w.robust_accuracy:.1%} ({_span(w.robust_interval)})" for w in audit.worst]
    lines += [] if audit.complete else ["- the run was cut short"]
    lines += ["", *_table(("attack", "threat", "images", "accuracy", "95 %"), rows)]
    lines += _section("Beyond evasion", summary.lines(audit))
    lines += _section("What to do", (advice.text for advice in audit.advice))
    lines += _section("Checks", (f"{'pass' if c.passed else '**warn**'} {c.name}: {c.evidence}" for c in audit.checks))
    lines += _section("Left out", (f"{left}: {left.why}" for left in audit.left_out))
    lines += _section("Warnings", audit.warnings)
    environment = audit.environment
    lines += ["", f"besiege {environment.besiege}, torch {environment.torch}, seed {audit.seed}, {audit.seconds:.0f} s"]
    return "\n".join(lines) + "\n"


def _table(head: Iterable[str], rows: Iterable[tuple[str, str, int, float, Interval]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---|---|---:|---:|---:|"]
    for name, threat, n, accuracy, interval in rows:
        lines.append(f"| {_plain(name)} | {_plain(threat)} | {n} | {accuracy:.1%} | {_span(interval)} |")
    return lines


def _section(title: str, lines: Iterable[str]) -> list[str]:
    items = [f"- {_plain(line)}" if "**" not in line else f"- {line}" for line in lines]
    return ["", f"## {title}", "", *items] if items else []


def _span(interval: Interval) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in " ".join(text.split()))

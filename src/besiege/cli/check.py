"""`besiege check`: the look before hours are spent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from besiege.cli import options as o

if TYPE_CHECKING:
    from besiege.audit.look import Look
    from besiege.results.checks import Check


@o.opening
def check(
    target: o.TargetSpec = None,
    data: o.DataSpec = None,
    limit: o.Limit = None,
    json: o.Json = False,
    *,
    how: o.How,
) -> None:
    """Say what a classifier is, how well it does on the images, and what an audit would cost."""
    from besiege.audit.look import look

    victim, images = how.both(target, data, limit or 200)
    seen = look(victim, images)
    if json:
        typer.echo(seen.model_dump_json())
    else:
        _print(seen)


def _print(seen: Look) -> None:
    from besiege.audit.look import UNCOUNTED
    from besiege.audit.plan import IMAGES
    from besiege.cli.terminal import between, facts, percent

    size = "" if seen.parameters is None else f", {seen.parameters:,} parameters"
    costs = ", ".join(
        f"{budget} {_minutes(seconds)}" + ("" if IMAGES[budget] else f" per {UNCOUNTED:,} images")
        for budget, seconds in seen.costs.items()
    )
    facts(
        seen.target,
        [
            ("classifier", f"{seen.kind}{size}, on {seen.device}"),
            ("fingerprint", seen.fingerprint or "–"),
            ("takes", f"{' × '.join(map(str, seen.shape))} (channels, height, width), pixels in [0, 1]"),
            ("answers", f"{seen.classes} classes, {seen.answers}" + ("" if seen.deterministic else ", at random")),
            ("grants", seen.access),
            ("data", f"{seen.data}, {seen.n} images"),
            ("clean accuracy", f"{percent(seen.clean_accuracy)}  ({between(seen.clean_interval)})"),
            (
                "speed",
                f"{seen.forward_ms:.3g} ms forward, "
                + ("no" if seen.backward_ms is None else f"{seen.backward_ms:.3g} ms")
                + f" backward an image, {seen.batch} at once",
            ),
            ("an audit", f"at most {costs}"),
            *(("pass" if check.passed else "warn", _said(check)) for check in seen.checks),
            *(("note", text) for text in seen.notes),
            *(("warning", text) for text in seen.warnings),
        ],
    )


def _said(check: Check) -> str:
    return f"{check.name}: {check.evidence}" + ("" if check.passed else f"; {check.advice}")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"

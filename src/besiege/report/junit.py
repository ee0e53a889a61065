"""An audit as JUnit XML, as build servers read it: thresholds pass or fail, checks that warn are skipped tests."""

from __future__ import annotations

from xml.etree import ElementTree

from besiege.report import summary
from besiege.results.audit import Audit
from besiege.results.defense import Defense


def render(audit: Audit) -> str:
    """One suite: a case for each threshold, each worst case and each check."""
    suite = ElementTree.Element("testsuite", name=f"besiege {_printable(audit.name)}", time=f"{audit.seconds:.3f}")
    for gate in audit.gates:
        case = _case(suite, "thresholds", f"{gate.threat} at least {gate.at_least:.1%}")
        if not gate.passed:
            ElementTree.SubElement(case, "failure", message=str(gate))
    for worst in audit.worst:
        low, high = worst.robust_interval
        said = f"{worst.robust_accuracy:.1%} ({low:.1%} to {high:.1%}) stand {', '.join(worst.attacks)}"
        ElementTree.SubElement(_case(suite, "worst case", str(worst)), "system-out").text = said
    for front in audit.fronts:
        case = _case(suite, "beyond evasion", front.defense if isinstance(front, Defense) else front.attack)
        ElementTree.SubElement(case, "system-out").text = _printable("; ".join(summary.said(front)))
    for check in audit.checks:
        case = _case(suite, "checks", check.name)
        ElementTree.SubElement(case, "system-out").text = _printable(check.evidence)
        if not check.passed:
            ElementTree.SubElement(case, "skipped", message=_printable(f"{check.evidence}; {check.advice}"))
    for left in audit.left_out:
        case = _case(suite, "left out", str(left))
        ElementTree.SubElement(case, "skipped", message=_printable(left.why))
    for kind, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
        suite.set(kind, str(len(list(suite.iter(tag)))))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ElementTree.Element, group: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=f"besiege.{group}", name=_printable(name))


def _printable(text: str) -> str:
    """What XML can hold."""
    return "".join(c if c.isprintable() else " " for c in text)

"""What each front beyond evasion came to, in a sentence."""

from __future__ import annotations

from besiege.results.audit import Audit
from besiege.results.defense import Defense, Worst
from besiege.results.extraction import Theft
from besiege.results.inference import Inversion, Membership, Reconstruction
from besiege.results.poisoning import PoisonRecord
from besiege.results.record import Facts, Interval


def lines(audit: Audit) -> list[str]:
    """A line for each front, as plain text."""
    return [line for front in audit.fronts for line in said(front)]


def said(front: Facts) -> list[str]:
    """What one front came to; of a defense, a line for each threat."""
    if isinstance(front, Defense):
        kept = f"clean accuracy {front.clean_accuracy:.1%} before, {front.clean_accuracy_defended:.1%} behind it"
        return [f"{front.defense}: {front.verdict}; {kept}", *(_worst(front.defense, worst) for worst in front.worst)]
    if isinstance(front, Membership):
        found = ", ".join(f"{share:.1%} at {float(rate):.1%}" for rate, share in front.tpr_at_fpr.items())
        return [f"{front.attack}: AUC {front.auc:.3f} ({_span(front.auc_interval)}); finds {found} false alarms"]
    if isinstance(front, Inversion):
        return [
            f"{front.attack}: {front.recognized} of {front.n} classes recognized from pictures of the model's making"
        ]
    if isinstance(front, Reconstruction):
        return [f"{front.attack}: {front.ratio:.2f} of the error of guessing the class mean, over {front.n} images"]
    if isinstance(front, Theft):
        return [
            f"{front.attack}: agrees on {front.agreement:.1%} after {front.queries:,} queries; accuracy "
            f"{front.accuracy:.1%}, the target's {front.target_accuracy:.1%}"
        ]
    assert isinstance(front, PoisonRecord)
    return [
        f"{front.attack}: {front.poison_rate:.2%} poison, {front.attack_success:.1%} success "
        f"({_span(front.success_interval)}), {front.attack_success_twin:.1%} on the clean twin"
    ]


def facts(front: Facts) -> list[tuple[str, str]]:
    """The figures of one front other than a defense, by what they are."""
    if isinstance(front, Membership):
        return [
            ("images", f"{front.members} members, {front.nonmembers} others"),
            ("accuracy", f"{front.member_accuracy:.1%} of members, {front.nonmember_accuracy:.1%} of others"),
            ("AUC", f"{front.auc:.3f} ({_span(front.auc_interval)})"),
            *(
                (f"found at {float(rate):.1%} false alarms", f"{share:.1%} ({_span(front.tpr_at_fpr_interval[rate])})")
                for rate, share in front.tpr_at_fpr.items()
            ),
        ]
    if isinstance(front, Inversion):
        return [
            ("recognized", f"{front.recognized} of {front.n} ({_span(front.recognition_interval)})"),
            ("by", f"{front.evaluator}, right in {front.evaluator_accuracy:.1%}"),
            ("confidence of the target", f"{front.confidence:.1%} (mean)"),
        ]
    if isinstance(front, Reconstruction):
        return [
            ("images", str(front.n)),
            ("error", f"{front.ratio:.2f} of that of guessing the mean of the class; PSNR {front.psnr:.1f} dB"),
            ("labels right", f"{front.label_accuracy:.1%}"),
        ]
    if isinstance(front, Theft):
        alarm = "none" if front.first_alarm is None else f"the first at query {front.first_alarm:,}"
        return [
            ("queries", f"{front.queries:,} about {front.asked_of}"),
            ("accuracy", f"{front.accuracy:.1%} ({_span(front.accuracy_interval)})"),
            ("… of the target", f"{front.target_accuracy:.1%}"),
            ("agreement", f"{front.agreement:.1%} ({_span(front.agreement_interval)})"),
            ("fooled through the copy", f"{_share(front.transfer_success)}; by noise {_share(front.transfer_noise)}"),
            ("alarms of a query monitor", alarm),
        ]
    assert isinstance(front, PoisonRecord)
    return [
        ("poisoned", f"{front.poison_count:g} of {front.n_train} images ({front.poison_rate:.2%})"),
        ("attack success", f"{front.attack_success:.1%} ({_span(front.success_interval)})"),
        ("… of the clean twin", f"{front.attack_success_twin:.1%} ({_span(front.success_interval_twin)})"),
        ("clean accuracy", f"{front.clean_accuracy:.1%}, the clean twin's {front.clean_accuracy_twin:.1%}"),
    ]


def _worst(name: str, worst: Worst) -> str:
    return (
        f"{name}: within {worst.threat} {worst.before:.1%} fall before, {worst.unknowing:.1%} to who does not know it, "
        f"{worst.knowing:.1%} to who does: {worst.verdict}"
    )


def _share(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.1%}"


def _span(interval: Interval) -> str:
    return f"{interval[0]:.3f}–{interval[1]:.3f}"

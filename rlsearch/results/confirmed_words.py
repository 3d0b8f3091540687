"""What was confirmed, in the few words that fit a table, a line or a card."""

from __future__ import annotations

from rlsearch.results.confirmation import Confirmation, Estimate, confirmations
from rlsearch.results.selection import baseline, front
from rlsearch.results.tables import Run

CONFIRMED_NOTE = (
    "Trained again with new seeds, one training at a time, and measured on the test split. ± is the half of a 95 % "
    "t interval of the mean, over that policy's own trainings. Differences to the baseline are taken seed by seed. "
    "P(front) is the chance to be on the true front of the confirmed policies, with the spread between seeds pooled "
    "over all of them."
)


def describe_mean(found: Estimate | None) -> str:
    """A mean accuracy with its interval, as in ``96.51 ± 1.20 %``; a dash where there is none."""
    return "–" if found is None else f"{100 * found.mean:.2f}{_with_width(found)} %"


def describe_width(found: Estimate | None) -> str:
    """The half of the interval of a mean accuracy in points, as in ``± 1.20``; empty where there is none."""
    return "" if found is None or found.half_width is None else f"± {100 * found.half_width:.2f}"


def describe_change(found: Estimate | None) -> str:
    """A mean difference of accuracies in points, as in ``−0.62``; empty where there is none."""
    if found is None:
        return ""
    number = f"{100 * found.mean:+.2f}".replace("-", "−")
    # A difference too small to show is neither a gain nor a loss.
    return "±0.00" if number in ("+0.00", "−0.00") else number


def describe_chance(chance: float | None) -> str:
    """A probability with two decimals; a dash where there is none."""
    return "–" if chance is None else f"{chance:.2f}"


def describe_seeds(found: Confirmation) -> str:
    """How many trainings stand behind a mean, as in ``3`` or ``2, 1 diverged``."""
    return f"{len(found.seeds)}, {found.num_diverged} diverged" if found.num_diverged else str(len(found.seeds))


def describe_confirmation(found: Confirmation) -> str:
    """One trial's confirmation as a sentence without its end."""
    parts = [f"on the test split {describe_mean(found.accuracy)} over {describe_seeds(found)} trainings with new seeds"]
    if found.difference is not None:
        change = f"{describe_change(found.difference)}{_with_width(found.difference)} points"
        parts.append(f"{change} to the baseline with these seeds")
    if found.chance is not None:
        parts.append(f"on the true front with probability {describe_chance(found.chance)}")
    return ", ".join(parts)


def confirmed_line(run: Run) -> str | None:
    """Which trials of the front and the baseline are confirmed, and which are not; None where nothing was begun."""
    known = confirmations(run)
    if not known:
        return None
    reference = baseline(run)
    trials = dict.fromkeys(
        [*([] if reference is None else [reference.trial]), *sorted(record.trial for record in front(run))]
    )
    done = [trial for trial in trials if trial in known and known[trial].is_confirmed]
    missing = [_missing(trial, known.get(trial)) for trial in trials if trial not in done]
    seeds = sorted({len(known[trial].seeds) for trial in done})
    times = f" ({'–'.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} new seeds each)" if seeds else ""
    told = f"confirmed on the test split: {_listed(done)}{times}"
    if missing:
        return f"{told}; not confirmed: {', '.join(missing)}"
    return f"{told}: all of the front{'' if reference is None else ' and the baseline'}"


def confirmed_section(run: Run, trial: int) -> str:
    """What was confirmed of a trial and of the baseline, as a section of Markdown; empty where nothing was."""
    known = confirmations(run)
    reference = baseline(run)
    shown = {"this policy": trial} | ({} if reference is None else {"the end-to-end baseline": reference.trial})
    lines = [f"- {name}: {describe_confirmation(known[of])}" for name, of in shown.items() if of in known]
    return "\n".join(["\n## Confirmed with new seeds\n", *lines, "", CONFIRMED_NOTE, ""]) if lines else ""


def _missing(trial: int, found: Confirmation | None) -> str:
    """A trial that is not confirmed, and why where it was begun."""
    if found is None:
        return str(trial)
    return f"{trial} ({describe_seeds(found)} training{'' if len(found.seeds) == 1 else 's'})"


def _listed(trials: list[int]) -> str:
    return f"trial{'' if len(trials) == 1 else 's'} {', '.join(map(str, trials))}" if trials else "nothing yet"


def _with_width(found: Estimate) -> str:
    width = describe_width(found)
    return f" {width}" if width else ""

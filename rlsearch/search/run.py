"""Starting a search and going on with one: where the study, the folder, the sampler and Ray meet.

A resume never reads what Tune wrote about itself. It reads the study, settles what was left open, and runs a new Tuner
for what is left.
"""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import ray
from ray import tune
from rich.console import Console

from rlsearch.errors import UserError
from rlsearch.policy import Policy
from rlsearch.search.cluster import Slots, check_address, gpu_memory_bytes, plan_slots, ray_cluster
from rlsearch.search.cluster_access import OPEN_REMEDY, wants_token
from rlsearch.search.database import Told
from rlsearch.search.failures import storage_explained
from rlsearch.search.observations import Observed
from rlsearch.search.packing import largest_memory, sharing_note, start_warnings
from rlsearch.search.postgresql import check_storage
from rlsearch.search.prepare import Prepared, prepare
from rlsearch.search.reachable import Reach
from rlsearch.search.run_folder import RunFolder
from rlsearch.search.session import SearchResult, SearchSession
from rlsearch.search.space import SearchSpace, parse_space
from rlsearch.search.stopping import check_gpu_hours, go_on, stopping_warning
from rlsearch.search.study import RunStudy
from rlsearch.search.study_file import STUDY_FILES
from rlsearch.search.unsaved import settle
from rlsearch.search.warm_start import from_content, read_warm_start, to_content
from rlsearch.storage import storage_warnings
from rlsearch.training.model_factory import check_named, naming_option

# What tables, TensorBoard and checkpoints take, about.
_TABLES_BYTES = 1e9

__all__ = ["SearchResult", "resume_search", "start_search"]


def start_search(
    space: SearchSpace,
    run_dir: str | Path,
    *,
    warm_start: str | Path | None = None,
    address: str = "local",
    console: Console | None = None,
    trainable: type[tune.Trainable] | None = None,
) -> SearchResult:
    """Runs a search from its beginning, in a folder of its own.

    Args:
        space: what is searched, and for how long.
        run_dir: the run's folder; made once everything else has been checked.
        warm_start: the folder of an earlier run on the same model and space, whose accuracies the search knows.
        address: ``local``, or the address of a Ray cluster; then ``run_dir`` must lie on storage that all nodes share.
        console: where progress is shown; None for the standard output.
        trainable: what trains; None for `TrialTrainable`, or `DistributedTrainable` where the space asks for several
            workers. Another one replaces the training itself, as a benchmark of the machinery does.

    Raises:
        UserError: the space, the model, the data or the folder is wrong; nothing was written then.
        SearchError: Ray cannot be started, too many trials failed, or all of them did.
    """
    check_address(address)
    console = console or Console()
    folder = RunFolder(run_dir)
    folder.check_free()
    check_storage(space.search.storage)
    prepared = prepare(space, address)
    known = [] if warm_start is None else read_warm_start(Path(warm_start), prepared.space, _teller(console))
    prepared.sampler.learn_from(known)
    with storage_explained(folder):
        doubts = [*Reach(prepared.policies, prepared.costs).check(), *_storage_doubts(prepared, folder.path)]
    for doubt in doubts:
        console.print(f"warning: {doubt}", style="yellow", soft_wrap=True)
    _warn_if_open(address, console)
    with ray_cluster(address, prepared.data_bytes) as scratch:
        slots = _slots(prepared, address, console)
        with storage_explained(folder), folder.locked():
            folder.check_free()  # another search may have taken it since
            study = _begin(prepared.space, folder, known)
            if known:
                console.print(f"warm start: {len(known)} trials of {warm_start}", soft_wrap=True, highlight=False)
            with study.held():
                return SearchSession(prepared, folder, study, slots, trainable).run(console, scratch)


def resume_search(
    run_dir: str | Path,
    *,
    trials: str | int | None = None,
    time_budget: float | None = None,
    gpu_hours: str | None = None,
    model: str | None = None,
    address: str = "local",
    console: Console | None = None,
    trainable: type[tune.Trainable] | None = None,
) -> SearchResult:
    """Goes on with a search, however it ended: what was interrupted first, then what is left.

    Args:
        run_dir: the run's folder.
        trials: how many trials the search is to end with, ``+50`` for so many more than planned, None for as planned.
        time_budget: seconds after which no further trial starts; None for the search space's own.
        gpu_hours: the limit of the whole run's GPU time, ``+10`` for so many hours more than are spent, None for the
            limit that there is.
        model: the name of the run's model, which a ``package.module:factory`` needs: code runs only when it is named.
        address: as for `start_search`.
        console: as for `start_search`.
        trainable: as for `start_search`.

    Raises:
        UserError: there is no run, it is in use, it is damaged, its search space was changed, or its model is code
            that was not named.
        SearchError: as for `start_search`.
    """
    check_address(address)
    console = console or Console()
    folder = RunFolder(run_dir)
    folder.check_run()
    told = _teller(console)
    with storage_explained(folder), folder.locked(), (study := RunStudy.open(folder.study_path, told)).held():
        folder.check_space(study.space)
        target = _target(trials, study)
        space = parse_space(study.space, str(folder.study_path))
        space = replace(space, search=replace(space.search, trials=target))
        if len(study.records()) < target:
            check_named(space.model.name, model, f"the run in {folder.path}")
        if time_budget is not None:
            space = replace(space, search=replace(space.search, time_budget=time_budget))
        folder.remove_leftovers()
        settle(study, folder.path)
        folder.follow(study.records(), study.epochs, list(space.objectives))
        kept = go_on(study, trials is not None or time_budget is not None, gpu_hours)
        study.target = target
        if len(study.records()) >= target:
            return SearchResult(folder.path, tuple(study.records()), model_option=naming_option(space.model.name))
        if kept.gpu_hours is not None:
            space = replace(space, search=replace(space.search, gpu_hours=kept.gpu_hours))
        prepared = prepare(space, address)
        prepared.sampler.learn_from(from_content(study.warm_start))
        folder.write_versions("resume")
        _warn_if_open(address, console)
        with ray_cluster(address, prepared.data_bytes) as scratch:
            slots = _slots(prepared, address, console)
            study.stopping = asdict(kept)  # a limit that makes no sense here has been refused by now
            return SearchSession(prepared, folder, study, slots, trainable).run(console, scratch)


def _teller(console: Console) -> Told:
    """Prints what the search waits for."""
    return functools.partial(console.print, style="yellow", soft_wrap=True, highlight=False, markup=False)


def _warn_if_open(address: str, console: Console) -> None:
    """A word about a cluster that lets everyone in."""
    if address != "local" and wants_token(address) is False:
        told = f"warning: the cluster at {address} is open, it wants no token: {OPEN_REMEDY}"
        console.print(told, style="yellow", soft_wrap=True)


def _begin(space: SearchSpace, folder: RunFolder, known: Sequence[Observed]) -> RunStudy:
    """Writes the study and the resolved space; where that fails, the folder is as free as before."""
    folder.remove_leftovers()
    content = space.to_dict()
    name = f"{_plain_name(folder.path.name)}-{secrets.token_hex(4)}"
    file = folder.path / STUDY_FILES[space.search.storage]
    try:
        study = RunStudy.create(file, name, content, space.search.trials, to_content(known))
        folder.write_space(content)
    except Exception:
        folder.discard_start()
        raise
    return study


def _storage_doubts(prepared: Prepared, folder: Path) -> list[str]:
    """What speaks against the run's folder: every complete trial leaves its weights there."""
    space = prepared.space
    weights = 4 * prepared.costs.cost(Policy(space.model), space.training).params_total
    return storage_warnings(folder, space.search.trials * weights + _TABLES_BYTES)


def _slots(prepared: Prepared, address: str, console: Console) -> Slots:
    """How many trials run at once on what Ray has; told where they share a device."""
    asked, resources, gpu_bytes = prepared.space.resources, dict(ray.cluster_resources()), gpu_memory_bytes()
    if address == "local" and gpu_bytes is None:
        resources.pop("GPU", None)  # Ray sees one that this torch cannot use
    most = prepared.space.search.max_concurrent
    # Without a GPU nobody asks for memory, and costing the largest training takes a second or two.
    largest = largest_memory(prepared.policies, prepared.costs) if resources.get("GPU") and asked.gpu != 0 else 0
    slots = plan_slots(asked.cpu, asked.gpu, largest + prepared.data_bytes, resources, gpu_bytes, most, asked.workers)
    check_gpu_hours(prepared.space.search, slots.gpu)
    note = sharing_note(slots, largest, gpu_bytes)
    if note is not None:
        console.print(note)
    warnings = start_warnings(prepared.space, slots)
    rule = stopping_warning(prepared.space.search)
    for warning in warnings if rule is None else [*warnings, rule]:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    return slots


def _target(trials: str | int | None, study: RunStudy) -> int:
    """How many trials a resumed search ends with."""
    if trials is None:
        return study.target
    text = str(trials).strip()
    if not re.fullmatch(r"\+?\d+", text):
        raise UserError(f"--trials: must be a whole number, or one with a plus for so many more, got {text!r}")
    target = study.target + int(text) if text.startswith("+") else int(text)
    least = max(1, study.num_trials)
    if target < least:
        raise UserError(f"--trials: must be at least {least}, as many as the run has already, got {target}")
    return target


def _plain_name(name: str) -> str:
    """A study's name of the characters that names may have, at most 64 with what is added to it."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:50] or "run"

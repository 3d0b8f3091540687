"""Records real trainings, so that searches can be measured on them hundreds of times.

    python tests/benchmarks/tables/record.py --data DIR --work WORK [--policies 1050] [--processes 2]

First a narrow ResNet-50 is trained on 20,000 CIFAR-10 images of 12 x 12 pixels. Every policy then starts from it, and
trains five epochs on 480 other images; 600 further ones validate. Half of the policies are random, half are made out of
the best so far (mutations and crossings of the front), so that the table is dense where searches look. Every tenth
trains with three seeds. What is finished is in WORK/trainings.jsonl, where an interrupted recording goes on; at the end
all of it is written to trainings.parquet beside this script.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from rlsearch import DataSpec, ModelSpec, Policy, TrainingSpec, TrialSpec, build_model
from rlsearch.results.pareto import pareto_front
from rlsearch.search.costs import ExactCosts
from rlsearch.search.policy_space import Decided, PolicySpace
from rlsearch.search.space import SearchSpace, load_space
from rlsearch.search.variations import crossing, mutation, random_choices
from rlsearch.training.data import load_data
from rlsearch.training.stream_reader import end_with_parent
from rlsearch.training.trial import Trial

HERE = Path(__file__).parent
TABLE = HERE / "trainings.parquet"
INPUT_SHAPE = (3, 12, 12)
SEEDS = 3
EVERY = 10


def open_space() -> tuple[SearchSpace, PolicySpace, ExactCosts]:
    """The recorded space, its policies and their costs."""
    sys.path.insert(0, str(HERE))
    space = load_space(HERE / "space.yaml")
    with torch.device("meta"):
        model = build_model(space.model.name)
    return space, PolicySpace(space, model, INPUT_SHAPE), ExactCosts(model, INPUT_SHAPE)


def pretrain(data: Path, work: Path) -> Path:
    """The network that all trainings start from: on the first four shards, none of which they see."""
    weights = work / "net.safetensors"
    if weights.exists():
        return weights
    shards = work / "pretraining"
    shards.mkdir(exist_ok=True)
    for shard in sorted((data / "cifar10").glob("train-*"))[:4]:
        (shards / shard.name).symlink_to(shard.resolve())
    spec = DataSpec(f"parquet:{shards}", image_size=INPUT_SHAPE[1], validation_fraction=0.05, stream=False)
    training = TrainingSpec(epochs=10, batch_size=64, lr=0.1, precision="fp32")
    trial = Trial(
        TrialSpec(ModelSpec("narrow_resnet:NarrowResNet"), spec, training, Policy()), data=load_data(spec), device="cpu"
    )
    while not trial.done:
        metrics = trial.run_epoch()
        print(f"network, epoch {metrics.epoch}: {100 * metrics.accuracy:.1f} %", flush=True)
    save_file({name: value.contiguous() for name, value in trial.model.state_dict().items()}, weights)
    return weights


_IMAGES: dict[str, Any] = {}


def train(content: dict[str, Any]) -> dict[str, Any]:
    """One training, in a process that keeps the images."""
    torch.set_num_threads(1)
    spec = DataSpec(**content["data"])
    if spec.name not in _IMAGES:
        _IMAGES[spec.name] = load_data(spec)
    policy = Policy.from_dict(content["policy"])
    started = time.process_time()
    trial = Trial(
        TrialSpec(policy.model, spec, TrainingSpec(**content["training"]), policy, seed=content["seed"]),
        data=_IMAGES[spec.name],
        device="cpu",
    )
    epochs = []
    while not trial.done:
        epochs.append(trial.run_epoch())
    return {
        "params": content["params"],
        "origin": content["origin"],
        "seed": content["seed"],
        "accuracy": [row.accuracy for row in epochs],
        "train_flops": [row.train_flops for row in epochs],
        "learnable": epochs[-1].params,
        "memory": epochs[-1].memory_predicted,
        "seconds": time.process_time() - started,
    }


class Recorder:
    """Decides what is trained next, by what is finished.

    Args:
        work: the folder of what is finished.
        shards: where the images are.
        weights: of the network.
        count: how many policies.
    """

    def __init__(self, work: Path, shards: Path, weights: Path, count: int) -> None:
        self._space, self._policies, self._costs = open_space()
        self._file = work / "trainings.jsonl"
        self._count = count
        self._data = {**self._space.to_dict()["data"], "name": f"parquet:{shards}"}
        self._weights = weights
        self.rows = [json.loads(line) for line in self._file.read_text().splitlines()] if self._file.exists() else []
        self._queue: list[dict[str, Any]] = []
        self._keys = {_key(row["params"]) for row in self.rows}

    def next(self) -> dict[str, Any] | None:
        """The next training; None once there are enough policies."""
        if not self._queue:
            number = len(self._keys)
            if number >= self._count:
                return None
            decided, origin = self._propose(number)
            self._keys.add(_key(decided.params))
            seeds = SEEDS if number % EVERY == 0 else 1
            self._queue = [self._content(decided, origin, seed) for seed in range(seeds)]
        return self._queue.pop(0)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _propose(self, number: int) -> tuple[Decided, str]:
        rng = random.Random(f"record/{number}")
        if number == 0:
            return self._policies.point({}, None, self._space.training), "baseline"
        while True:
            if number < 100 or number % 2:
                suggest, origin = random_choices(self._policies, rng), "random"
            else:
                first, second = (rng.choice(self._front()) for _ in range(2))
                crossed = rng.random() < 0.4
                suggest = crossing(first, second, rng) if crossed else mutation(first, rng, rng.choice([1, 1, 2, 3]))
                origin = "front"
            decided = self._policies.decide(suggest)
            if _key(decided.params) not in self._keys:
                return decided, origin

    def _front(self) -> list[dict[str, Any]]:
        """The first two fronts of what is finished."""
        losses = torch.tensor(
            [[-r["accuracy"][-1], r["learnable"], r["memory"], r["train_flops"][-1]] for r in self.rows]
        ).numpy()
        mask = pareto_front(losses)
        rest = [index for index in range(len(losses)) if not mask[index]]
        second = pareto_front(losses[rest])
        chosen = [row["params"] for row, is_on in zip(self.rows, mask, strict=True) if is_on]
        return chosen + [self.rows[index]["params"] for index, is_on in zip(rest, second, strict=True) if is_on]

    def _content(self, decided: Decided, origin: str, seed: int) -> dict[str, Any]:
        model = replace(self._space.model, weights=str(self._weights))
        training = {name: getattr(decided.training, name) for name in TrainingSpec.__dataclass_fields__}
        return {
            "params": dict(decided.params),
            "policy": replace(decided.policy, model=model).to_dict(),
            "training": training,
            "data": self._data,
            "origin": origin,
            "seed": seed,
        }


def _key(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


def write_table(rows: list[dict[str, Any]]) -> None:
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "params"}
    columns["params"] = [_key(row["params"]) for row in rows]
    pq.write_table(pa.table(columns), TABLE, compression="zstd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("RLSEARCH_DATA"), help="holds cifar10/")
    parser.add_argument("--work", type=Path, required=True, help="where an interrupted recording goes on")
    parser.add_argument("--policies", type=int, default=1050)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(HERE))
    options.work.mkdir(parents=True, exist_ok=True)
    weights = pretrain(Path(options.data), options.work)
    shards = options.work / "trials"
    shards.mkdir(exist_ok=True)
    source = sorted((Path(options.data) / "cifar10").glob("train-*"))[4]
    if not (shards / source.name).exists():
        (shards / source.name).symlink_to(source.resolve())
    recorder = Recorder(options.work, shards.resolve(), weights.resolve(), options.policies)
    running: set[Future[dict[str, Any]]] = set()
    started, before = time.monotonic(), len(recorder.rows)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, context, end_with_parent, (os.getpid(),)) as pool:
        while True:
            while len(running) < options.processes and (content := recorder.next()) is not None:
                running.add(pool.submit(train, content))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                recorder.add(future.result())
            if len(recorder.rows) % 25 == 0:
                each = (time.monotonic() - started) / max(1, len(recorder.rows) - before)
                print(f"{len(recorder.rows)} trainings, {each:.1f} s each", flush=True)
    write_table(recorder.rows)
    print(f"{len(recorder.rows)} trainings of {len({_key(row['params']) for row in recorder.rows})} policies: {TABLE}")


if __name__ == "__main__":
    main()

"""Prune the channels or eigendirections of a trained network by its Fisher information, then fine-tune what remains.

Prints the path of the run's result.json on stdout; all else goes to stderr.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside this program, whatever is installed

from common.experiments.config import say_interrupted
from compression_baselines.config import PruningConfig

if __name__ == "__main__":
    say_interrupted(PruningConfig.prog())
    PruningConfig.parse()  # --help and wrong flags are answered before torch, which takes seconds, is loaded

import torch
from torch import nn

from common import FactorizationReport, load_factorized_, param_groups
from common.budget import count_parameters
from common.experiments import checkpoints
from common.experiments.runs import clean_errors
from common.vision.data import Data
from common.vision.training import Trainer, evaluate, sgd
from compression_baselines.experiment import CompressionExperiment, learning_rate
from compression_baselines.pruners import channels, eigenbasis, fisher
from compression_baselines.pruners.select import Ranking, removed_for_budget
from compression_baselines.structure import Kept, convolutions, fix_rotations_

TUNING_SEED = 1 << 32  # added to --seed: the dense run most likely used the same seed, and saw its order and crops


class PruningExperiment(CompressionExperiment[PruningConfig]):
    """One run: the steps that :class:`common.vision.experiment.ImageExperiment` leaves to a program."""

    config_class = PruningConfig

    def read_inputs(self) -> None:
        state = checkpoints.load(cast(Path, self.config.pretrained))
        if self.config.num_classes is not None or state.get("architecture", {}).get("num_classes") is not None:
            self.load_dense(state)

    def load_dense(self, state: dict[str, Any]) -> nn.Module:
        """The network of --pretrained from its checkpoint. Raises ValueError if it is not the one that the flags describe."""
        path, held = cast(Path, self.config.pretrained), state.get("architecture", {})
        for key in ("network", "depth", "width", "num_classes"):
            wanted = self.architecture[key]
            if key in held and wanted is not None and held[key] != wanted:
                raise ValueError(f"--pretrained {path} has {key} {held[key]}, but the flags ask for {wanted}")
        if held.get("pruned") is not None:
            raise ValueError(f"--pretrained {path} is already pruned: give the checkpoint of a dense run of train.py")
        classes = self.architecture["num_classes"] or held.get("num_classes")  # of image folders: known once they are read
        model = self.build({**self.architecture, "num_classes": classes})
        if load_factorized_(model, checkpoints.model_state(state, path)).layers:
            raise ValueError(f"--pretrained {path} is already factorized: give a dense checkpoint, or --resume this one")
        broken = next((name for name, value in model.state_dict().items() if not value.isfinite().all()), None)
        if broken is not None:
            raise ValueError(f"--pretrained {path} has diverged: {broken} is not finite")
        return model

    def make_model(self) -> tuple[nn.Module, FactorizationReport]:
        """The dense network. Raises ValueError if the budget cannot be reached."""
        model = self.load_dense(checkpoints.load(cast(Path, self.config.pretrained)))
        check_budget(model, self.config, count_parameters(model))
        return model, FactorizationReport.dense(model)

    def make_trainer(self) -> Trainer:
        """Prune for the first time, or rebuild the pruned network that is resumed."""
        self.check_image_size()
        model, dense_report = self.make_model()
        self.original = dense_report.original
        if self.checkpoint is None:
            model.to(self.processes.device)
            self.prune_(model, 1)
        else:
            model = self.rebuild(self.checkpoint, self.run.path).to(self.processes.device)
            self.architecture = dict(self.checkpoint.get("architecture", self.architecture))
            if self.architecture["pruned"] is None:
                raise ValueError("the checkpoint to resume from is of a dense network: give it as --pretrained")
        return self.tuner(model)

    def prune_(self, model: nn.Module, number: int) -> None:
        """Prune the model in place, in round ``number``. Stores its shape and its accuracy in the architecture."""
        pruned = prune_(model, self.config, self.data, self.architecture["pruned"], self.original, number)
        self.architecture["pruned"] = pruned
        pruned["accuracy"] = evaluate(model, self.data, self.processes)["accuracy"]

    def tuner(self, model: nn.Module, **options: Any) -> Trainer:
        """The trainer that fine-tunes in the current round: whole schedule, momentum from zero, its own batches."""
        config, number = self.config, self.architecture["pruned"]["round"]
        groups = param_groups(model, weight_decay=config.weight_decay)
        return self.new_trainer(
            model,
            sgd(groups, config, self.processes.device),
            config=replace(config, epochs=number * config.epochs, seed=config.seed + TUNING_SEED),
            schedule=partial(learning_rate, config),
            **options,
        )

    def train(self) -> dict[str, float]:
        """Fine-tune; prune and fine-tune again until all rounds are done."""
        config, model = self.config, self.trainer.model
        while True:
            pruned = self.architecture["pruned"]
            if self.processes.main:
                share = f"{count_parameters(model):,} of {self.original:,} parameters"
                print(f"round {pruned['round']}: {share}, {pruned['accuracy']:.2f} %", file=sys.stderr)
            metrics = self.trainer.fit() | {"pruned": pruned["accuracy"]}
            number = pruned["round"] + 1
            if number > config.rounds or self.trainer.step >= (config.max_steps or sys.maxsize):
                break
            self.trainer.stop_if_told()  # the next trainer would not know of a signal that came at the end of this round
            with clean_errors(config.prog()):
                self.prune_(model, number)
            first_step = (number - 1) * config.epochs * self.trainer.steps_per_epoch
            self.tuner(model, first_step=first_step, seconds=metrics["seconds"])
        self.measure(model)
        return metrics

    def count(self) -> dict[str, Any]:
        count = count_parameters(self.trainer.model)
        return {"original": self.original, "compressed": count, "ratio": count / self.original}


def check_budget(model: nn.Module, config: PruningConfig, original: int) -> None:
    """Raise ValueError, before any work, if the budget is out of reach even in the best case that the limits allow.

    The actual case depends on the scores: they decide how many channels the branches of a residual block keep in common.
    """
    if config.target_ratio is not None:
        layers = convolutions(model).items()
        if config.method.startswith("eigendamage"):
            sides = {f"{name}/inputs": conv.in_channels for name, conv in layers}
            sides |= {f"{name}/outputs": conv.out_channels for name, conv in layers}
        else:
            sides = {name: conv.out_channels for name, conv in layers}
        # With equal scores in all layers, branches keep the same channels.
        limit = 1 - (1 - config.prune_ratio_limit) ** config.rounds
        ranking = Ranking({name: torch.arange(float(size)) for name, size in sides.items()}, limit)
        choose(model, config, ranking, None, budget=round(config.target_ratio * original), ratio=None)


def choose(
    model: nn.Module, config: PruningConfig, ranking: Ranking, before: Kept | None, *, budget: int | None, ratio: float | None
) -> dict[str, list[int]]:
    """The units to keep: for a budget of parameters or, without one, after a ratio of all units is removed."""
    if budget is None:
        return ranking.kept(int(cast(float, ratio) * ranking.units))

    meta = copy.deepcopy(model).to("meta")  # the search counts many times, and needs no weights

    def count(kept: dict[str, list[int]]) -> int:
        if not config.method.startswith("eigendamage"):
            return channels.count(meta, kept, before)
        separable = config.method == "eigendamage-separable"
        return eigenbasis.count(meta, eigenbasis.sizes(meta, kept, separable=separable), separable=separable)

    return ranking.kept(removed_for_budget(ranking, budget, count))


def prune_(
    model: nn.Module, config: PruningConfig, data: Data, pruned: dict[str, Any] | None, original: int, number: int
) -> dict[str, Any]:
    """Prune the model in place, in round ``number``. Returns the description that rebuilds its shape.

    Every round reduces the parameters (with --ratio, the units) by the same factor, down to the target.
    """
    goal: dict[str, Any] = {"budget": None, "ratio": None}
    if config.target_ratio is not None:
        goal["budget"] = round(config.target_ratio ** (number / config.rounds) * original)
    else:
        goal["ratio"] = 1 - (1 - cast(float, config.ratio)) ** (1 / config.rounds)
    batch_size = 32 if config.method == "c-obd" else config.batch_size  # its diagonal needs the gradient of every image
    images = fisher.loader(data, config.fisher_samples, batch_size, config.seed)
    if config.method.startswith("eigendamage"):
        separable = config.method == "eigendamage-separable"
        rotated = eigenbasis.rotate(model, images, config.fisher)
        kept = choose(model, config, eigenbasis.rank(rotated, config.prune_ratio_limit), None, **goal)
        sizes = eigenbasis.sizes(model, kept, separable=separable)
        eigenbasis.prune_(model, rotated, kept, sizes, separable=separable)
        if config.fix_rotation:
            fix_rotations_(model)
        kind = "separable" if separable else "eigenbasis"
        sizes = (pruned or {"sizes": {}})["sizes"] | sizes
        return {"kind": kind, "sizes": sizes, "fix_rotation": config.fix_rotation, "round": number}
    found = channels.curvature(model, config.method, images, config.fisher)
    before = pruned["kept"] if pruned else None
    ranking = channels.rank(model, config.method, found, config.prune_ratio_limit)
    kept = choose(model, config, ranking, before, **goal)
    channels.prune_(model, config.method, found, kept, before)
    return {"kind": "channels", "kept": channels.dense_numbers(kept, before), "round": number}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    PruningExperiment.main(argv)


if __name__ == "__main__":
    main()

"""Train a ResNet on small images: dense, low-rank, deep or wide, with spectral initialization and Frobenius decay.

Prints the path of the run's result.json on stdout; all else goes to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside this program, whatever is installed

from common.experiments.config import say_interrupted
from resnet_cifar.config import DEPTHS, ResNetConfig

if __name__ == "__main__":
    say_interrupted(ResNetConfig.prog())
    ResNetConfig.parse()  # --help and wrong flags are answered before torch, which takes seconds, is loaded

from torch import nn

from common import FactorizationReport, FrobeniusDecay, LowRankConfig, factorize_, param_groups, rank_scale_for_ratio
from common.experiments import checkpoints
from common.norms import NormRecorder, NormReplay, load_record, norm_metrics
from common.vision.experiment import LowRankExperiment
from common.vision.training import Trainer, sgd
from resnet_cifar.models import build, is_factorized

NORMS = "frobnorms.tensor"  # written by --dump-frobnorms


class ResNetExperiment(LowRankExperiment[ResNetConfig]):
    """One run: the steps that :class:`common.vision.experiment.ImageExperiment` leaves to a program."""

    config_class = ResNetConfig

    def make_architecture(self) -> dict[str, Any]:
        return {"arch": self.config.arch, "num_classes": self.config.num_classes}

    def build(self, architecture: Mapping[str, Any]) -> nn.Module:
        return build(architecture["arch"], architecture["num_classes"])

    def read_inputs(self) -> None:
        super().read_inputs()
        self.record = load_record(self.config.normalize) if self.config.normalize else None

    def make_model(self) -> tuple[nn.Module, FactorizationReport]:
        """The network, its layers factorized from a spectral, regular or norm-matched initialization."""
        config = self.config
        model = self.build_dense()
        if not config.factorized:
            return model, FactorizationReport.dense(model)
        depth = 3 if config.square else 2
        scale = config.rank_scale or rank_scale_for_ratio(model, config.target_ratio, filter_fn=is_factorized, depth=depth)
        # init "spectral" takes the factors from the truncated SVD of each layer's weight (common/linalg.py: spectral_init).
        low_rank = LowRankConfig(scale, init=config.init, depth=depth, residual=config.residual)
        return model, factorize_(model, low_rank, filter_fn=is_factorized, skip_growing=False)

    def make_trainer(self) -> Trainer:
        config = self.config
        model, self.report = self.make_model()
        model.to(self.processes.device)

        # The trainer adds Frobenius decay to the gradients after each backward pass. What it covers gets no weight decay; with
        # --no-frob the factors get neither.
        decay = FrobeniusDecay(model, config.weight_decay) if config.wd2fd and not config.no_frob else None
        undecayed = 0.0 if config.no_frob else None
        groups = param_groups(model, weight_decay=config.weight_decay, decay=decay, factor_weight_decay=undecayed)
        optimizer = sgd(groups, config, self.processes.device)

        layers = {name: module for name, module in model.named_modules() if is_factorized(module, name)}
        return self.new_trainer(
            model,
            optimizer,
            schedule=partial(learning_rate, config),
            decay=decay,
            hook=self.make_hook(layers),
            epoch_metrics=partial(norm_metrics, layers),
        )

    def make_hook(self, layers: Mapping[str, Any]) -> NormRecorder | NormReplay | None:
        """What runs after each step: a recorder of all norms (--dump-frobnorms) or their replay (--normalize)."""
        config = self.config
        if self.record is not None:
            steps = config.epochs * self.data.steps_per_epoch(config.batch_size, self.processes.world_size)
            return NormReplay(layers, self.record, min(steps, config.max_steps or steps), self.processes.device)
        return NormRecorder(layers) if config.dump_frobnorms else None

    def train(self) -> dict[str, float]:
        metrics = super().train()
        if isinstance(self.trainer.hook, NormRecorder) and self.processes.main:
            checkpoints.save_file(self.run.path / NORMS, self.trainer.hook.state_dict())
        return metrics

    def outputs(self) -> list[str]:
        return [NORMS] * self.config.dump_frobnorms + super().outputs()


def learning_rate(config: ResNetConfig, epoch: int) -> float:
    """The learning rate: divided by 10 at one half and again at three quarters of the epochs.

    Networks of 56 or more layers train their first epoch at a tenth of it.
    """
    drops = sum(epoch >= share * config.epochs for share in (0.5, 0.75))
    warmup = 0.1 if epoch == 0 and DEPTHS[config.arch] >= 56 else 1.0
    return config.lr * 0.1**drops * warmup


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    ResNetExperiment.main(argv)


if __name__ == "__main__":
    main()

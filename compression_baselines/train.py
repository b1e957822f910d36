"""Train ResNet32 or VGG19 at a budget of parameters: dense or low-rank, with spectral initialization and Frobenius decay.

Prints the path of the run's result.json on stdout; all else goes to stderr.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside this program, whatever is installed

from common.experiments.config import say_interrupted
from compression_baselines.config import LowRankBudgetConfig

if __name__ == "__main__":
    say_interrupted(LowRankBudgetConfig.prog())
    LowRankBudgetConfig.parse()  # --help and wrong flags are answered before torch, which takes seconds, is loaded

from torch import nn

from common import FactorizationReport, FrobeniusDecay, LowRankConfig, factorize_, param_groups, rank_scale_for_ratio
from common.linalg import fan_out_init
from common.norms import norm_metrics
from common.vision.experiment import LowRankExperiment
from common.vision.training import Trainer, sgd
from compression_baselines.experiment import CompressionExperiment, learning_rate, start_classifier_
from compression_baselines.models import is_factorized


class BudgetExperiment(CompressionExperiment[LowRankBudgetConfig], LowRankExperiment[LowRankBudgetConfig]):
    """One run: the steps that :class:`common.vision.experiment.ImageExperiment` leaves to a program."""

    config_class = LowRankBudgetConfig

    def build_fresh(self) -> nn.Module:
        model = super().build_fresh()
        start_classifier_(model, self.config)
        return model

    def make_model(self) -> tuple[nn.Module, FactorizationReport]:
        """The network, its layers factorized from a spectral, regular or norm-matched initialization."""
        config = self.config
        model = self.build_dense()
        if not config.factorized:
            return model, FactorizationReport.dense(model)
        scale = config.rank_scale or rank_scale_for_ratio(model, config.target_ratio, filter_fn=is_factorized)
        # Regular factors of VGG have the standard deviation of the 3x3 convolution that they replace.
        fan_out = config.init == "regular" and config.network == "vgg" and not config.kaiming
        init = partial(fan_out_init, kernel=3) if fan_out else config.init
        return model, factorize_(model, LowRankConfig(scale, init=init), filter_fn=is_factorized, skip_growing=False)

    def make_trainer(self) -> Trainer:
        config = self.config
        self.check_image_size()
        model, self.report = self.make_model()
        model.to(self.processes.device)

        # What Frobenius decay covers gets no weight decay.
        decay = FrobeniusDecay(model, config.weight_decay) if config.wd2fd else None
        groups = param_groups(model, weight_decay=config.weight_decay, decay=decay)
        optimizer = sgd(groups, config, self.processes.device)

        layers = {layer.name: model.get_submodule(layer.name) for layer in self.report.layers}
        schedule, metrics = partial(learning_rate, config), partial(norm_metrics, layers)
        return self.new_trainer(model, optimizer, schedule=schedule, decay=decay, epoch_metrics=metrics)

    def train(self) -> dict[str, float]:
        metrics = self.trainer.fit()
        if self.config.measure:
            self.measure(copy.deepcopy(self.trainer.model))
        if self.config.densify:
            metrics["densified"] = self.fold()
        return metrics


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    BudgetExperiment.main(argv)


if __name__ == "__main__":
    main()

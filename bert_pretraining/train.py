"""Pre-train an encoder with masked-language modeling, with or without spectral initialization and Frobenius decay.

Prints the path of the run's result.json on stdout; all other output goes to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside this program, whatever is installed

from bert_pretraining.config import PretrainingConfig
from common.experiments.config import say_interrupted

if __name__ == "__main__":
    say_interrupted(PretrainingConfig.prog())
    PretrainingConfig.parse()  # --help and wrong flags are answered before torch, which takes seconds, is loaded

import torch
from torch import nn

from bert_pretraining.data import PretrainingData, read_streams
from bert_pretraining.model import EncoderConfig, MaskedLanguageModel, frobenius_decay, from_checkpoint, products
from bert_pretraining.text import TOKENIZER, Corpus
from bert_pretraining.training import PretrainingLoop, evaluate, product_norms
from common import FactorizationReport, FrobeniusDecay, Lamb, param_groups
from common.experiments import checkpoints, distributed
from common.experiments.config import completed, config_hash, differing_values, identity
from common.experiments.distributed import Processes
from common.experiments.experiment import Experiment, find_checkpoint
from common.experiments.files import write_atomic
from common.experiments.runs import Run, directory_of


class PretrainingExperiment(Experiment[PretrainingConfig, PretrainingLoop]):
    """One run: the steps that :class:`common.experiments.experiment.Experiment` leaves to each program."""

    config_class = PretrainingConfig

    def __init__(self, config: PretrainingConfig) -> None:
        super().__init__(config)
        self.corpus = Corpus(config.data)
        self.start: dict[str, Any] | None = None  # the checkpoint of --init-from

    def architecture(self) -> dict[str, Any]:
        return self.config.architecture(self.corpus.words)

    def make_model(self) -> tuple[MaskedLanguageModel, FactorizationReport]:
        """The encoder, with its products and layers initialized as the flags say."""
        model = MaskedLanguageModel(EncoderConfig(**self.architecture()))
        if self.start is not None:
            model.load_state_dict(checkpoints.model_state(self.start, self._start_path()))
        return model, model.report

    def _start_path(self) -> Path:
        assert self.config.init_from is not None
        return self.config.init_from

    def read_inputs(self) -> None:
        """Read the checkpoint of --init-from. Raises ValueError if its run, tokenizer or model is not the expected one."""
        path, config = self.config.init_from, self.config
        if path is None:
            return
        self.start = checkpoints.load(path)
        check_tokenizer(self.start, path, self.corpus)
        check_pretraining(self.start, path, config.pretraining)
        free = {"dropout"} | ({"max_positions"} if config.positions != "learned" else set())  # what a phase may change
        both = (self.start.get("architecture", {}), self.architecture())
        held, ours = ({name: value for name, value in each.items() if name not in free} for each in both)
        if differing := differing_values(held, ours):
            raise ValueError(f"--init-from {path} holds another model: {', '.join(differing.values())}")

    def read_data(self, batch_size: int) -> PretrainingData:
        config = self.config
        return PretrainingData(
            read_streams(self.corpus),
            self.corpus.words,
            seq=config.seq,
            predictions=config.predictions,
            batch_size=batch_size,
            seed=config.seed,
            device=self.processes.device,
        )

    def load(self) -> None:
        config = self.config
        self.data = self.read_data(config.batch_size)
        if config.batch_size % (config.update_freq * self.processes.world_size):
            raise ValueError(
                f"--batch-size {config.batch_size} is not divisible into --update-freq {config.update_freq} parts "
                f"in each of {self.processes.world_size} processes"
            )

    def make_trainer(self) -> PretrainingLoop:
        model, self.report = self.make_model()
        self.trainer = make_loop(model, self.data, self.run, self.config, self.processes, tokenizer=self.corpus.digest)
        return self.trainer

    def train(self) -> dict[str, float]:
        """Train, and evaluate the last weights on the test split; ``final`` is their masked loss.

        ``best`` is the lowest masked loss of an epoch on the validation split. The tokenizer is copied to the run's directory,
        so that later programs need nothing else.
        """
        if self.processes.main:
            write_atomic(self.run.path / TOKENIZER, (self.config.data / TOKENIZER).read_bytes())
        metrics = self.trainer.fit()
        tested = evaluate(self.trainer.model, self.data, "test", self.processes)
        metrics |= {"final": tested["loss"], "final_perplexity": tested["perplexity"], "final_accuracy": tested["accuracy"]}
        metrics["valid_loss"] = metrics.pop("final_loss")
        return metrics

    def evaluate_checkpoint(self) -> None:
        """Print masked loss, perplexity and accuracy on both held-out splits as JSON, for the model that --resume names."""
        config = self.config
        path = directory_of(config) if config.resume == "auto" else Path(str(config.resume))
        state = find_checkpoint(config.resume, path)
        if state is None:
            raise ValueError(f"there is no checkpoint in {path}")
        check_tokenizer(state, path, self.corpus)
        self.data = self.read_data(batch_size=1)  # of held-out splits: the training split may be smaller than a batch
        model = from_checkpoint(state.get("architecture", {}), checkpoints.model_state(state, path)).to(self.processes.device)
        measured = {split: evaluate(model, self.data, split, self.processes) for split in ("valid", "test")}
        if self.processes.main:
            print(json.dumps(measured))
        distributed.stop()


def make_loop(
    model: MaskedLanguageModel,
    data: PretrainingData,
    run: Run,
    config: PretrainingConfig,
    processes: Processes,
    *,
    tokenizer: str = "",
) -> PretrainingLoop:
    """The loop that trains a model with the optimizer and the decay of a configuration.

    Parameters that Frobenius decay covers get no weight decay. LAMB adds Frobenius decay to its update before the trust ratio
    (FLAMBe). With AdamW it is decoupled, like AdamW's weight decay.
    """
    model.to(processes.device)
    kinds = (config.wd2fd, config.wd2fd_quekey, config.wd2fd_outval)
    decay = frobenius_decay(model, config.frobenius_decay, *kinds, decoupled=config.optimizer == "adamw")
    pairs = products(model)
    return PretrainingLoop(
        model,
        data,
        run,
        tokenizer=tokenizer,
        config=config,
        processes=processes,
        architecture=config.architecture(model.config.words),
        optimizer=make_optimizer(model, config, decay, processes.device),
        decay=decay,
        epoch_metrics=lambda lr: product_norms(pairs),
    )


def make_optimizer(
    model: nn.Module, config: PretrainingConfig, decay: FrobeniusDecay | None, device: torch.device
) -> torch.optim.Optimizer:
    """LAMB or AdamW. Norms have neither weight decay nor a trust ratio. What Frobenius decay covers has no weight decay.

    On a GPU, the learning rate is a tensor on that GPU, as a recorded step requires.
    """
    groups = param_groups(model, weight_decay=config.weight_decay, decay=decay)
    rest = groups[0]
    norms = [parameter for parameter in rest["params"] if parameter.ndim < 2]
    rest["params"] = [parameter for parameter in rest["params"] if parameter.ndim >= 2]
    groups.append({"params": norms, "weight_decay": 0.0, "name": "norms", "adapt": False})
    on_gpu = device.type == "cuda"
    lr = torch.tensor(config.lr, device=device) if on_gpu else config.lr
    betas = (config.beta1, config.beta2)
    if config.optimizer == "lamb":
        return Lamb(groups, lr, betas, config.eps, decay=decay)
    groups = [{key: value for key, value in group.items() if key != "adapt"} for group in groups]
    return torch.optim.AdamW(groups, lr, betas, config.eps, fused=True, capturable=on_gpu)


def check_tokenizer(state: dict[str, Any], path: Path, corpus: Corpus) -> None:
    """Raise ValueError if the checkpoint was not trained with the tokenizer of the corpus."""
    held = state.get("tokenizer")
    if held != corpus.digest:
        raise ValueError(
            f"{path} was trained with the tokenizer {held}, but {corpus.folder} has the tokenizer {corpus.digest}: "
            "use the folder that it was trained on, or one with the same tokenizer"
        )


def check_pretraining(state: dict[str, Any], path: Path, wanted: str | None) -> None:
    """Raise ValueError if the checkpoint's configuration is not the one of --pretraining, or its run has not finished."""
    if wanted is None:
        return
    config = completed(PretrainingConfig, state.get("config", {}))
    held = config_hash(identity(PretrainingConfig, config))
    if held != wanted:
        raise ValueError(
            f"{path} has the configuration {held}, but --pretraining requires {wanted}: give that run, or leave the flag out"
        )
    step, last = state.get("step"), min(config["steps"], config["max_steps"] or config["steps"])
    if step != last:
        raise ValueError(
            f"{path} is at step {step} of {last}, but --pretraining requires a finished run: finish it, or leave the flag out"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    PretrainingExperiment.main(argv)


if __name__ == "__main__":
    main()

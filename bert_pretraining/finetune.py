"""Fine-tune a pre-trained encoder to classify sentences, or to find the answers to questions in a text.

Prints the path of the run's result.json on stdout; all other output goes to stderr.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside this program, whatever is installed

from bert_pretraining.downstream import FinetuneConfig, open_run
from common.experiments.config import say_interrupted

if __name__ == "__main__":
    say_interrupted(FinetuneConfig.prog())
    FinetuneConfig.parse()  # --help and wrong flags are answered before torch, which takes seconds, is loaded

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bert_pretraining import pretrained, squad
from bert_pretraining.model import MaskedLanguageModel
from bert_pretraining.text import BOS, EOS, encode, encode_with_offsets
from common.budget import count_parameters
from common.experiments.distributed import prepare_device
from common.experiments.runs import FAILURES, Run, clean_errors, environment, seed_everything

CLIP = 1.0  # bound on the norm of all gradients together, as in BERT's code
HEADER = ["sentence", "label"]  # first line of GLUE's files


class Example(Protocol):
    """A sequence of tokens, and the target to predict from it."""

    @property
    def tokens(self) -> np.ndarray: ...

    @property
    def target(self) -> tuple[int, ...]: ...


Predict = Callable[[Sequence[Any]], Iterator[tuple[Any, Tensor]]]  # yields each example with its outputs


class Task(Protocol):
    """A task to fine-tune on.

    outputs:  number of outputs of the last layer for each position.
    train:    training examples.
    splits:   names of the other files: "dev" and, if given, "test".
    """

    outputs: int
    splits: list[str]

    @property
    def train(self) -> Sequence[Example]: ...

    def loss(self, outputs: Tensor, words: Tensor, targets: Tensor) -> Tensor:
        """Loss of outputs (batch, length, :attr:`outputs`) and targets (batch, ...). ``words`` is True where a token is."""
        ...

    def evaluate(self, split: str, predict: Predict) -> dict[str, float]:
        """Scores in percent by name. The first one selects the best epoch."""
        ...


# Sentences


@dataclass(frozen=True, eq=False)
class Sentence:
    tokens: np.ndarray
    target: tuple[int]


def read_sentences(path: Path) -> list[tuple[int, str, str]]:
    """Line number, sentence and label of each line of a file. A first line ``sentence<TAB>label`` is a header."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in line.split("\t")]
        if cells == [""] and number == len(lines):
            break  # the empty rest after the last line end
        if number == 1 and [cell.lower() for cell in cells] == HEADER:
            continue
        if len(cells) != 2 or not all(cells):
            raise ValueError(
                f"{path} line {number} must be sentence<TAB>label, got {len(cells)} columns: {line.strip()[:60]!r}"
            )
        found.append((number, cells[0], cells[1]))
    if not found:
        raise ValueError(f"{path} has no sentences")
    return found


def _labels(path: Path, lines: Sequence[tuple[int, str, str]]) -> list[str]:
    """The different labels of the training file, in order."""
    counts = Counter(label for _, _, label in lines)
    if len(counts) < 2:
        raise ValueError(f"{path} has only the label {lines[0][2]!r}: classification needs at least two")
    number, _, label = lines[0]
    if number == 1 and counts[label] == 1 and len(lines) > 2:
        raise ValueError(
            f"{path} line 1 has the label {label!r}, which no other line has: a header must be {'<TAB>'.join(HEADER)}; "
            "if line 1 is not a header, move it further down"
        )
    return sorted(counts)


class Sentences:
    """Classification of sentences by a linear layer, whose outputs are averaged over the tokens.

    BERT classifies by its first position, which next-sentence prediction has trained to represent the whole input. Masked words
    alone do not train it for that.
    """

    def __init__(self, config: FinetuneConfig, tokenizer: Any) -> None:
        files = config.files()
        lines = {split: read_sentences(path) for split, path in files.items()}
        labels = _labels(config.train, lines["train"])
        for split, path in files.items():
            for number, _, label in lines[split]:
                if label not in labels:
                    known = ", ".join(labels)
                    raise ValueError(f"{path} line {number} has the label {label!r}, but {config.train} has only {known}")
        self.outputs, self.splits = len(labels), [split for split in files if split != "train"]
        self.examples, room = {}, config.max_tokens - 2
        for split, read in lines.items():
            ids = [encode(tokenizer, text) for _, text, _ in read]
            cut = sum(len(each) > room for each in ids)
            if cut:
                print(
                    f"{cut} of {len(ids)} sentences of --{split} are truncated to {config.max_tokens} tokens", file=sys.stderr
                )
            self.examples[split] = [
                Sentence(np.array([BOS, *each[:room], EOS], np.uint16), (labels.index(label),))
                for each, (_, _, label) in zip(ids, read, strict=True)
            ]
        self.train = self.examples["train"]

    def loss(self, outputs: Tensor, words: Tensor, targets: Tensor) -> Tensor:
        weights = words / words.sum(1, keepdim=True)
        return F.cross_entropy((outputs * weights[..., None]).sum(1), targets[:, 0])

    def evaluate(self, split: str, predict: Predict) -> dict[str, float]:
        examples = self.examples[split]
        right = 0
        for example, outputs in predict(examples):
            right += int(outputs[: len(example.tokens)].mean(0).argmax()) == example.target[0]
        return {"accuracy": 100 * right / len(examples)}


# Questions


class Questions:
    """Extraction of answers. Each position gets a score as beginning and as end; the span with the highest sum wins."""

    outputs = 2

    def __init__(self, config: FinetuneConfig, tokenizer: Any) -> None:
        self.questions = {split: squad.read(path) for split, path in config.files().items()}
        self.splits = [split for split in self.questions if split != "train"]
        assert config.stride is not None
        self.windows = {
            split: squad.windows(questions, partial(encode_with_offsets, tokenizer), config.max_tokens, config.stride)
            for split, questions in self.questions.items()
        }
        self.train = self.windows["train"]

    def loss(self, outputs: Tensor, words: Tensor, targets: Tensor) -> Tensor:
        scores = outputs.masked_fill(~words[..., None], -math.inf)
        return (F.cross_entropy(scores[..., 0], targets[:, 0]) + F.cross_entropy(scores[..., 1], targets[:, 1])) / 2

    def evaluate(self, split: str, predict: Predict) -> dict[str, float]:
        questions = self.questions[split]
        best: dict[int, tuple[float, str]] = {}
        for window, outputs in predict(self.windows[split]):
            score, first, last = best_span(outputs[window.first : window.first + len(window.offsets)])
            if window.question not in best or score > best[window.question][0]:
                best[window.question] = score, squad.answer(questions[window.question], window.offsets, first, last)
        return squad.scores(questions, {questions[index].id: text for index, (_, text) in best.items()})


def best_span(scores: Tensor) -> tuple[float, int, int]:
    """The highest score of a span, and its first and last token. ``scores`` (tokens, 2) rate each token as beginning and end.

    A span has at most ``squad.ANSWER`` tokens.
    """
    sums = scores[:, :1] + scores[:, 1]
    allowed = torch.ones_like(sums, dtype=torch.bool).triu().tril(squad.ANSWER - 1)
    place = int(sums.masked_fill(~allowed, -math.inf).argmax())
    first, last = divmod(place, len(scores))
    return sums[first, last].item(), first, last


TASKS: dict[str, Callable[[FinetuneConfig, Any], Task]] = {"sentences": Sentences, "squad": Questions}


# Training


class Network(nn.Module):
    """An encoder, dropout, and a linear layer at each position: (batch, length) -> (batch, length, outputs)."""

    def __init__(self, encoder: MaskedLanguageModel, outputs: int, dropout: float) -> None:
        super().__init__()
        self.encoder, self.dropout = encoder, nn.Dropout(dropout)
        self.last = nn.Linear(encoder.config.embed_dim, outputs)
        nn.init.normal_(self.last.weight, std=encoder.config.std)
        nn.init.zeros_(self.last.bias)

    def forward(self, tokens: Tensor, words: Tensor) -> Tensor:
        return self.last(self.dropout(self.encoder.encode(tokens, words)))


class Finetuning:
    """Trains a network on a task and scores it after every epoch."""

    def __init__(self, config: FinetuneConfig, network: Network, task: Task, run: Run, device: torch.device) -> None:
        self.config, self.network, self.task, self.run, self.device = config, network.to(device), task, run, device
        parameters = list(network.parameters())
        groups = [
            {"name": "weights", "params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"name": "norms and biases", "params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, eps=1e-6)
        self.steps = config.epochs * math.ceil(len(task.train) / config.batch_size)
        self.step = 0

    def learning_rate(self) -> float:
        """The learning rate of the next step. It rises linearly to --lr, and then falls linearly to 0."""
        rising = self.config.warmup * self.steps
        return self.config.lr * min((self.step + 1) / max(rising, 1), (self.steps - self.step) / (self.steps - rising))

    def fit(self) -> dict[str, float]:
        """Train to the end. ``final`` is the score after the last epoch, ``best`` that of the epoch that is best on --dev."""
        started = time.monotonic()
        records = []
        for epoch in range(1, self.config.epochs + 1):
            loss = self._epoch(epoch)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of epoch {epoch} is not finite: a lower --lr may help")
            scores = {split: self.task.evaluate(split, self._predict) for split in self.task.splits}
            named = {f"{split}_{name}": value for split, found in scores.items() for name, value in found.items()}
            self.run.log({"epoch": epoch, "loss": loss, **named})
            shown = ", ".join(f"{name} {value:.2f}" for name, value in named.items())
            print(f"epoch {epoch}/{self.config.epochs}: loss {loss:.4f}, {shown}", file=sys.stderr)
            records.append(scores)
        best = max(records, key=lambda scores: next(iter(scores["dev"].values())))
        split = self.task.splits[-1]
        metrics: dict[str, float] = {"best_epoch": records.index(best) + 1}
        for moment, scores in (("final", records[-1][split]), ("best", best[split])):
            (_, value), *others = scores.items()
            metrics |= {moment: value} | {f"{moment}_{name}": other for name, other in others}
        return {**metrics, "seconds": time.monotonic() - started}

    def _epoch(self, epoch: int) -> float:
        """Train an epoch and return its mean loss."""
        examples, size = self.task.train, self.config.batch_size
        order = torch.randperm(len(examples)).tolist()
        total = torch.zeros((), device=self.device)
        self.network.train()
        starts = tqdm(range(0, len(order), size), desc=f"epoch {epoch}", leave=False, disable=not sys.stderr.isatty())
        for start in starts:
            chosen = [examples[index] for index in order[start : start + size]]
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            tokens, words = pretrained.pad([example.tokens for example in chosen], self.device)
            targets = torch.tensor([example.target for example in chosen], device=self.device)
            loss = self.task.loss(self.network(tokens, words), words, targets)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
            self.optimizer.step()
            total += loss.detach() * len(chosen)
            self.step += 1
            self.run.heartbeat({"epoch": epoch, "step": self.step, "steps": self.steps})
        return total.item() / len(order)

    @torch.inference_mode()
    def _predict(self, examples: Sequence[Any]) -> Iterator[tuple[Any, Tensor]]:
        """Each example with its outputs (length, outputs), on the CPU. The shortest come first, to keep padding low."""
        self.network.eval()
        order, size = sorted(examples, key=lambda example: len(example.tokens)), 2 * self.config.batch_size
        for start in tqdm(range(0, len(order), size), desc="scoring", leave=False, disable=not sys.stderr.isatty()):
            chosen = order[start : start + size]
            outputs = self.network(*pretrained.pad([example.tokens for example in chosen], self.device)).cpu()
            yield from zip(chosen, outputs, strict=True)
            self.run.heartbeat({})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    config = FinetuneConfig.parse(argv)
    with clean_errors(config.prog()):
        device = prepare_device(config.device)
        run = open_run(config)
        if run is None:
            return
        encoder, tokenizer = pretrained.load(config.init_from, pretraining=config.pretraining, dropout=config.dropout)
        if config.max_tokens > encoder.config.max_positions:
            limit = encoder.config.max_positions
            raise ValueError(f"--max-tokens {config.max_tokens} exceeds the {limit} positions of the encoder: lower it")
        task = TASKS[config.task](config, tokenizer)
        seed_everything(config.seed)
        training = Finetuning(config, Network(encoder, task.outputs, config.dropout), task, run, device)
        run.begin()
        run.truncate_log(0)  # remove the lines of a run that did not finish
    groups = training.optimizer.param_groups
    decays = [{"group": g["name"], "tensors": len(g["params"]), "weight_decay": g["weight_decay"]} for g in groups]
    for entry in decays:
        print("decay:", json.dumps(entry), file=sys.stderr)
    with clean_errors(config.prog(), FAILURES), run.recorded():
        metrics = training.fit()
        seconds = metrics.pop("seconds")
        parameters = pretrained.parameters(encoder, more=count_parameters(training.network.last))
        result = run.finish(
            metrics=metrics, parameters=parameters, decays=decays, seconds=seconds, environment=environment(device)
        )
    print(result)


if __name__ == "__main__":
    main()

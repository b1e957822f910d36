"""Test whether a pre-trained encoder prefers the grammatical one of two sentences (BLiMP, Warstadt et al., TACL 2020).

Sentences are compared by pseudo-log-likelihood: the sum, over the tokens of a sentence, of the log-probability of each token
when it alone is masked (Salazar et al., ACL 2020). A pair with equal values counts as wrong. Prints the path of the run's
result.json on stdout; all other output goes to stderr.
"""

from __future__ import annotations

import json
import lzma
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside this program, whatever is installed

from bert_pretraining.downstream import BlimpConfig, open_run
from common.experiments.config import say_interrupted

if __name__ == "__main__":
    say_interrupted(BlimpConfig.prog())
    BlimpConfig.parse()  # --help and wrong flags are answered before torch, which takes seconds, is loaded

import torch
import torch.nn.functional as F
from tqdm import tqdm

from bert_pretraining import pretrained
from bert_pretraining.model import MaskedLanguageModel
from bert_pretraining.text import BOS, EOS, MASK, check_encodable, encode
from common.experiments.distributed import prepare_device
from common.experiments.runs import FAILURES, Run, clean_errors, environment, seed_everything

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Two sentences of a paradigm, such as "adjunct_island", of which one is grammatical."""

    paradigm: str
    good: str
    bad: str


def read(path: Path, first: int | None = None) -> list[Pair]:
    """Pairs of a file, or of all .jsonl files of a folder. With ``first``, only so many pairs of each paradigm.

    Raises ValueError, naming the file and the line, if a line is not a pair.
    """
    paths = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not paths:
        raise ValueError(f"{path} has no .jsonl files: give the folder data/ of BLiMP, or a .tsv file")
    counts, found = Counter[str](), []
    for pair in (pair for each in paths for pair in _pairs(each)):
        counts[pair.paradigm] += 1
        if first is None or counts[pair.paradigm] <= first:
            found.append(pair)
    if not found:
        raise ValueError(f"{path} has no pairs")
    return found


def _pairs(path: Path) -> Iterator[Pair]:
    opener = lzma.open if path.suffix == ".xz" else open
    kind = path.name.removesuffix(".xz").rpartition(".")[2]
    if not path.exists():
        raise ValueError(f"--data {path} does not exist: give the folder of BLiMP's .jsonl files, or a .tsv(.xz) file")
    if kind not in ("jsonl", "tsv"):
        raise ValueError(f"{path} must be a .jsonl, .tsv or .tsv.xz file")
    try:
        with opener(path, "rt", encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    cells = _cells(line.rstrip("\r\n"), kind)
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path} line {number} is not a pair of sentences: {type(error).__name__} {error}"
                    ) from error
                yield Pair(*cells)
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _cells(line: str, kind: str) -> list[str]:
    """Paradigm, good and bad sentence."""
    if kind == "jsonl":
        content = json.loads(line)
        cells = [content[key] for key in ("UID", "sentence_good", "sentence_bad")]
    else:
        columns = line.split("\t")
        if len(columns) != 5:
            raise ValueError(f"expected 5 columns (field, term, paradigm, good and bad sentence), got {len(columns)}")
        cells = columns[2:]
    if not all(isinstance(cell, str) and cell.strip() for cell in cells):
        raise ValueError("paradigm and sentences must be text")
    for cell in cells:
        check_encodable(cell)
    return cells


@torch.inference_mode()
def log_likelihoods(
    model: MaskedLanguageModel, sentences: Iterable[Tokens], batch_size: int, *, end: bool = False, run: Run | None = None
) -> dict[Tokens, float]:
    """Pseudo-log-likelihood of each distinct sequence of tokens. The sequences lack BOS, which is added here.

    With ``end``, EOS is added as well. In pre-training it only ends documents.

    A batch holds sequences of one length, so there is no padding.
    """
    model.eval()
    device = next(model.parameters()).device
    by_length: dict[int, list[Tokens]] = {}
    for sentence in dict.fromkeys(sentences):
        by_length.setdefault(len(sentence), []).append(sentence)
    found: dict[Tokens, float] = {}
    with tqdm(total=sum(map(len, by_length.values())), desc="scoring", leave=False, disable=not sys.stderr.isatty()) as bar:
        for length, alike in sorted(by_length.items()):
            size = max(1, batch_size // length)
            for start in range(0, len(alike), size):
                chosen = alike[start : start + size]
                tokens = torch.tensor([[BOS, *sentence, *[EOS] * end] for sentence in chosen], device=device)
                places = torch.arange(1, length + 1, device=device).repeat(len(chosen))
                masked = tokens.repeat_interleave(length, 0)  # a copy for each place
                masked.scatter_(1, places[:, None], MASK)
                logits = model(masked, places[:, None])
                wanted = tokens[:, 1 : length + 1].flatten()
                scores = -F.cross_entropy(logits, wanted, reduction="none").view(len(chosen), length).cpu().double().sum(1)
                found |= zip(chosen, scores.tolist(), strict=True)
                bar.update(len(chosen))
                if run is not None:
                    run.heartbeat({"sentences": len(found)})
    return found


def accuracies(pairs: Sequence[Pair], right: Sequence[bool]) -> dict[str, Any]:
    """Accuracy in percent, over all pairs and by paradigm."""
    counts, correct = Counter(pair.paradigm for pair in pairs), Counter[str]()
    for pair, answer in zip(pairs, right, strict=True):
        correct[pair.paradigm] += answer
    share = 100 * correct.total() / len(pairs)
    paradigms = {name: 100 * correct[name] / count for name, count in sorted(counts.items())}
    return {"final": share, "best": share, "pairs": len(pairs), "paradigms": paradigms}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    config = BlimpConfig.parse(argv)
    with clean_errors(config.prog()):
        device = prepare_device(config.device)
        run = open_run(config)
        if run is None:
            return
        pairs = read(config.data, config.pairs)
        model, tokenizer = pretrained.load(config.init_from, pretraining=config.pretraining)
        good, bad = ([tuple(encode(tokenizer, getattr(pair, side))) for pair in pairs] for side in ("good", "bad"))
        for pair, *tokens in zip(pairs, good, bad, strict=True):
            if not all(tokens):
                raise ValueError(f"a sentence of {pair} has no tokens: it holds only control characters")
        limit = model.config.max_positions - 1 - config.end_token
        longest = max(good + bad, key=len)
        if len(longest) > limit:
            text = tokenizer.decode(longest)
            raise ValueError(f"{text!r} has {len(longest)} tokens, but the encoder has positions for only {limit}")
        seed_everything(config.seed)
        run.begin()
    with clean_errors(config.prog(), FAILURES), run.recorded():
        started = time.monotonic()
        scores = log_likelihoods(model.to(device), good + bad, config.batch_size, end=config.end_token, run=run)
        metrics = accuracies(pairs, [scores[one] > scores[other] for one, other in zip(good, bad, strict=True)])
        result = run.finish(
            metrics=metrics,
            parameters=pretrained.parameters(model),
            seconds=time.monotonic() - started,
            environment=environment(device),
        )
    print(f"{metrics['final']:.2f} % of {len(pairs)} pairs", file=sys.stderr)
    print(result)


if __name__ == "__main__":
    main()

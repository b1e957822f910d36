"""Batches of masked sequences, which are functions of seed, step and position alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bert_pretraining.text import BOS, MASK, SPECIALS, Corpus

IGNORED = -100  # target of a position that is not scored
_EVALUATION_TOKENS = 8192  # in a batch
_SIGN = 2**63


@dataclass(frozen=True)
class Batch:
    tokens: Tensor  # (B, seq) int64, some of them masked or replaced
    positions: Tensor  # (B, predictions) int64, to be predicted, in ascending order
    targets: Tensor  # (B * predictions) int64: the original tokens, or IGNORED

    def chunk(self, parts: int) -> list[Batch]:
        """The batch in parts of equal size."""
        pieces = (self.tokens.chunk(parts), self.positions.chunk(parts), self.targets.chunk(parts))
        return [Batch(*each) for each in zip(*pieces, strict=True)]


def _signed(value: int) -> int:
    """A 64-bit unsigned number as the int64 with the same bits."""
    return (value + _SIGN) % (2 * _SIGN) - _SIGN


def hashed(key: int, counters: Tensor) -> Tensor:
    """Random numbers of 63 bits, each a function of the key and a counter (int64). splitmix64, the same on every device."""
    mixed = counters * _signed(0x9E3779B97F4A7C15) + _signed(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ ((mixed >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    return mixed & (_SIGN - 1)


def _key(seed: int, *words: int) -> int:
    """A 64-bit key for a seed and for what is drawn with it, given as numbers."""
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0])


class Masks:
    """Chooses the positions to predict and their input: functions of the seed and of a counter of all positions.

    In every sequence, ``predictions`` positions are drawn among those that hold text. 80 % of them get MASK, 10 % a random
    word, and 10 % keep their token (Devlin et al. 2019). If a sequence has less text, the remaining positions are not scored.
    """

    def __init__(self, seed: int, predictions: int, words: int) -> None:
        self.predictions, self.words = predictions, words
        self._order, self._kind, self._word = (_key(seed, 1, number) for number in range(3))

    def __call__(self, tokens: Tensor, first: Tensor | int) -> Batch:
        """Mask sequences (B, seq). The first of them is number ``first`` among all sequences of the run."""
        sequences, length = tokens.shape
        counters = torch.arange(sequences * length, device=tokens.device).view(sequences, length) + first * length
        order = hashed(self._order, counters).masked_fill(tokens < SPECIALS, _SIGN - 1)
        positions = order.topk(self.predictions, largest=False).indices.sort().values
        held, counters = tokens.gather(1, positions), counters.gather(1, positions)
        kind = hashed(self._kind, counters) % 10
        word = hashed(self._word, counters) % (self.words - SPECIALS) + SPECIALS
        put = torch.where(kind < 8, MASK, torch.where(kind == 8, word, held))
        text = held >= SPECIALS
        masked = tokens.scatter(1, positions, torch.where(text, put, held))
        return Batch(masked, positions, torch.where(text, held, IGNORED).flatten())


def read_streams(corpus: Corpus) -> dict[str, Tensor]:
    """The tokens of each split, mapped from their files. They are int16, since torch cannot index uint16."""
    sizes = {split: len(corpus.tokens(split)) for split in ("train", "valid", "test")}
    files = {split: str(corpus.folder / f"{split}.bin") for split in sizes}
    return {split: torch.from_file(files[split], size=size, dtype=torch.int16) for split, size in sizes.items()}


class PretrainingData:
    """Sequences of a corpus: BOS and the next ``seq - 1`` tokens of a split's stream.

    Every pass over the training split has its own order. Sequences that do not fill a batch are left out of that pass. On a GPU
    the streams are kept in GPU memory, at two bytes per token.

    streams:  the tokens of "train", "valid" and "test", as :func:`read_streams` returns them.
    words:    size of the vocabulary.

    Raises ValueError if the training split has no whole batch, or another split no whole sequence.
    """

    def __init__(
        self,
        streams: Mapping[str, Tensor],
        words: int,
        *,
        seq: int,
        predictions: int,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.words, self.seq, self.predictions, self.batch_size, self.seed = words, seq, predictions, batch_size, seed
        self.device = torch.device(device)
        self._streams = {split: stream.to(self.device) for split, stream in streams.items()}
        self._offsets = torch.arange(seq - 1, device=self.device)
        self.masks = Masks(seed, predictions, words)
        self.steps_per_pass = self.sequences("train") // batch_size
        self._pass: tuple[int, Tensor] | None = None
        if not self.steps_per_pass:
            raise ValueError(
                f"the corpus has {self.sequences('train')} training sequences of {seq} tokens, fewer than a batch of "
                f"{batch_size}: lower --batch-size or --seq, or prepare more text"
            )
        for split in streams:
            if not self.sequences(split):
                raise ValueError(f"the {split} split of the corpus has no sequence of {seq} tokens: lower --seq")

    def sequences(self, split: str) -> int:
        """Number of whole sequences in a split."""
        return len(self._streams[split]) // (self.seq - 1)

    def order(self, number: int) -> Tensor:
        """Order of the training sequences in a pass, counted from 0."""
        if self._pass is None or self._pass[0] != number:
            generator = torch.Generator().manual_seed(_key(self.seed, 0, number) >> 1)
            self._pass = number, torch.randperm(self.sequences("train"), generator=generator).to(self.device)
        return self._pass[1]

    def _sequences(self, split: str, index: Tensor) -> Tensor:
        """The sequences (B, seq) of an index (B)."""
        tokens = self._streams[split][index[:, None] * (self.seq - 1) + self._offsets].to(torch.int64) & 0xFFFF
        return torch.cat([tokens.new_full((len(index), 1), BOS), tokens], dim=1)

    def masked(self, index: Tensor, first: Tensor | int) -> Batch:
        """The training sequences of an index (B), masked. The first is number ``first`` among all sequences of the run."""
        return self.masks(self._sequences("train", index), first)

    def train_batch(self, step: int, *, rank: int = 0, world_size: int = 1) -> Batch:
        """The batch of a step. With several processes, the part of it that process ``rank`` trains on."""
        number, place = divmod(step, self.steps_per_pass)
        share = self.batch_size // world_size
        start = place * self.batch_size + rank * share
        return self.masked(self.order(number)[start : start + share], step * self.batch_size + rank * share)

    def evaluation_batches(self, split: str, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """All sequences of a split in order, with the same masks in all runs. With several processes, a part of the batches."""
        size = max(1, _EVALUATION_TOKENS // self.seq)
        masks = Masks(0, self.predictions, self.words)
        index = torch.arange(self.sequences(split), device=self.device)
        for number, part in enumerate(index.split(size)):
            if number % world_size == rank:
                yield masks(self._sequences(split, part), number * size)


class Feed:
    """Batches of consecutive steps, from tensors at fixed addresses, so that it can be part of a CUDA graph.

    Within a pass, :meth:`next` returns the batches of :meth:`PretrainingData.train_batch`. :meth:`start` must be called at the
    beginning of each pass.
    """

    def __init__(self, data: PretrainingData) -> None:
        self.data = data
        self.order = torch.empty(data.sequences("train"), dtype=torch.int64, device=data.device)
        self.place = torch.zeros((), dtype=torch.int64, device=data.device)  # start of the next batch in the order
        self.first = torch.zeros((), dtype=torch.int64, device=data.device)  # number of its first sequence among all of the run
        self._within = torch.arange(data.batch_size, device=data.device)

    def start(self, step: int) -> None:
        """Continue at a step of the run, in the order of its pass."""
        number, place = divmod(step, self.data.steps_per_pass)
        self.order.copy_(self.data.order(number))
        self.place.fill_(place * self.data.batch_size)
        self.first.fill_(step * self.data.batch_size)

    def next(self) -> Batch:
        """The next batch."""
        batch = self.data.masked(self.order[self.place + self._within], self.first)
        self.place += self.data.batch_size
        self.first += self.data.batch_size
        return batch

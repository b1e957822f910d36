"""Beam search in plain torch. It follows fairseq's rules, so the same model gives the same translations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transformer_iwslt.model import EOS, PAD, Transformer

Hypothesis = tuple[list[int], float]  # indices of the words without </s>, and the score


@torch.inference_mode()
def search(
    model: Transformer, source: Tensor, *, beam: int = 5, lenpen: float = 1.0, max_words: int | Sequence[int] = 200
) -> list[Hypothesis]:
    """Find the best translation of each sentence of ``source`` (batch, length).

    A sentence ends with EOS and is padded with PAD. The score of a hypothesis is its log probability, divided by its length
    to the power of ``lenpen``; the length includes EOS. The search for a sentence ends when ``beam`` of its hypotheses have
    ended, each among the ``beam`` best at its step, or at ``max_words`` words: one number for all sentences, or one for each.
    """
    state = model.decoder.start(*model.encoder(source))
    device = source.device
    sentences = list(range(len(source)))  # the unfinished ones
    state.reorder(torch.arange(len(source), device=device).repeat_interleave(beam))
    words = torch.full((len(source) * beam, 1), EOS, device=device)
    scores = torch.full((len(source), beam), -torch.inf, device=device)
    scores[:, 0] = 0  # all beams are equal at first: only one of them counts
    ended: list[list[Hypothesis]] = [[] for _ in sentences]
    limits = [max_words] * len(source) if isinstance(max_words, int) else list(max_words)
    for step in range(max(limits) + 1):
        following = model.decoder(words[:, -1:], state)[:, -1].float().log_softmax(-1).view(len(sentences), beam, -1)
        following[..., PAD] = -torch.inf
        if step == 0:
            following[..., EOS] = -torch.inf
        last = torch.tensor([limits[sentence] == step for sentence in sentences], device=device)
        following[last, :, :EOS] = following[last, :, EOS + 1 :] = -torch.inf
        count = following.shape[-1]
        best, index = (scores[..., None] + following).flatten(1).topk(min(2 * beam, beam * count))
        origin, word = index // count, index % count
        finite, ends = best.isfinite(), word.eq(EOS)
        for row, column in (ends & finite)[:, :beam].nonzero().tolist():
            found = ended[sentences[row]]
            if len(found) < beam:
                prefix = words[row * beam + int(origin[row, column]), 1:].tolist()
                found.append((prefix, best[row, column].item() / (step + 1) ** lenpen))
        kept = [row for row, each in enumerate(sentences) if len(ended[each]) < beam and step < limits[each]]
        if not kept:
            break
        rows = torch.tensor(kept, device=device)
        going = (~ends)[rows].int().argsort(dim=1, descending=True, stable=True)[:, :beam]  # the best unfinished ones, in order
        origin, word = origin[rows].gather(1, going), word[rows].gather(1, going)
        scores = best[rows].gather(1, going)
        order = (rows[:, None] * beam + origin).flatten()
        state.reorder(order)
        words = torch.cat([words[order], word.reshape(-1, 1)], dim=1)
        sentences = [sentences[row] for row in kept]
    return [max(found, key=lambda hypothesis: hypothesis[1]) if found else ([], -torch.inf) for found in ended]

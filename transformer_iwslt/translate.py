"""Translate your own sentences with a trained checkpoint: lines in, lines out, in plain torch, without fairseq."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside this program, whatever is installed

from common.experiments.config import say_interrupted
from transformer_iwslt.config import parse_translate

if __name__ == "__main__":
    say_interrupted("transformer_iwslt/translate.py")
    parse_translate()  # --help and wrong flags are answered before torch, which takes seconds, is loaded

import torch
from tqdm import tqdm

from common.experiments.distributed import find_device
from common.experiments.runs import clean_errors
from transformer_iwslt import engine
from transformer_iwslt.beam import search
from transformer_iwslt.config import TranslationConfig
from transformer_iwslt.model import PAD, Transformer
from transformer_iwslt.text import VOCABULARY, Pipeline, Vocabulary, find_vocabularies, split_lines

SHORT = 200  # words that any translation may have; fairseq allows no more


class Translator:
    """A model with its text pipeline and dictionaries."""

    def __init__(self, model: Transformer, pipeline: Pipeline, source: Vocabulary, target: Vocabulary) -> None:
        self.model, self.pipeline, self.source, self.target = model.eval(), pipeline, source, target
        self.device = next(model.parameters()).device
        self.limit = model.config.max_positions - PAD - 2  # subwords of a sentence, without </s>

    def subwords(self, line: str) -> list[str]:
        return self.pipeline.split(self.pipeline.tokenize(line, self.pipeline.source_lang))

    def translate(self, lines: Sequence[str], *, beam: int, lenpen: float) -> list[str]:
        """Translate plain lines. A line with more subwords than the model has positions is translated in parts."""
        parts: list[tuple[int, list[str]]] = []  # (line, subwords)
        for number, line in enumerate(lines):
            subwords = self.subwords(line)
            parts += [(number, subwords[start : start + self.limit]) for start in range(0, len(subwords), self.limit)]
        found: list[list[str]] = [[] for _ in lines]
        if parts:
            encoded = [torch.tensor(self.source.encode(subwords)) for _, subwords in parts]
            batch = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_value=PAD).to(self.device)
            limits = [min(max(SHORT, 2 * len(sentence)), self.limit) for sentence in encoded]
            translated = search(self.model, batch, beam=beam, lenpen=lenpen, max_words=limits)
            for (number, _), (words, _) in zip(parts, translated, strict=True):
                found[number] += self.target.decode(words)
        return [self.pipeline.detokenize(self.pipeline.join(words), self.pipeline.target_lang) for words in found]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_translate(argv)
    with clean_errors(f"{TranslationConfig.program}/translate.py"):
        device = find_device(args.device)
        state = engine.load_checkpoint(args.checkpoint)
        folder = args.vocabulary or args.checkpoint.parent / VOCABULARY
        pipeline, source, target = find_vocabularies(folder)
        engine.check_vocabulary(state, args.checkpoint, folder, source, target)
        translator = Translator(engine.to_transformer(state, args.checkpoint).to(device), pipeline, source, target)
    lines = split_lines(sys.stdin.buffer.read())
    decoded = [line.decode("utf-8", "replace") for line in lines]
    for number, (line, raw) in enumerate(zip(decoded, lines, strict=True), 1):
        if "\N{REPLACEMENT CHARACTER}" in line and "\N{REPLACEMENT CHARACTER}".encode() not in raw:
            print(f"warning: line {number} is not UTF-8: invalid bytes are replaced", file=sys.stderr)
        # Escaping writes up to five characters for one.
        size = len(translator.subwords(line)) if 6 * len(line) > translator.limit else 0
        if size > translator.limit:
            print(f"warning: line {number} has {size} subwords: it is cut into parts of {translator.limit}", file=sys.stderr)
    starts = range(0, len(decoded), args.batch_size)
    for start in tqdm(starts, desc="translating", disable=not sys.stderr.isatty()):
        batch = decoded[start : start + args.batch_size]
        for translation in translator.translate(batch, beam=args.beam, lenpen=args.lenpen):
            print(translation, flush=True)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

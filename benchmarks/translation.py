"""Translation: time a training step, compared with fairseq's own Transformer of the same sizes, and incremental decoding.

    python -m benchmarks.translation [--repeats N] [--words N] [--threads N]

Steps take turns in one process, all on the same batch of about 4,000 target tokens. A step is the forward pass, label-smoothed
loss with Frobenius decay, backward pass, clipping and Nesterov update, as in fairseq. Prints Markdown tables of medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.timing import interleaved, machine, ratio, spread
from transformer_iwslt import engine
from transformer_iwslt.config import TranslationConfig
from transformer_iwslt.model import EOS, PAD, Transformer, TransformerConfig

ALL = "--spectral-quekey --spectral-outval --wd2fd-quekey --wd2fd-outval --frobenius-decay 1e-4"
OURS = {
    "ours, full": "",
    "ours, full, decay of both products": "--wd2fd-quekey --wd2fd-outval --frobenius-decay 1e-4",
    "ours, rank scale 0.5, no decay": "--rank-scale 0.5 --spectral",
    "ours, rank scale 0.5, decay of all": f"--rank-scale 0.5 --spectral --wd2fd {ALL}",
    "ours, rank scale 0.25, decay of all": f"--rank-scale 0.25 --spectral --wd2fd {ALL}",
}
FAIRSEQ = (
    "--arch transformer --encoder-embed-dim 256 --encoder-ffn-embed-dim 1024 --encoder-layers 2 --encoder-attention-heads 4 "
    "--decoder-layers 2 --decoder-attention-heads 4 --encoder-normalize-before --decoder-normalize-before "
    "--encoder-learned-pos --decoder-learned-pos --dropout 0.2 --attention-dropout 0.1 --activation-dropout 0.1 "
    "--criterion label_smoothed_cross_entropy --label-smoothing 0.1 --optimizer nag --lr 0.25 --clip-norm 0.1 --max-tokens 4000"
)


def dictionary(words: int) -> Any:
    from fairseq.data import Dictionary

    made = Dictionary()
    for number in range(words - len(made)):
        made.add_symbol(f"w{number}")
    return made


def batch(words: int, sentences: int = 160, length: int = 25) -> dict[str, Any]:
    """A batch of sentence pairs of random words, with ``length`` words per sentence including </s>. A tenth are shorter."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(4, words, (sentences, length), generator=generator)
    target = torch.randint(4, words, (sentences, length), generator=generator)
    source[:, -1] = target[:, -1] = EOS
    short = sentences // 10
    source[:short, : length // 3] = PAD
    target[:short, length // 2] = EOS
    target[:short, length // 2 + 1 :] = PAD
    before = torch.cat([torch.full((sentences, 1), EOS), target[:, :-1]], 1)
    before[target.eq(PAD)] = PAD
    net_input = {"src_tokens": source, "src_lengths": source.ne(PAD).sum(1), "prev_output_tokens": before}
    return {"id": torch.arange(sentences), "net_input": net_input, "target": target, "ntokens": int(target.ne(PAD).sum())}


def training_step(words: list[str], source: Any, target: Any, sample: dict[str, Any]) -> tuple[Callable[[], None], int]:
    """A training step that fairseq builds from a command line, and the number of parameters of its model."""
    from fairseq import optim, options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.tasks.translation import TranslationTask

    cfg = convert_namespace_to_omegaconf(engine.parse(options.get_training_parser, words))
    task = TranslationTask(cfg.task, source, target)
    torch.manual_seed(0)
    model, criterion = task.build_model(cfg.model).train(), task.build_criterion(cfg.criterion)
    optimizer = optim.build_optimizer(cfg.optimizer, list(model.parameters()))

    def step() -> None:
        optimizer.zero_grad()
        loss, size, _ = criterion(model, sample)
        optimizer.backward(loss)
        optimizer.multiply_grads(1 / size)
        optimizer.clip_grad_norm(0.1)
        optimizer.step()

    return step, sum(parameter.numel() for parameter in model.parameters())


def steps(words: int, repeats: int) -> str:
    source, target, sample = dictionary(words), dictionary(words), batch(words)
    commands = {"fairseq's transformer": ["data", *FAIRSEQ.split()]}
    for name, flags in OURS.items():
        config = TranslationConfig.parse(["data", "--activation-dropout", "0.1", *flags.split()])
        commands[name] = config.fairseq_words(config.data)
    made = {name: training_step(command, source, target, sample) for name, command in commands.items()}
    seconds = interleaved({name: step for name, (step, _) in made.items()}, repeats)
    first = next(iter(seconds))
    lines = []
    for name, found in seconds.items():
        median = statistics.median(found)
        speed = [f"{sample['ntokens'] / median:,.0f}", f"{ratio(seconds[first], found):.2f}"]
        lines.append([name, f"{made[name][1]:,}", spread(found), *speed])
    header = ["model", "parameters", "ms a step, median (range)", "target tokens / s", "times fairseq's speed"]
    return tabulate(lines, header, tablefmt="github", disable_numparse=True)


@torch.inference_mode()
def decoding(words: int, repeats: int, sentences: int = 32, length: int = 50) -> str:
    """Time greedy decoding of ``length`` words: with incremental state, and by decoding the whole prefix at every word."""
    lines = []
    for scale in (0.0, 0.5):
        torch.manual_seed(0)
        model = Transformer(TransformerConfig(words, words, rank_scale=scale)).eval()
        source = batch(words, sentences)["net_input"]["src_tokens"]
        encoded = model.encoder(source)

        def incremental(model: Transformer = model, encoded: Any = encoded) -> torch.Tensor:
            state, found = model.decoder.start(*encoded), torch.full((sentences, 1), EOS)
            for _ in range(length):
                found = torch.cat([found, model.decoder(found[:, -1:], state)[:, -1:].argmax(-1)], 1)
            return found

        def whole(model: Transformer = model, encoded: Any = encoded) -> torch.Tensor:
            found = torch.full((sentences, 1), EOS)
            for _ in range(length):
                found = torch.cat([found, model.decoder(found, model.decoder.start(*encoded))[:, -1:].argmax(-1)], 1)
            return found

        assert torch.equal(incremental(), whole())
        seconds = interleaved({"incremental": incremental, "whole": whole}, repeats)
        fast, slow = (statistics.median(seconds[name]) for name in ("incremental", "whole"))
        lines.append([f"{scale:g}", f"{slow * 1e3:.0f}", f"{fast * 1e3:.0f}", f"{slow / fast:.1f}"])
    header = ["rank scale", "ms, whole prefix at every word", "ms, incremental", "times faster"]
    return tabulate(lines, header, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--words", type=int, default=10_000, help="words of each dictionary")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine.load()
    print(f"{machine()}; dictionaries of {args.words:,} words, {args.repeats} repeats\n")
    print(steps(args.words, args.repeats))
    print(f"\n50 words for 32 sentences\n\n{decoding(args.words, max(3, args.repeats // 3))}")


if __name__ == "__main__":
    main()

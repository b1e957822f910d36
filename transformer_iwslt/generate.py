"""Translate a split with fairseq's beam search and score it: BLEU of tokenized text, and sacreBLEU of plain text."""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside this program, whatever is installed

from common.experiments.config import config_hash, say_interrupted
from transformer_iwslt.config import parse_generate, refuse_separator

if __name__ == "__main__":
    say_interrupted("transformer_iwslt/generate.py")
    parse_generate()  # --help and wrong flags are answered before torch, which takes seconds, is loaded

import torch

from common.experiments.files import read_json, write_atomic, write_json
from common.experiments.runs import Run, clean_errors, environment
from transformer_iwslt import engine
from transformer_iwslt.config import BEAM, LENPEN, PLUGIN, TASK, WHOLE, TranslationConfig
from transformer_iwslt.engine import BEST, LAST, updates_of
from transformer_iwslt.text import Pipeline, find_data, find_vocabularies, inputs

TRAINED = "trained.json"  # in the folder of a run whose training has finished


def translate(
    checkpoint: Path, data: Path, decoding: dict[str, Any], words: Sequence[str], *, cpu: bool
) -> list[dict[str, str]]:
    """Source, hypothesis and reference of each sentence of a split, in the split's order, as tokenized text.

    The model is rebuilt from the checkpoint alone. ``decoding`` holds subset, beam and lenpen; ``words`` are flags of fairseq.
    Raises ValueError if the checkpoint and the data do not match.
    """
    engine.load()
    from fairseq import options
    from fairseq_cli import generate

    pipeline, source, target = find_vocabularies(data)
    state = engine.load_checkpoint(checkpoint)
    engine.check_vocabulary(state, checkpoint, data, source, target)
    gpus = 0 if cpu else torch.cuda.device_count()
    words = [*words, *engine.loading(words, gpus)]
    flags = ["--gen-subset", decoding["subset"], "--beam", str(decoding["beam"]), f"--lenpen={decoding['lenpen']}"]
    own = [str(data), "--path", str(checkpoint), "--user-dir", str(PLUGIN), "--task", TASK, *WHOLE, *(["--cpu"] if cpu else [])]
    cfg = engine.configuration(options.get_generation_parser, [*own, *flags, *words])
    engine.check_lengths(data, decoding["subset"], cfg=cfg, max_tokens=cfg.dataset.max_tokens)
    output = io.StringIO()
    with engine.clear_sizes():
        generate._main(cfg, output)
    found: dict[int, dict[str, str]] = {}
    for kind, number, text in re.findall(r"^([STH])-(\d+)\t(.*)$", output.getvalue(), re.MULTILINE):
        name = {"S": "source", "T": "reference", "H": "hypothesis"}[kind]
        line = pipeline.join(text.rpartition("\t")[2].split())
        found.setdefault(int(number), {}).setdefault(name, line)  # the first of several hypotheses is the best
    return [found[number] for number in sorted(found)]


def score(translations: Sequence[dict[str, str]], pipeline: Pipeline, references: Sequence[str] | None) -> dict[str, Any]:
    """BLEU of tokenized text in percent, as the released code's toolkit counts it, and sacreBLEU of plain text.

    ``references`` are plain sentences. Without them, the references of the split are detokenized. Both sides are in lower case
    if the text was prepared in lower case.
    """
    from sacrebleu.metrics import BLEU

    lang, hypotheses = pipeline.target_lang, [each["hypothesis"] for each in translations]
    tokenized = [each["reference"] for each in translations]
    if references is not None:
        if len(references) != len(translations):
            raise ValueError(f"there are {len(translations)} translations and {len(references)} references")
        tokenized = [pipeline.tokenize(reference, lang) for reference in references]
    plain = references or [pipeline.detokenize(line, lang) for line in tokenized]
    by_word = BLEU(tokenize="none", force=True, smooth_method="none")
    by_sentence = BLEU(lowercase=pipeline.lowercase)
    return {
        "bleu": by_word.corpus_score(hypotheses, [tokenized]).score,
        "bleu_signature": str(by_word.get_signature()),
        "sacrebleu": by_sentence.corpus_score([pipeline.detokenize(line, lang) for line in hypotheses], [list(plain)]).score,
        "sacrebleu_signature": str(by_sentence.get_signature()),
        "sentences": len(hypotheses),
    }


def references_of(data: Path, subset: str) -> list[str] | None:
    """Plain references of a split, or None if prepare.py did not keep them."""
    path = data / f"references.{subset}"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else None


def measure(
    checkpoint: Path, data: Path, decoding: dict[str, Any], words: Sequence[str] = (), *, cpu: bool = False
) -> dict[str, Any]:
    """Scores of a checkpoint on a split, and its translations."""
    pipeline = Pipeline.load(data)
    translations = translate(checkpoint, data, decoding, words, cpu=cpu)
    return {**score(translations, pipeline, references_of(data, decoding["subset"])), "translations": translations}


STANDARD = {"subset": "test", "beam": BEAM, "lenpen": LENPEN}


def write_result(path: Path, data: Path, best: dict[str, Any] | None = None, *, cpu: bool = False) -> Path:
    """Write the result of a finished training: test BLEU of the checkpoint with the best validation loss, and of the last one.

    ``best`` holds the scores of the former if they are known. Raises ValueError if the training has not finished.
    """
    if not (path / TRAINED).exists():
        raise ValueError(f"{path} does not hold a finished training run: start train.py again to resume it")
    trained = read_json(path / TRAINED)
    if trained["inputs"] != inputs(data):
        raise ValueError(f"{path} was not trained on the present content of {data}")
    words = ["--batch-size", "128"]
    state = engine.load_checkpoint(path / LAST)
    if best is None:
        best = measure(path / (BEST if (path / BEST).exists() else LAST), data, STANDARD, words, cpu=cpu)
    alike = not (path / BEST).exists() or updates_of(engine.load_checkpoint(path / BEST)) == updates_of(state)
    last = best if alike else measure(path / LAST, data, STANDARD, words, cpu=cpu)
    scores = {key: value for key, value in best.items() if key != "translations"}
    metrics = {**scores, "final": last["bleu"], "best": best["bleu"], "final_sacrebleu": last["sacrebleu"]}
    write_translations(path, best["translations"])
    run = Run(
        path,
        trained["config"],
        trained["seed"],
        kind=TranslationConfig,
        inputs=trained["inputs"],
        resume=True,
        row=trained["row"],
    )
    return run.finish(
        metrics=metrics,
        parameters=trained["parameters"],
        decays=trained["decays"],
        decoding=STANDARD,
        seconds=float(state["extra_state"]["previous_training_time"]),
        environment=environment("cuda" if torch.cuda.is_available() and not cpu else "cpu", trained["processes"])
        | {"ve-fairseq": version("ve-fairseq"), "sacrebleu": version("sacrebleu")},
    )


def write_translations(directory: Path, translations: Sequence[dict[str, str]]) -> None:
    """Write translations.txt: source, reference and hypothesis of each sentence, tokenized."""
    blocks = (f"S {each['source']}\nT {each['reference']}\nH {each['hypothesis']}\n" for each in translations)
    write_atomic(directory / "translations.txt", "".join(blocks))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_generate(argv)
    with clean_errors(f"{TranslationConfig.program}/generate.py"):
        args.data = find_data(args.data)
        refuse_separator("--path", args.path)
        engine.require()
        held = engine.load_checkpoint(args.path)["cfg"]["model"].rank_scale
        if args.rank_scale is not None and args.rank_scale != held:
            raise ValueError(f"--rank-scale {args.rank_scale:g} differs from {held:g} of {args.path}: leave it out")
        decoding = {"subset": args.gen_subset, "beam": args.beam, "lenpen": args.lenpen}
        words = ["--batch-size", str(args.batch_size), *args.fairseq]
        found = measure(args.path, args.data, decoding, words, cpu=args.cpu)
        report = (
            f"BLEU = {found['bleu']:.2f} (tokenized{', lower case' if Pipeline.load(args.data).lowercase else ''})\n"
            f"sacreBLEU = {found['sacrebleu']:.2f} ({found['sacrebleu_signature']})"
        )
        if not args.quiet:
            for each in found["translations"]:
                print(each["hypothesis"])
        print(report)
        if args.dump is not None:
            write_atomic(args.dump, report + "\n")
        print(record(args, decoding, found), file=sys.stderr)


def record(args: argparse.Namespace, decoding: dict[str, Any], found: dict[str, Any]) -> Path:
    """Keep the scores: as the run's result if the settings are those of results, else in a separate folder."""
    path = args.path.parent
    standard = decoding == STANDARD and not args.fairseq and args.path.name == BEST and args.results_path is None
    if standard and (path / TRAINED).exists() and read_json(path / TRAINED)["inputs"] == inputs(args.data):
        return write_result(path, args.data, found, cpu=args.cpu)
    settings = {**decoding, "checkpoint": args.path.name, "fairseq": args.fairseq, **inputs(args.data)}
    directory = args.results_path or path / f"generate-{config_hash(settings)}"
    write_translations(directory, found["translations"])
    metrics = {key: value for key, value in found.items() if key != "translations"}
    write_json(directory / "scores.json", {"format": 1, "decoding": settings, "metrics": metrics})
    return directory / "scores.json"


if __name__ == "__main__":
    main()

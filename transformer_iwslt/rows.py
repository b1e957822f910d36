"""The translation rows: the 286 settings of the released scripts, all distinct."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from common.tables.rows import Program, Published, Row, SweepFigure, Table
from transformer_iwslt.config import TranslationConfig

DATA = "data-bin/iwslt14.tokenized.de-en"
HOURS = 4.0  # GPU-hours of one seed, as estimated by the authors of the released code
DECAYS = ("0", "1e-6", "5e-6", "1e-5", "5e-5", "1e-4")
MORE_DECAYS = ("5e-4", "1e-3")  # for the full model without spectral initialization
FAMILIES = {"lin": "", "qk": "-quekey", "ov": "-outval"}  # factorized layers, query-key and output-value products
SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:none|smooth:none|version:2.6.0"  # sacreBLEU's signature on tokenized text
SCORE = f"test BLEU ({SIGNATURE}, of tokenized lower case; final: the last checkpoint, best: the one of lowest validation loss)"
_README = Published(32.12, "README of StillKeepTry/Transformer-PyTorch, the base of the released code, not the paper")


def methods(scale: str, decay: str) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Families with spectral initialization, and families with Frobenius decay, as the released scripts combine them.

    Query-key products are decayed only if output-value products are, and both are initialized alike. The full model has no
    factorized layers.
    """
    layers = ((), ("lin",)) if scale != "0" else ((),)
    for products in ((), ("ov",), ("qk", "ov")) if decay != "0" else ((),):
        for frobenius in layers if decay != "0" else ((),):
            for spectral in layers:
                for balanced in ((), ("qk", "ov")) if decay not in MORE_DECAYS else ((),):
                    yield (*spectral, *balanced), (*frobenius, *products)


def name_of(spectral: tuple[str, ...], frobenius: tuple[str, ...]) -> str:
    parts = [f"{scheme}_{'_'.join(found)}" for scheme, found in (("spectral", spectral), ("frobenius", frobenius)) if found]
    return "+".join(parts) or "regular"


def make_row(scale: str, decay: str, spectral: tuple[str, ...], frobenius: tuple[str, ...]) -> Row:
    method = name_of(spectral, frobenius)
    flags = [DATA, "--rank-scale", scale, "--weight-decay", decay, *(f"--spectral{FAMILIES[family]}" for family in spectral)]
    flags += [f"--wd2fd{FAMILIES[family]}" for family in frobenius]
    flags += ["--frobenius-decay", decay] if frobenius else []
    model = "full" if scale == "0" else f"rank scale {scale}"
    decayed = f"Frobenius decay of {', '.join(frobenius)}, weight decay elsewhere" if frobenius else "weight decay"
    return Row(
        id=f"{scale}-{decay}-{method}",
        label=f"Transformer (small) on IWSLT'14 de-en, {model}; spectral: {', '.join(spectral) or 'none'}; {decayed}, {decay}",
        flags=(*flags, "--generate"),
        hours=HOURS,
        published=_README if (scale, decay, method) == ("0", "0", "regular") else None,
        place=(method, decay),
    )


def families(config: Mapping[str, Any], *flags: str) -> str:
    """The families whose flag is on; ``flags`` names one flag for each family."""
    on = (family for family, flag in zip(FAMILIES, flags, strict=True) if config[flag] in (True, "spectral"))
    return " ".join(on) or "none"


def initialization(config: Mapping[str, Any]) -> str:
    return f"spectral: {families(config, 'init', 'spectral_quekey', 'spectral_outval')}"


def decayed_families(config: Mapping[str, Any]) -> str:
    return f"Frobenius decay: {families(config, 'wd2fd', 'wd2fd_quekey', 'wd2fd_outval')}"


def table(scale: str, title: str) -> Table:
    decays = DECAYS + MORE_DECAYS if scale == "0" else DECAYS
    rows = [make_row(scale, decay, *method) for decay in decays for method in methods(scale, decay)]
    figure = SweepFigure("decay", x="weight_decay", series=decayed_families, panel=initialization)
    return Table(f"iwslt14-{scale}", f"IWSLT'14 German-English: {title}", tuple(rows), (figure,), SCORE)


TABLES = (
    table("0", "the full Transformer"),
    table("0.5", "the Transformer at rank scale 0.5"),
    table("0.25", "the Transformer at rank scale 0.25"),
)
PROGRAM = Program(TranslationConfig.program, {"train.py": TranslationConfig}, TABLES, own_process=True)

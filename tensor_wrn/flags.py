"""Flags of the WideResNet experiments; loads without torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from common.runs import FlagParser, natural, non_negative
from common.vision import flags

PROGRAM = "tensor_wrn"
DATASETS = ("cifar10", "cifar100", "digits", "fashion_mnist", "imagefolder")
FORMS = ("Conv", "TensorTrain", "Tucker", "TuckerTT")


def _milestones(text: str) -> list[int]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    rising = isinstance(value, list) and all(type(item) is int and item > 0 for item in value) and value == sorted(set(value))
    if not rising:
        raise argparse.ArgumentTypeError(f"must be a list of rising epochs such as [60,120,160], got {text!r}")
    return value


@cache
def make_parser() -> FlagParser:
    parser = FlagParser(prog=f"{PROGRAM}/train.py", description="Train WideResNets with low-rank or tensor convolutions.")
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("mode", choices=("teacher", "student"), help="train alone, or also to attend and answer like a teacher")
    parser.add_argument("--wrn-depth", type=int, default=40, help="6n + 4")
    parser.add_argument("--wrn-width", type=float, default=2)
    flags.add_flags(parser, epochs=200, datasets=DATASETS)
    parser.set_defaults(data=None, weight_decay=5e-4)
    parser.add_argument("--GPU", dest="device", default=argparse.SUPPRESS, metavar="N", help="short for --device N")
    parser.add_argument("--epoch-step", type=_milestones, default=[60, 120, 160], metavar="LIST", help="where the rate drops")
    parser.add_argument("--lr-decay-ratio", type=non_negative, default=0.2, help="by what factor it drops")
    parser.add_argument("--cutout", type=natural, metavar="PIXELS", help="side of the cutout (default: half the image)")
    parser.add_argument(
        "-t", "--teacher-checkpoint", type=Path, metavar="DIR", help="run of the teacher; for a teacher, its save-dir"
    )
    parser.add_argument("-s", "--student-checkpoint", type=Path, metavar="DIR", help="as student: the save-dir")

    method = parser.add_argument_group("factorization")
    method.add_argument(
        "--conv", default="Conv", metavar="FORM", help="Conv, TensorTrain_R, Tucker_R or TuckerTT_R with rank scale R in (0, 1]"
    )
    method.add_argument(
        "--rank-scale",
        type=non_negative,
        default=0.0,
        help="the same as R; of Conv: rank as a share of out_channels * kernel",
    )
    method.add_argument("--target-ratio", type=non_negative, default=0.0, help="instead: parameters to keep")
    method.add_argument("--spectral", action="store_true", help="spectral initialization, short for --init spectral")
    method.add_argument(
        "--init",
        choices=("regular", "spectral", "norm-matched", "released"),
        help="initialization (default: regular); released: of tensors, what the released code calls regular",
    )
    method.add_argument("--wd2fd", action="store_true", help="Frobenius decay on the factors in place of their weight decay")
    method.add_argument("--nocrswd", action="store_true", help="weight decay on the factors is not scaled by the compression")
    method.add_argument("--no-frob", action="store_true", help="with --wd2fd: no decay at all on the factors")
    method.add_argument(
        "--decay-shortcuts",
        action="store_true",
        help="Conv without --wd2fd: Frobenius decay on the shortcuts, on top of their weight decay, as the released code has",
    )

    student = parser.add_argument_group("student")
    student.add_argument("--temperature", type=non_negative, help="of the teacher's and student's answers (default: 4)")
    student.add_argument("--alpha", type=non_negative, help="weight of the teacher's answers, in [0, 1] (default: 0)")
    student.add_argument("--beta", type=non_negative, help="weight of the attention transfer (default: 1000)")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed, completed and checked flags; ends in one line on stderr and exit status 2 where they are wrong.

    ``form`` and ``rank_scale`` come from --conv; ``save_dir`` and ``teacher`` from -t and -s.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    args.data = args.data or args.dataset
    del args.dataset
    flags.resolve(parser, args)
    if args.wrn_depth < 10 or args.wrn_depth % 6 != 4:
        parser.error(f"--wrn-depth must be 6n + 4 and at least 10, got {args.wrn_depth}")
    if not 1 / 16 <= args.wrn_width <= 100:
        parser.error(f"--wrn-width must be between 1/16 and 100, got {args.wrn_width:g}")
    _resolve_student(parser, args)
    _resolve_form(parser, args)
    _resolve_directories(parser, args)
    return args


def _resolve_student(parser: FlagParser, args: argparse.Namespace) -> None:
    for name, default in (("temperature", 4.0), ("alpha", 0.0), ("beta", 1e3)):
        if args.mode == "teacher" and getattr(args, name) is not None:
            parser.error(f"--{name} is for the mode student")
        if args.mode == "student" and getattr(args, name) is None:
            setattr(args, name, default)
    if args.mode == "student" and (args.alpha > 1 or args.temperature == 0):
        parser.error(f"--alpha must be in [0, 1] and --temperature above 0, got {args.alpha:g} and {args.temperature:g}")


def _resolve_form(parser: FlagParser, args: argparse.Namespace) -> None:
    form, _, scale = args.conv.partition("_")
    forms = "Conv, TensorTrain_R, Tucker_R or TuckerTT_R with R in (0, 1]"
    if form not in FORMS or (scale and form == "Conv"):
        parser.error(f"--conv must be {forms}, got {args.conv!r}")
    if scale:
        try:
            value = float(scale)
        except ValueError:
            value = 0.0
        if not 0 < value <= 1:
            parser.error(f"--conv must be {forms}, got {args.conv!r}")
        if args.rank_scale or args.target_ratio:
            parser.error(f"--conv {args.conv} tells the rank scale: --rank-scale and --target-ratio exclude it")
        args.rank_scale = value
    args.form = form
    del args.conv
    tensors = form != "Conv"
    if tensors and not (args.rank_scale or args.target_ratio):
        parser.error(f"--conv {form} needs a rank scale: --conv {form}_R with R in (0, 1], --rank-scale or --target-ratio")
    if tensors and args.rank_scale > 1:
        parser.error(f"--rank-scale of {form} must be at most 1, got {args.rank_scale:g}")
    if args.init == "released" and not tensors:
        parser.error("--init released is for tensors: of Conv, the released code's regular initialization is regular")
    flags.resolve_factorization(parser, args, ("spectral", "init", "wd2fd", "decay_shortcuts"))
    if args.wd2fd and args.nocrswd:
        parser.error("--wd2fd and --nocrswd exclude each other: Frobenius decay takes the place of weight decay")
    if args.no_frob and not args.wd2fd:
        parser.error("--no-frob needs --wd2fd: it takes away the decay that --wd2fd puts in the place of weight decay")
    if args.wd2fd:
        args.decay = "none" if args.no_frob else "frobenius"
    else:
        dense = not (args.rank_scale or args.target_ratio)
        args.decay = "plain" if args.nocrswd or dense else "crs"
    if args.decay_shortcuts:
        if tensors or args.wd2fd:
            parser.error("--decay-shortcuts is for Conv without --wd2fd: else shortcuts are dense or decayed anyway")
        args.decay += "+shortcuts"
    del args.wd2fd, args.nocrswd, args.no_frob, args.decay_shortcuts


def _resolve_directories(parser: FlagParser, args: argparse.Namespace) -> None:
    teacher, student = args.teacher_checkpoint, args.student_checkpoint
    del args.teacher_checkpoint, args.student_checkpoint
    args.teacher = None
    if args.mode == "teacher":
        if student is not None:
            parser.error(f"-s {student} is for the mode student: a teacher is written to -t")
        args.save_dir = _one(parser, args.save_dir, teacher, "-t")
        return
    if teacher is None:
        parser.error("the mode student needs -t DIR: the run of the teacher")
    args.teacher = teacher if teacher.suffix == ".pt" else teacher / "checkpoint.pt"
    args.save_dir = _one(parser, args.save_dir, student, "-s")


def _one(parser: FlagParser, save_dir: Path | None, short: Path | None, flag: str) -> Path | None:
    if save_dir is not None and short is not None:
        parser.error(f"--save-dir {save_dir} and {flag} {short} name the directory twice: give one")
    return save_dir or short

"""Training on a GPU: its correctness, then its speed.

    python -m benchmarks.gpu [--only PART...] [--minutes M] [--out DIR] [--device cpu]

The parts run in this order. Without --only, all parts except "compile" run, in at most four minutes on one card:

    programs     every program for two epochs of embedded data in float32, float16 and bfloat16, side by side
    agreement    50 steps recorded as a CUDA graph, compared with the same steps launched kernel by kernel; a run that is
                 stopped and resumed, compared with an uninterrupted one
    steps        a training step of each network, dense and factorized: as it was before, kernel by kernel, and recorded.
                 Milliseconds, kernels, memory, share of the card's bandwidth, and share of Frobenius decay
    cards        images per second of 1, 2, 4 and 8 runs on one card
    translation  tokens per second, compared with fairseq's own Transformer
    pretraining  tokens per second of BERT-base: dense, with heads of half width, and with both schemes
    compile      the recorded step of a compiled network; compiling takes a minute each, up to eight in total

A case that fails or exceeds its time limit is listed with its reason, and the other cases continue. --out receives gpu.md and
gpu.json, which are rewritten after each case. "--device cpu" tests the command on a computer without a GPU, at a size where the
times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tabulate import tabulate
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.networks import NETWORKS
from benchmarks.step import Traffic
from benchmarks.timing import Call, IsolatedCall, machine
from bert_pretraining.config import PretrainingConfig
from bert_pretraining.data import PretrainingData
from bert_pretraining.model import EncoderConfig, MaskedLanguageModel
from bert_pretraining.train import make_loop
from bert_pretraining.training import PretrainingLoop
from common import FrobeniusDecay, param_groups
from common.experiments.distributed import Processes
from common.experiments.files import ROOT, write_atomic, write_json
from common.experiments.runs import Run, seed_everything
from common.experiments.training import TrainingLoop
from common.tables.mps import shared_gpus
from common.vision.config import ImageRunConfig
from common.vision.data import Data
from common.vision.training import Trainer, sgd

BATCH = 128
RESNET20, TENSOR_TRAIN = "ResNet20, rank scale 0.111", "WRN16-4 TensorTrain, 6.667 %"
TIMED = [RESNET20, "ResNet32 [64, 128, 256], 10 %", "VGG19, 10 %", "WRN28-10, 1.667 %", TENSOR_TRAIN]
COMPILED = TIMED[:2]
PRECISIONS = {"off": "float32", "fp16": "float16", "bf16": "bfloat16"}


class TimeUp(Exception):
    """A case exceeded its time limit."""


@contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """Raise TimeUp in the block after this many seconds."""

    def stop(number: int, frame: Any) -> None:
        raise TimeUp(f"it took longer than {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Report:
    """The measurements as tables, and the cases that were left out, with reasons. Written to ``out`` after each case."""

    def __init__(self, device: torch.device, out: Path | None, minutes: float | None) -> None:
        self.device, self.out = device, out
        self.started = time.monotonic()
        self.deadline = None if minutes is None else self.started + 60 * minutes
        self.tables: dict[str, dict[str, Any]] = {}
        self.left_out: list[str] = []
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: a dry run with meaningless times"
        self.head = f"{name}; {machine()}, CUDA {torch.version.cuda}"

    def case(self, name: str, call: Callable[[], Any], seconds: float = 60.0) -> Any:
        """The result of a call, or None if it fails, takes too long, or would start after --minutes."""
        left = seconds if self.deadline is None else min(seconds, self.deadline - time.monotonic())
        if left <= 0:
            self.left_out.append(f"{name}: the time of --minutes was used up")
            return None
        started = time.monotonic()
        try:
            with time_limit(left):
                return call()
        except Exception as error:
            traceback.print_exc()
            self.left_out.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}")
            return None
        finally:
            print(f"[{time.monotonic() - self.started:.0f} s] {name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
            self.write()

    def add(self, title: str, header: Sequence[str], line: Sequence[Any] | None) -> None:
        """Add a line to the table with this title."""
        if line is not None:
            self.tables.setdefault(title, {"header": list(header), "lines": []})["lines"].append([str(cell) for cell in line])
        self.write()

    def markdown(self) -> str:
        parts = [f"{self.head}; {time.monotonic() - self.started:.0f} seconds in total."]
        for title, table in self.tables.items():
            lines = tabulate(table["lines"], table["header"], tablefmt="github", disable_numparse=True)
            parts.append(f"### {title}\n\n{lines}")
        if self.left_out:
            parts.append("Left out:\n\n" + "\n".join(f"- {each}" for each in self.left_out))
        return "\n\n".join(parts) + "\n"

    def write(self) -> None:
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            write_atomic(self.out / "gpu.md", self.markdown().encode())
            write_json(self.out / "gpu.json", {"head": self.head, "tables": self.tables, "left_out": self.left_out})


def images(device: torch.device, count: int | None = None) -> Data:
    """Random images: by default as many as in CIFAR-10, or a few on a CPU."""
    count = count or (50_000 if device.type == "cuda" else 300)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return Data((pixels, labels), (pixels[:100], labels[:100]), 10, device=device)


def make_trainer(
    network: str,
    factorized: bool,
    data: Data,
    *,
    amp: str = "bf16",
    decayed: bool = True,
    before: bool = False,
    checkpoint: dict[str, Any] | None = None,
    contractions: dict[str, str] | None = None,
    **flags: Any,
) -> Trainer:
    """A trainer like that of the programs, ready for its next step. The learning rate falls after every third epoch.

    before:        train as before steps were recorded and weights composed in groups.
    checkpoint:    checkpoint to resume from.
    contractions:  contractions to use instead of measuring them.
    """
    seed_everything(0)
    made = NETWORKS[network]
    model = (made.factorized("regular") if factorized else made.dense()).to(data.device)
    decay = FrobeniusDecay(model, 1e-4) if factorized and decayed else None
    groups = param_groups(model, weight_decay=1e-4, decay=decay)
    size = BATCH if data.device.type == "cuda" else 8
    config = ImageRunConfig(batch_size=size, epochs=100, amp=amp, **flags)
    trainer = Trainer(
        model,
        data,
        Run(Path("never written"), {}, 0),
        config=config,
        processes=Processes(data.device),
        architecture={},
        optimizer=torch.optim.SGD(groups, lr=0.01, momentum=0.9) if before else sgd(groups, config, data.device),
        schedule=lambda epoch: 0.01 * 0.1 ** (epoch // 3),
        decay=decay,
    )
    trainer.contractions = contractions
    if checkpoint is not None:
        trainer.load_state_dict(checkpoint)
    if before:
        model.to(memory_format=torch.contiguous_format)
    else:
        trainer.prepare()
    return trainer


def train(trainer: TrainingLoop, steps: int) -> None:
    """Make this many steps, from any position in an epoch."""
    trainer.begin_epoch()
    for step in range(steps):
        if step and trainer.step % trainer.steps_per_epoch == 0:
            trainer.begin_epoch()
        trainer.next_step()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Programs


def commands(device: torch.device) -> dict[str, list[str]]:
    """A small run of every program on embedded data. "&&" joins commands that depend on each other."""
    small = "--data digits --image-size {} --epochs 2 --save-dir {}"
    compression = f"--network resnet --depth 8 {small}"
    translation = "--embed-dim 64 --ffn-dim 128 --rank-scale 0.5 --spectral --spectral-quekey --spectral-outval --wd2fd \
--wd2fd-quekey --wd2fd-outval --frobenius-decay 1e-4 --optimizer adam --lr 2e-3 --max-tokens 20000 --max-epoch 2 \
--no-epoch-checkpoints"
    made = {
        "resnet_cifar": f"resnet_cifar/train.py --rank-scale 0.111 --spectral --wd2fd {small.format(8, '{run}')}",
        "resnet_cifar, norms": f"resnet_cifar/train.py --rank-scale 0.111 --square --wd2fd --dump-frobnorms \
{small.format(8, '{run}')}",
        "compression train": f"compression_baselines/train.py --target-ratio 0.1 --spectral --wd2fd --densify --measure \
{compression.format(8, '{run}')}",
        "compression prune": f"compression_baselines/train.py {compression.format(8, '{run}/dense')} && \
compression_baselines/prune.py --method eigendamage --pretrained {{run}}/dense/checkpoint.pt --target-ratio 0.3 \
{compression.format(8, '{run}/pruned')}",
        "compression sparse, SET": f"compression_baselines/sparse.py --method set --target-ratio 0.1 \
{compression.format(8, '{run}')}",
        "compression sparse, RigL": f"compression_baselines/sparse.py --method rigl --target-ratio 0.1 \
{compression.format(8, '{run}')}",
        "tensor_wrn": "tensor_wrn/train.py digits teacher --conv TensorTrain_0.5 --wd2fd --wrn-depth 10 --wrn-width 1 \
--epochs 2 --save-dir {run}",
    }
    encoder = "--layers 1 --embed-dim 64 --heads 2 --seq 32 --batch-size 16 --steps 20 --epoch-steps 10 --rank-scale 0.5 \
--spectral-quekey --spectral-outval --wd2fd-quekey --wd2fd-outval --update-freq 2 --save-dir {run}"
    for optimizer in ("lamb", "adamw"):
        made[f"bert_pretraining, {optimizer}"] = f"bert_pretraining/prepare.py --corpus numbers --dest {{run}}/numbers && \
bert_pretraining/train.py {{run}}/numbers --optimizer {optimizer} {encoder}"
    if device.type == "cuda":
        made["transformer_iwslt"] = f"transformer_iwslt/prepare.py --corpus numbers --dest {{run}}/numbers && \
transformer_iwslt/train.py {{run}}/numbers {translation} --save-dir {{run}}"
    return {name: command.split(" && ") for name, command in made.items()}


def run_program(steps: Sequence[str], amp: str, run: Path, device: torch.device) -> str:
    """Run a program's commands. Returns the final score of the last result."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for step in steps:
        words = step.format(run=run).split()
        if "transformer_iwslt/train.py" in words[0]:
            words += [f"--{amp}"] * (amp != "off")
        elif "prepare.py" not in words[0]:
            words += ["--amp", amp, "--device", str(device)]
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{words[0]} ended with status {done.returncode}: {' '.join(done.stderr.split()[-30:])}")
    result = sorted(run.rglob("result.json"))
    if not result:
        return "trained"
    return f"{json.loads(result[-1].read_text())['metrics']['final']:.1f}"


def programs(report: Report) -> None:
    title = "Every program for two epochs of embedded data: final score"
    amps = list(PRECISIONS) if report.device.type == "cuda" else ["off"]
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(os.cpu_count() if report.device.type == "cuda" else 1) as pool,
    ):
        found = {
            (name, amp): pool.submit(run_program, steps, amp, Path(folder) / f"{name}-{amp}".replace(" ", ""), report.device)
            for name, steps in commands(report.device).items()
            for amp in amps
        }
        for name in dict.fromkeys(name for name, _ in found):
            cells = [report.case(f"programs: {name}, {PRECISIONS[amp]}", found[name, amp].result, 200) for amp in amps]
            report.add(title, ["program", *(PRECISIONS[amp] for amp in amps)], [name, *(cell or "failed" for cell in cells)])


# Agreement


def losses(trainer: Trainer, steps: int) -> Tensor:
    """The loss of each step times its batch size."""
    found = []
    for _ in range(steps):
        before = trainer.totals[0].clone()
        train(trainer, 1)
        found.append((trainer.totals[0] - before).cpu())
    return torch.stack(found)


def compare(network: str, amp: str, data: Data, steps: int) -> tuple[str, str]:
    """The largest relative difference of a loss, recorded or not, and the largest difference of a weight, resumed or not.

    The steps cover several epochs, each with a smaller last batch, and changes of the learning rate. cuDNN uses deterministic
    algorithms here, since with others a run does not reproduce itself.
    """
    torch.backends.cudnn.deterministic = True
    whole = make_trainer(network, True, data, amp=amp)
    recorded = losses(whole, steps)
    same: dict[str, Any] = {"amp": amp, "contractions": whole.contractions}
    eager = losses(make_trainer(network, True, data, eager=True, **same), steps)
    difference = ((recorded - eager).abs() / eager.abs()).max().item()
    first = make_trainer(network, True, data, **same)
    train(first, steps // 2)
    second = make_trainer(network, True, data, amp=amp, checkpoint=saved_and_loaded(first.state_dict()))
    train(second, steps - steps // 2)
    pairs = zip(whole.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    largest = max((one - other).abs().max().item() for one, other in pairs)
    torch.backends.cudnn.deterministic = False
    return f"{difference:.1e}", "equal" if largest == 0 else f"{largest:.1e}"


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint after saving and loading."""
    with tempfile.TemporaryFile() as file:
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def agreement(report: Report) -> None:
    cuda = report.device.type == "cuda"
    data, steps = images(report.device, 1000 if cuda else 30), 50 if cuda else 12
    title = f"{steps} recorded steps against the same kernel by kernel, and stopped and resumed against not"
    for network in (RESNET20, TENSOR_TRAIN):
        for amp, words in PRECISIONS.items() if cuda else [("off", "float32")]:
            found = report.case(f"agreement: {network}, {words}", partial(compare, network, amp, data, steps))
            header = ["network", "precision", "largest relative difference of a loss", "weights, resumed against not"]
            report.add(title, header, found and [network, words, *found])


# Steps


def milliseconds(trainer: TrainingLoop, steps: int, turns: int = 5) -> float:
    """Milliseconds per step, as the median over turns, after ten warm-up steps (five on a CPU)."""
    device = trainer.processes.device
    train(trainer, 10 if device.type == "cuda" else 5)
    found = []
    for _ in range(turns):
        wait(device)
        started = time.perf_counter()
        train(trainer, steps)
        wait(device)
        found.append(1e3 * (time.perf_counter() - started) / steps)
    return statistics.median(found)


def kernels(trainer: Trainer) -> int:
    """Kernels, copies and fills that a step launches on the GPU."""
    if trainer.processes.device.type != "cuda":
        return 0
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as found:
        train(trainer, 1)
        wait(trainer.processes.device)
    return sum(event.device_type == DeviceType.CUDA for event in found.events())


def gigabytes(trainer: Trainer) -> float:
    """Gigabytes that the operators of a step read and write, counting each operand once."""
    batch = trainer.data.train_batch(0, 0, 0, trainer.config.batch_size)
    with Traffic() as traffic:
        trainer.train_step(batch)
    return traffic.bytes["all"] / 1e9


def bandwidth(device: torch.device) -> float:
    """Gigabytes per second that a large copy reads and writes."""
    size = 2**30 if device.type == "cuda" else 2**24
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    found = []
    for _ in range(6):
        wait(device)
        started = time.perf_counter()
        for _ in range(5):
            target.copy_(source)
        wait(device)
        found.append(2 * 5 * size / (time.perf_counter() - started) / 1e9)
    return statistics.median(found[1:])


STEP_HEADER = ["network", "kind", "before, ms", "kernel by kernel, ms", "recorded, ms", "times faster than before",
               "times dense", "decay's share", "kernels before", "kernels", "peak memory, MiB",
               "share of bandwidth"]  # fmt: skip


def time_step(network: str, factorized: bool, data: Data, rate: float, dense: dict[str, float]) -> list[str]:
    cuda = data.device.type == "cuda"
    steps = 10 if cuda else 1
    before = make_trainer(network, factorized, data, before=True, amp="bf16" if cuda else "off")
    old = milliseconds(before, steps, 3)
    old_kernels = kernels(before)
    del before
    amp = "bf16" if cuda else "off"
    eager = make_trainer(network, factorized, data, eager=True, amp=amp)
    one_by_one, traffic, new_kernels = milliseconds(eager, steps, 3), gigabytes(eager), kernels(eager)
    del eager
    gc.collect()  # recorded steps hold memory
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_reserved() if cuda else 0
    trainer = make_trainer(network, factorized, data, amp=amp)
    recorded = milliseconds(trainer, 6 * steps)
    peak = (torch.cuda.max_memory_reserved() - held) / 2**20 if cuda else 0
    share = ""
    if factorized:
        plain = milliseconds(make_trainer(network, True, data, amp=amp, decayed=False), 6 * steps)
        share = f"{1 - plain / recorded:.1%}"
    dense.setdefault(network, recorded)
    return [
        network,
        "factorized" if factorized else "dense",
        f"{old:.2f}",
        f"{one_by_one:.2f}",
        f"{recorded:.2f}",
        f"{old / recorded:.1f}",
        f"{recorded / dense[network]:.2f}" if factorized else "",
        share,
        f"{old_kernels:,}",
        f"{new_kernels:,}",
        f"{peak:,.0f}",
        f"{traffic / recorded * 1e3 / rate:.0%}",
    ]


def steps(report: Report) -> None:
    data, dense = images(report.device), dict[str, float]()
    rate = report.case("steps: bandwidth", partial(bandwidth, report.device)) or float("nan")
    precision = "bfloat16" if report.device.type == "cuda" else "float32"
    title = f"A training step in {precision}, batch {BATCH} of 32x32; a large copy moves {rate:,.0f} GB/s"
    for network in TIMED if report.device.type == "cuda" else [RESNET20]:
        for factorized in (False, True):
            name = f"steps: {network}, {'factorized' if factorized else 'dense'}"
            line = report.case(name, partial(time_step, network, factorized, data, rate, dense), 40)
            report.add(title, STEP_HEADER, line)


# Several runs a card


def training_call(device: str, steps: int) -> Call:
    """A call that trains a factorized ResNet20 in this process for ``steps`` steps."""
    torch.set_num_threads(2)
    where = torch.device(device)
    trainer = make_trainer(RESNET20, True, images(where), amp="bf16" if where.type == "cuda" else "off")

    def call() -> None:
        train(trainer, steps)
        wait(where)

    return call


def share_card(report: Report) -> None:
    cuda = report.device.type == "cuda"
    counts, steps, title = ((1, 2, 4, 8) if cuda else (1, 2)), (800 if cuda else 2), f"Several runs of {RESNET20} on one card"
    size = BATCH if cuda else 8

    def measure() -> None:
        with shared_gpus(), ThreadPoolExecutor(max(counts)) as pool:
            service = "CUDA_MPS_PIPE_DIRECTORY" in os.environ
            makers = [pool.submit(IsolatedCall, partial(training_call, str(report.device), steps)) for _ in range(max(counts))]
            calls = [maker.result() for maker in makers]
            for count in counts:
                started = time.perf_counter()
                list(pool.map(lambda call: call(), calls[:count]))
                rate = count * steps * size / (time.perf_counter() - started)
                header = ["runs", "images a second in all", "multi-process service"]
                report.add(title, header, [count, f"{rate:,.0f}", "yes" if service else "no"])
            for call in calls:
                call.close()

    report.case("cards", measure, 120)


# Translation


def translation(report: Report) -> None:
    cuda = report.device.type == "cuda"
    words, updates, title = (10_000, 15, "Translation, target tokens a second, float16") if cuda else (300, 1, "Translation")

    def measure() -> None:
        from fairseq.trainer import Trainer as FairseqTrainer

        from benchmarks import translation as task
        from transformer_iwslt import engine
        from transformer_iwslt.config import TranslationConfig

        engine.load()
        from fairseq import options
        from fairseq.dataclass.utils import convert_namespace_to_omegaconf
        from fairseq.tasks.translation import TranslationTask

        source, target, sample = task.dictionary(words), task.dictionary(words), task.batch(words)
        flags = {"fairseq's transformer": ["data", *task.FAIRSEQ.split()]}
        for name in ("ours, full", "ours, rank scale 0.5, no decay", "ours, rank scale 0.5, decay of all"):
            config = TranslationConfig.parse(["data", "--activation-dropout", "0.1", *task.OURS[name].split()])
            flags[name] = config.fairseq_words(config.data)
        first = 0.0
        for name, command in flags.items():
            precision = ["--fp16", "--fp16-no-flatten-grads"] if cuda else ["--cpu"]
            cfg = convert_namespace_to_omegaconf(engine.parse(options.get_training_parser, [*command, *precision]))
            made = TranslationTask(cfg.task, source, target)
            torch.manual_seed(0)
            trainer = FairseqTrainer(cast(Any, cfg), made, made.build_model(cfg.model), made.build_criterion(cfg.criterion))
            found = []
            for turn in range(4):
                wait(report.device)
                started = time.perf_counter()
                for _ in range(updates):
                    trainer.train_step([sample])
                wait(report.device)
                found.append(updates * sample["ntokens"] / (time.perf_counter() - started) * bool(turn))
            rate = statistics.median(found[1:])
            first = first or rate
            header = ["model", "target tokens a second", "times fairseq's"]
            report.add(title, header, [name, f"{rate:,.0f}", f"{rate / first:.2f}"])

    report.case("translation", measure, 90)


# Pre-training

ENCODERS = {
    "dense": "",
    "heads of half width": "--rank-scale 0.5",
    "heads of half width, both schemes": "--rank-scale 0.5 --spectral-quekey --spectral-outval --wd2fd-quekey --wd2fd-outval",
}


def make_encoder(flags: str, device: torch.device) -> PretrainingLoop:
    """Pre-training on random tokens, ready for its next step."""
    cuda = device.type == "cuda"
    size = "--model base --batch-size 64 --amp bf16" if cuda else "--model tiny --batch-size 4"
    config = PretrainingConfig.parse(["random", *size.split(), "--steps", "1000000", *flags.split()])
    words = 30_000 if cuda else 300
    streams = {split: torch.randint(5, words, (200_000,), dtype=torch.int16) for split in ("train", "valid", "test")}
    numbers = {"seq": config.seq, "predictions": config.predictions, "batch_size": config.batch_size}
    data = PretrainingData(streams, words, **numbers, seed=0, device=device)
    seed_everything(0)
    model = MaskedLanguageModel(EncoderConfig(**config.architecture(words)))
    loop = make_loop(model, data, Run(Path("never written"), {}, 0), config, Processes(device))
    loop.prepare()
    return loop


def time_encoder(name: str, optimizer: str, device: torch.device, dense: dict[str, float]) -> list[str]:
    loops = {way: make_encoder(f"{ENCODERS[name]} --optimizer {optimizer} {flag}", device) for way, flag in
             (("kernel by kernel", "--eager"), ("recorded", ""))}  # fmt: skip
    steps = 10 if device.type == "cuda" else 1
    eager, recorded = (milliseconds(loop, steps) for loop in loops.values())
    dense.setdefault(optimizer, recorded)
    tokens = loops["recorded"].config.batch_size * loops["recorded"].config.seq
    return [
        name,
        optimizer,
        f"{eager:.2f}",
        f"{recorded:.2f}",
        f"{1e3 * tokens / recorded:,.0f}",
        f"{dense[optimizer] / recorded:.2f}",
    ]


def pretraining(report: Report) -> None:
    dense: dict[str, float] = {}
    for optimizer in ("lamb", "adamw"):
        for name in ENCODERS:
            line = report.case(
                f"pretraining: {name}, {optimizer}", partial(time_encoder, name, optimizer, report.device, dense)
            )
            header = ["encoder", "optimizer", "kernel by kernel, ms", "recorded, ms", "tokens a second", "times dense"]
            report.add("A step of pre-training, sequences of 128: BERT-base in bfloat16, 64 sequences", header, line)


# Compiled


def time_compiled(network: str, factorized: bool, data: Data) -> list[str]:
    amp = "bf16" if data.device.type == "cuda" else "off"
    started = time.perf_counter()
    trainer = make_trainer(network, factorized, data, amp=amp, compile=True)
    train(trainer, 5)
    wait(data.device)
    first = time.perf_counter() - started
    found = milliseconds(trainer, 60 if data.device.type == "cuda" else 1)
    return [network, "factorized" if factorized else "dense", f"{found:.2f}", f"{first:.0f}", f"{kernels(trainer):,}"]


def compiled(report: Report) -> None:
    data = images(report.device)
    for network in COMPILED if report.device.type == "cuda" else [RESNET20]:
        for factorized in (True, False):
            line = report.case(f"compile: {network}", partial(time_compiled, network, factorized, data), 150)
            header = ["network", "kind", "compiled and recorded, ms", "seconds until the fifth step", "kernels"]
            report.add("A step of a compiled network, recorded", header, line)


PARTS: dict[str, Callable[[Report], None]] = {
    "programs": programs,
    "agreement": agreement,
    "steps": steps,
    "cards": share_card,
    "translation": translation,
    "pretraining": pretraining,
    "compile": compiled,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"parts to run: {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, help="start no case after this many minutes (default: no limit)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for gpu.md and gpu.json")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N, or cpu for a dry run")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU on this machine: --device cpu tests the command without one")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    report = Report(device, args.out, args.minutes)
    for part in args.only or [name for name in PARTS if name != "compile"]:
        PARTS[part](report)
    print(report.markdown())


if __name__ == "__main__":
    main()

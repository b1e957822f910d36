"""What only a GPU can show: that a step is recorded, is the same training, and waits for nothing."""

import pytest
import torch

from benchmarks import gpu
from common.experiments import training as loop
from common.vision import training
from compression_baselines import sparse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")]


@pytest.fixture(scope="module")
def data():
    return gpu.images(torch.device("cuda"))


@pytest.mark.parametrize("amp", gpu.PRECISIONS)
@pytest.mark.parametrize("network", [gpu.RESNET20, gpu.TENSOR_TRAIN])
def test_recorded_steps_are_the_steps_and_a_resumed_run_the_uninterrupted_one(network, amp):
    difference, resumed = gpu.compare(network, amp, gpu.images(torch.device("cuda"), 1000), 30)
    assert float(difference) <= {"off": 1e-3, "fp16": 2e-2, "bf16": 5e-2}[amp]
    assert resumed == "equal"


@pytest.mark.parametrize("factorized", [False, True])
@pytest.mark.parametrize("amp", gpu.PRECISIONS)
def test_a_step_waits_for_nothing(amp, factorized, data):
    trainer = gpu.make_trainer(gpu.RESNET20, factorized, data, amp=amp)
    gpu.train(trainer, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._recorded_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_recording_serves_epochs_and_the_smaller_last_batch(data):
    trainer = gpu.make_trainer(gpu.RESNET20, True, data)
    gpu.train(trainer, trainer.steps_per_epoch + 20)
    assert trainer._graph.recordings == 1
    assert trainer.totals[2].item() == 20 * gpu.BATCH + len(data)  # nobody evaluates and forgets the first epoch's here


def test_what_moves_is_recorded_anew(data):
    trainer = gpu.make_trainer(gpu.RESNET20, True, data)
    gpu.train(trainer, 8)
    with torch.no_grad():
        trainer.model.linear.weight.data = trainer.model.linear.weight.clone()
        before = trainer.model.linear.weight.clone()
    gpu.train(trainer, 8)
    assert trainer._graph.recordings == 2
    assert not torch.equal(trainer.model.linear.weight, before)


@pytest.mark.parametrize("amp", ["fp16", "bf16"])
def test_a_loss_that_waits_runs_kernel_by_kernel(amp, data, capsys):
    trainer = gpu.make_trainer(gpu.RESNET20, True, data, amp=amp)
    inner = trainer.loss

    def loss(network, batch):
        found = inner(network, batch)
        found[0].item()
        return found

    trainer.loss = loss
    gpu.train(trainer, 12)
    torch.cuda.synchronize()
    assert trainer._graph is None
    assert capsys.readouterr().err.count("run kernel by kernel") == 1
    assert trainer.totals[0].isfinite()
    assert trainer.totals[2].item() == 12 * gpu.BATCH


def test_measured_contractions_are_kept_and_reused(data, monkeypatch):
    first = gpu.make_trainer(gpu.RESNET20, True, data)
    assert set(first.contractions.values()) <= {"thin", "composed"}
    assert len(first.contractions) == 18
    flipped = {name: {"thin": "composed", "composed": "thin"}[choice] for name, choice in first.contractions.items()}
    state = gpu.saved_and_loaded(first.state_dict()) | {"contractions": flipped}
    monkeypatch.setattr(training, "measure_contractions", lambda *args, **options: pytest.fail("measured again"))
    second = gpu.make_trainer(gpu.RESNET20, True, data, checkpoint=state)
    assert second.model.layer1[0].conv1.contraction == flipped["layer1.0.conv1"]


def test_masked_networks_are_recorded(tmp_path, monkeypatch):
    graphs = []
    made = loop.StepGraph
    monkeypatch.setattr(loop, "StepGraph", lambda *args, **options: graphs.append(made(*args, **options)) or graphs[-1])
    flags = "--network resnet --depth 8 --data digits --image-size 8 --epochs 2 --method set --target-ratio 0.1 --device cuda"
    sparse.main([*flags.split(), "--save-dir", str(tmp_path / "run")])
    assert [graph.recordings for graph in graphs] == [1]

"""Data sets and batches: contents, distribution, purity, and refusals."""

import hashlib
import http.server
import pickle
import shutil
import struct
import tarfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from common.experiments.files import digest
from common.vision import data as data_module
from common.vision.data import IMAGENET, Data, load


def pictures(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % 10


def make_data(count=50, size=32, **options):
    return Data(pictures(count, size), pictures(20, size, seed=1), 10, **options)


def test_digits():
    digits = load("digits", None)
    assert len(digits) == 1437
    assert len(digits.test_labels) == 360
    assert digits.image_size == 8
    assert not digits.flip
    (batch,) = digits.test_batches(1000)
    assert batch.images.shape == (360, 3, 8, 8)
    assert torch.bincount(batch.labels).min() > 30


def test_digits_padded_keep_their_pixels():
    small, large = load("digits", None), load("digits", None, image_size=32)
    assert torch.equal(large.test_images[:, 12:20, 12:20], small.test_images)
    assert large.test_images.sum() == small.test_images.sum()


def test_test_batches_equal_torchvisions_transforms():
    data = make_data()
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET)])
    expected = torch.stack([transform(image) for image in pictures(20, 32, seed=1)[0]])
    batches = list(data.test_batches(8))
    assert [len(batch.labels) for batch in batches] == [8, 8, 4]
    torch.testing.assert_close(torch.cat([batch.images for batch in batches]), expected, rtol=0, atol=1e-5)


def test_training_images_are_the_crops_and_flips_that_the_plan_says():
    """Every augmented image equals torchvision's pad, crop, flip and normalize with the same numbers."""
    data = make_data()
    batch = data.train_batch(3, 5, 1, 16)
    order, augmentation = data._plan(3, 5)
    for image, label, index in zip(batch.images, batch.labels, order[16:32].tolist(), strict=True):
        top, left, flip, *_ = augmentation[index].tolist()
        source, source_label = (part[index] for part in pictures(50, 32))
        expected = v2.functional.crop(v2.functional.pad(source, [4] * 4), top, left, 32, 32)
        expected = v2.functional.hflip(expected) if flip else expected
        expected = v2.functional.normalize(expected / 255, *IMAGENET)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
        assert label == source_label


def test_crops_and_flips_are_uniform_and_differ_between_images():
    data = make_data(count=9000, size=8)
    _, augmentation = data._plan(0, 0)
    for column, values in ((0, 3), (1, 3), (2, 2)):
        counts = torch.bincount(augmentation[:, column], minlength=values)
        assert len(counts) == values
        assert (counts / 9000 - 1 / values).abs().max() < 0.02
    assert make_data(size=8, flip=False)._plan(0, 0)[1][:, 2].sum() == 0


def test_a_batch_is_a_pure_function_of_seed_epoch_and_step():
    first, second = make_data(), make_data()
    second.train_batch(9, 9, 0, 7)  # what was asked for before does not matter
    torch.rand(3)
    assert torch.equal(first.train_batch(1, 2, 3, 10).images, second.train_batch(1, 2, 3, 10).images)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 2)):
        assert not torch.equal(first.train_batch(1, 2, 3, 10).images, second.train_batch(*other, 10).images)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_covers_the_samples_and_processes_share_each_batch(world_size):
    data = make_data(count=50)
    steps = data.steps_per_epoch(16, world_size)
    assert steps == (4 if world_size < 3 else 3)
    order, _ = data._plan(0, 0)
    for step in range(steps):
        parts = [data.train_batch(0, 0, step, 16, rank=rank, world_size=world_size).labels for rank in range(world_size)]
        assert len({len(part) for part in parts}) == 1
        labels = data.train_labels[order[step * 16 : step * 16 + 16]]
        assert torch.equal(torch.cat(parts), labels[: len(labels) // world_size * world_size])


def test_processes_share_the_test_split():
    data = make_data()
    counts = [sum(len(batch.labels) for batch in data.test_batches(8, rank=rank, world_size=3)) for rank in range(3)]
    assert sum(counts) == 20


def test_image_folder(image_folder):
    data = load("imagefolder", image_folder)
    assert (len(data), len(data.test_labels), data.classes, data.image_size) == (24, 12, 3, 16)
    first = np.asarray(Image.open(image_folder / "val" / "ant" / "0.png"))
    assert np.array_equal(data.test_images[0].numpy(), first)
    assert load("imagefolder", image_folder, image_size=20).image_size == 20


def test_bad_image_folders_name_what_is_wrong(image_folder):
    with pytest.raises(ValueError, match="must hold the folders train/ and test/"):
        load("imagefolder", image_folder / "train")
    Image.new("RGB", (12, 16)).save(image_folder / "train" / "bee" / "odd.png")
    with pytest.raises(ValueError, match=r"bee/odd.png is 12x16 pixels, but others are 16x16: give --image-size"):
        load("imagefolder", image_folder)
    (image_folder / "train" / "bee" / "odd.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"bee/odd.png cannot be decoded as an image"):
        load("imagefolder", image_folder)
    (image_folder / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"train/dog has no image: each folder of .*train is a class and needs at least one"):
        load("imagefolder", image_folder)
    Image.new("RGB", (16, 16)).save(image_folder / "train" / "dog" / "0.png")
    with pytest.raises(ValueError, match="'dog' is in only one of them"):
        load("imagefolder", image_folder)


def test_grays_of_16_bits_are_scaled_and_numbers_of_no_range_refused(image_folder):
    """A ramp over all of 16 bits is the ramp of 8 bits, in each format that has such pixels."""
    ramp = np.arange(256).reshape(16, 16)
    deep = (ramp * 257).astype(np.uint16)
    ant = image_folder / "val" / "ant"
    Image.fromarray(deep).save(ant / "0.png")
    Image.fromarray(deep).save(ant / "1.tif")
    (ant / "2.pgm").write_bytes(b"P5 16 16 65535\n" + deep.astype(">u2").tobytes())
    (ant / "1.png").unlink()
    (ant / "2.png").unlink()
    data = load("imagefolder", image_folder)
    for image in data.test_images[:3].numpy():
        assert np.array_equal(image, np.repeat(ramp[..., None], 3, axis=2))
    for pixels, words in ((ramp / 255, "floating-point numbers"), (ramp * 2**20, "32-bit integers")):
        Image.fromarray(pixels.astype(np.float32 if words.startswith("f") else np.int32)).save(ant / "1.tif")
        with pytest.raises(ValueError, match=rf"ant/1.tif holds {words}, whose range is unknown: convert it to 8 or 16"):
            load("imagefolder", image_folder)


def test_hidden_files_and_folders_are_no_images_and_no_classes(image_folder):
    expected, before = load("imagefolder", image_folder), digest(image_folder / "train")
    for folder in (image_folder / "train", image_folder / "train" / "ant", image_folder / "val"):
        (folder / ".DS_Store").write_bytes(b"\0")
        (folder / "._0.png").write_bytes(b"\0")
        (folder / ".thumbnails").mkdir()
        (folder / ".thumbnails" / "0.png").write_bytes(b"\0")
    (image_folder / "train" / "ant" / "boxes.txt").write_text("0 0 1 1")
    data = load("imagefolder", image_folder)
    assert torch.equal(data.train_images, expected.train_images)
    assert torch.equal(data.train_labels, expected.train_labels)
    assert data.classes == 3
    assert digest(image_folder / "train") == before


def test_the_digest_of_a_folder_of_images_stays(tmp_path):
    """Unfinished runs hold it, and resume where it is the same."""
    for name in ("a/1.png", "b/2.JPEG", "b/c/3.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    (tmp_path / "d").symlink_to(tmp_path / "b")
    assert digest(tmp_path) == "c1b50b7e4ae7"
    (tmp_path / "a" / "4.png").write_bytes(b"")
    assert digest(tmp_path) != "c1b50b7e4ae7"


def test_images_come_in_torchvisions_order(tmp_path):
    """A seed draws its batches from it."""
    for folder in ("train/a", "train/a-b", "train/B", "train/a/x", "train/a/x-y", "train/a/x/y"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name in ("1.png", "10.png", "2.JPG", "b.png", "B.png"):
            (tmp_path / folder / name).write_bytes(b"")
    theirs = [path for path, _ in torchvision.datasets.ImageFolder(str(tmp_path / "train")).samples]
    ours = [str(path) for images in data_module._find_images(tmp_path / "train").values() for path in images]
    assert ours == theirs


def test_an_image_that_declares_too_many_pixels_is_named(image_folder):
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    (image_folder / "train" / "bee" / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    with pytest.raises(ValueError, match=r"bee/huge.png cannot be decoded as an image: .*900000000 pixels"):
        load("imagefolder", image_folder)


def test_cifar_without_network_says_how_to_get_it(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", refuse)
    for name, folder in (("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")):
        with pytest.raises(OSError, match=rf"{name} is missing .*no route to host.* unpack http.* so that .*{folder} exists"):
            load(name, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".cifar10.lock", ".cifar100.lock"}


def test_truncated_cifar_names_the_file(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"short")
    with pytest.raises(ValueError, match="data_batch_1 is truncated or damaged: delete"):
        load("cifar10", tmp_path)


@pytest.fixture
def small_cifar100(tmp_path, monkeypatch):
    """A folder with a miniature of the Python version of CIFAR-100, with checksums of its own, and its images."""
    folder = tmp_path / "made" / "cifar-100-python"
    folder.mkdir(parents=True)
    pixels = np.arange(5 * 3072, dtype=np.uint64).reshape(5, 3072).astype(np.uint8)
    contents = {
        "train": {"data": pixels, "fine_labels": [0, 1, 2, 3, 99]},
        "test": {"data": pixels[:2], "fine_labels": [7, 8]},
        "meta": {"fine_label_names": [str(i) for i in range(100)]},
    }
    md5 = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    kind = torchvision.datasets.CIFAR100
    monkeypatch.setattr(kind, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(kind, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5["meta"]})
    return folder.parent, pixels


def test_real_cifar_files_are_read(small_cifar100):
    folder, pixels = small_cifar100
    data = load("cifar100", folder)
    assert (len(data), data.classes, data.test_labels.tolist()) == (5, 100, [7, 8])
    assert torch.equal(data.test_images[1].permute(2, 0, 1).flatten(), torch.from_numpy(pixels[1]))


@pytest.mark.parametrize("given", [False, True])
def test_processes_that_need_cifar_at_once_download_it_once(small_cifar100, tmp_path, monkeypatch, given):
    """With the archive ``given`` already, nothing is downloaded."""
    kind, data_dir = torchvision.datasets.CIFAR100, tmp_path / "data"
    monkeypatch.setattr(data_module, "downloading", lambda *words: nullcontext())  # it is for processes, not for threads
    archive = tmp_path / "served" / kind.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(small_cifar100[0] / "cifar-100-python", "cifar-100-python")
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            time.sleep(0.2)
            super().do_GET()

        def log_message(self, *args):
            pass

    if given:
        data_dir.mkdir()
        shutil.copy(archive, data_dir)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=archive.parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(kind, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        load("cifar100", tmp_path / "alone")
        alone = len(requests)  # torchvision asks for the address first
        with ThreadPoolExecutor(4) as pool:
            loaded = list(pool.map(lambda _: load("cifar100", data_dir), range(4)))
        server.shutdown()
    assert [len(data) for data in loaded] == [5] * 4
    assert len(requests) == (1 if given else 2) * alone
    assert {path.name for path in data_dir.iterdir()} == {"cifar-100-python", kind.filename, ".cifar100.lock"}


def test_fashion_mnist_from_debians_package(tmp_path, monkeypatch):
    import gzip

    source = tmp_path / "debian"
    source.mkdir()
    for split, count in (("train", 60_000), ("t10k", 10_000)):
        images = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28)) + bytes(count * 784)
        labels = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big") + bytes(index % 10 for index in range(count))
        for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
            (source / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(content, 1))
    monkeypatch.setattr(data_module, "_DEBIAN_FASHION_MNIST", source)
    data = load("fashion_mnist", tmp_path / "data")
    assert (len(data), len(data.test_labels), data.image_size, data.classes) == (60_000, 10_000, 32, 10)
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    (raw / "t10k-images-idx3-ubyte").write_bytes(b"short")
    with pytest.raises(ValueError, match="are damaged: delete that folder"):
        load("fashion_mnist", tmp_path / "data")


def test_cifar_jpeg_is_real_data(cifar_jpeg):
    data = load("imagefolder", cifar_jpeg)
    assert (len(data), len(data.test_labels), data.classes, data.image_size) == (1000, 200, 10, 32)

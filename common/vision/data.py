"""Image data sets as uint8 tensors, and batches of them that are pure functions of seed, epoch, step and sample.

torchvision is imported only where it is used: it takes as long to load as torch, and the embedded digits do not need it.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..experiments.downloads import downloading, one_at_a_time
from ..experiments.files import IMAGES, images_in
from . import tiny_imagenet
from .config import DATASETS

# Mean and standard deviation of each channel, for pixels in [0, 1], as in the released code.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_FASHION_MNIST_FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
Split = tuple[Tensor, Tensor]  # images (N, 3, H, W) uint8, labels (N) int64


@dataclass(frozen=True)
class Batch:
    images: Tensor  # (B, 3, H, W) float32, normalized, channels last
    labels: Tensor  # (B) int64


class Data:
    """A training and a test split on one device.

    Each training image gets a random crop after zero padding (by ``padding`` pixels; None: an eighth of the image size), a
    random horizontal flip if ``flip``, and normalization. The distribution is that of torchvision's RandomCrop,
    RandomHorizontalFlip, ToTensor and Normalize. Cutout (DeVries & Taylor 2017) then sets a square around a random pixel to
    zero. Its side is ``cutout`` pixels (None: half the image size); parts outside the image are cut off.
    """

    def __init__(
        self,
        train: Split,
        test: Split,
        classes: int,
        *,
        flip: bool = True,
        padding: int | None = None,
        cutout: int | None = 0,
        normalization: Normalization = IMAGENET,
        device: torch.device | str = "cpu",
    ) -> None:
        self.classes, self.flip, self.device = classes, flip, torch.device(device)
        self.image_size = train[0].shape[-1]
        self.padding = self.image_size // 8 if padding is None else padding
        self.cutout = self.image_size // 2 if cutout is None else cutout
        # Rows of pixels are stored channels last, so that a crop copies whole pixels.
        padded = F.pad(train[0], (self.padding,) * 4)
        self.train_images = padded.permute(0, 2, 3, 1).contiguous().to(self.device)
        self.test_images = test[0].permute(0, 2, 3, 1).contiguous().to(self.device)
        self.train_labels, self.test_labels = train[1].to(self.device), test[1].to(self.device)
        mean, std = (torch.tensor(values, device=self.device) for values in normalization)
        self._scale, self._shift = 1 / (255 * std), -mean / std
        self._pixels = torch.arange(self.image_size, device=self.device)
        self._epoch: tuple[tuple[int, int], Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.train_labels)

    def steps_per_epoch(self, batch_size: int, world_size: int = 1) -> int:
        """Batches in an epoch. The last may be smaller; in parallel it drops the samples that do not divide among processes."""
        full, rest = divmod(len(self), batch_size)
        return full + (rest >= world_size)

    def _plan(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Order of the samples (N), and for each (N, 5): row and column of the crop, flip, row and column of the cutout."""
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
            generator = torch.Generator().manual_seed(mixed)
            order = torch.randperm(len(self), generator=generator)
            crops = torch.randint(0, 2 * self.padding + 1, (len(self), 2), generator=generator)
            flips = torch.randint(0, 2, (len(self), 1), generator=generator) * int(self.flip)
            holes = torch.randint(0, self.image_size, (len(self), 2), generator=generator)
            self._epoch = (seed, epoch), order.to(self.device), torch.cat([crops, flips, holes], 1).to(self.device)
        return self._epoch[1], self._epoch[2]

    def train_batch(self, seed: int, epoch: int, step: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Batch:
        """Batch number ``step`` of an epoch or, in parallel, the part of it that process ``rank`` trains on."""
        order, augmentation = self._plan(seed, epoch)
        index = order[step * batch_size : (step + 1) * batch_size]
        share = len(index) // world_size
        return self.batch(index[rank * share : (rank + 1) * share], augmentation)

    def batch(self, index: Tensor, augmentation: Tensor) -> Batch:
        """The training samples at the indices (B), augmented as their rows of ``augmentation`` (N, 5) specify."""
        top, left, flip, *hole = augmentation[index].unbind(1)
        rows = top[:, None] + self._pixels
        columns = left[:, None] + torch.where(flip[:, None] == 1, self._pixels.flip(0), self._pixels)
        pixels = self.train_images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        images = self._normalize(pixels)
        if self.cutout:
            outside = [self._outside(center) for center in hole]
            images *= (outside[0][:, :, None] | outside[1][:, None, :])[:, None]
        return Batch(images, self.train_labels[index])

    def feed(self, seed: int, batch_size: int) -> Feed:
        """Batches for a CUDA graph: their order and augmentation are tensors at fixed addresses."""
        return Feed(self, seed, batch_size)

    def _outside(self, center: Tensor) -> Tensor:
        """Which pixels (B, size) along one side are outside each image's cutout."""
        start = center[:, None] - self.cutout // 2
        return (self._pixels < start) | (self._pixels >= start + self.cutout)

    def test_batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """The test split in order, in batches; in parallel, every ``world_size``-th sample."""
        images, labels = self.test_images[rank::world_size], self.test_labels[rank::world_size]
        for start in range(0, len(labels), batch_size):
            stop = start + batch_size
            yield Batch(self._normalize(images[start:stop]), labels[start:stop])

    def _normalize(self, pixels: Tensor) -> Tensor:
        return pixels.float().mul_(self._scale).add_(self._shift).permute(0, 3, 1, 2)


class Feed:
    """Full batches of one epoch after another. Order, augmentation and position are tensors at fixed addresses.

    :meth:`next` returns the batches of :meth:`Data.train_batch`, and can be part of a CUDA graph.
    """

    def __init__(self, data: Data, seed: int, batch_size: int) -> None:
        self.data, self.seed, self.batch_size = data, seed, batch_size
        self.order = torch.empty(len(data), dtype=torch.int64, device=data.device)
        self.augmentation = torch.empty(len(data), 5, dtype=torch.int64, device=data.device)
        self.place = torch.zeros((), dtype=torch.int64, device=data.device)  # where the next batch begins in the order
        self._within = torch.arange(batch_size, device=data.device)

    def start(self, step: int) -> None:
        """Move to a step of the run, and load the order and augmentation of its epoch."""
        epoch, step = divmod(step, self.data.steps_per_epoch(self.batch_size))
        order, augmentation = self.data._plan(self.seed, epoch)
        self.order.copy_(order)
        self.augmentation.copy_(augmentation)
        self.place.fill_(step * self.batch_size)

    def next(self) -> Batch:
        """The next batch."""
        index = self.order[self.place + self._within]
        self.place += self.batch_size
        return self.data.batch(index, self.augmentation)


def load(
    name: str,
    data_dir: Path,
    *,
    image_size: int | None = None,
    workers: int = 4,
    cutout: int | None = 0,
    normalization: Normalization = IMAGENET,
    device: torch.device | str = "cpu",
) -> Data:
    """Load a data set of :data:`DATASETS`. Downloads CIFAR, Fashion-MNIST and TinyImageNet if they are missing.

    Raises ValueError or OSError if data are missing or damaged; the message names them and says how to get them.
    """
    if name == "imagefolder":
        train, test, classes = _image_folder(data_dir, ("test", "val"), image_size, workers)
        return Data(train, test, classes, cutout=cutout, normalization=normalization, device=device)
    if name == "tiny_imagenet":
        train, test, classes = _image_folder(tiny_imagenet.prepare(data_dir), ("val",), image_size or 64, workers)
        return Data(train, test, classes, cutout=cutout, normalization=normalization, padding=4, device=device)
    classes, native = DATASETS[name]
    assert classes is not None
    readers = {"digits": _digits, "fashion_mnist": partial(_fashion_mnist, data_dir)}
    train, test = readers.get(name, partial(_cifar, name, data_dir))()
    size = image_size or native
    train, test = _zero_pad(train, size), _zero_pad(test, size)
    return Data(train, test, classes, flip=name != "digits", cutout=cutout, normalization=normalization, device=device)


def _zero_pad(split: Split, size: int | None) -> Split:
    images, labels = split
    missing = (size or images.shape[-1]) - images.shape[-1]
    if missing < 0:
        raise ValueError(f"image size {size} is less than the {images.shape[-1]} pixels of the images")
    return F.pad(images, (missing // 2, missing - missing // 2) * 2), labels


def _digits() -> tuple[Split, Split]:
    """scikit-learn's 1,797 digits of 8x8 pixels and 17 gray levels; the last 360, by other writers, are the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8)[:, None].repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target).long()
    return (images[:-360], labels[:-360]), (images[-360:], labels[-360:])


def _cifar(name: str, data_dir: Path) -> tuple[Split, Split]:
    import torchvision

    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    folder = data_dir / kind.base_folder
    if not folder.exists():
        with (
            downloading(name, f"unpack {kind.url} (MD5 {kind.tgz_md5}) in {data_dir}, so that {folder} exists"),
            one_at_a_time(data_dir, name),
        ):
            if not folder.exists():  # another process may have made it meanwhile
                _download_cifar(kind, data_dir)
    for file, md5 in kind.train_list + kind.test_list + [[kind.meta["filename"], kind.meta["md5"]]]:
        if not torchvision.datasets.utils.check_integrity(str(folder / file), md5):
            state = "is truncated or damaged" if (folder / file).exists() else "is missing"
            raise ValueError(f"{folder / file} {state}: delete {folder} and run again to download {name}")
    train, test = (kind(str(data_dir), train=train) for train in (True, False))
    return _from_arrays(train), _from_arrays(test)


def _download_cifar(kind: Any, data_dir: Path) -> None:
    """Download the archive, unless it is there, and unpack it. The folder appears only when it is complete."""
    from torchvision.datasets.utils import download_url, extract_archive

    download_url(kind.url, str(data_dir), kind.filename, kind.tgz_md5)
    with tempfile.TemporaryDirectory(prefix=f".{kind.base_folder}-", dir=data_dir) as partial:
        extract_archive(str(data_dir / kind.filename), partial)
        os.rename(Path(partial) / kind.base_folder, data_dir / kind.base_folder)


def _from_arrays(split: Any) -> Split:
    return torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)


def _fashion_mnist(data_dir: Path) -> tuple[Split, Split]:
    from torchvision.datasets import FashionMNIST

    raw = data_dir / "FashionMNIST" / "raw"
    if any(not (raw / name).exists() for name in _FASHION_MNIST_FILES):
        where = (
            f"install Debian's dataset-fashion-mnist, or unpack {', '.join(_FASHION_MNIST_FILES)} from "
            f"{FashionMNIST.mirrors[-1]} in {raw}"
        )
        with downloading("fashion_mnist", where), one_at_a_time(data_dir, "fashion_mnist"):
            missing = [name for name in _FASHION_MNIST_FILES if not (raw / name).exists()]
            if missing and _DEBIAN_FASHION_MNIST.is_dir():
                raw.mkdir(parents=True, exist_ok=True)
                for name in missing:
                    with gzip.open(_DEBIAN_FASHION_MNIST / f"{name}.gz") as packed, open(raw / f".{name}", "wb") as unpacked:
                        shutil.copyfileobj(packed, unpacked)
                    (raw / f".{name}").rename(raw / name)
            elif missing:
                FashionMNIST(str(data_dir), download=True)
    splits = []
    for train, count in ((True, 60_000), (False, 10_000)):
        try:
            split = FashionMNIST(str(data_dir), train=train)
        except (ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f"the Fashion-MNIST files in {raw} are damaged: delete that folder and run again") from error
        if len(split.data) != count or len(split.targets) != count:
            raise ValueError(
                f"the Fashion-MNIST files in {raw} hold {len(split.data)} images, expected {count}: delete them and run again"
            )
        splits.append(_zero_pad((split.data[:, None].repeat(1, 3, 1, 1), split.targets), 32))
    return splits[0], splits[1]


def _image_folder(root: Path, test_names: Sequence[str], image_size: int | None, workers: int) -> tuple[Split, Split, int]:
    """Decode the images of root/train/<class>/ and of the first existing test folder; resize them if a size is given."""
    test_root = next((root / name for name in test_names if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_root is None:
        raise ValueError(f"--data-dir {root} must hold the folders train/ and test/ (or val/), each with one folder per class")
    train, test = _find_images(root / "train"), _find_images(test_root)
    for odd in sorted(set(train) ^ set(test)):
        raise ValueError(f"{root / 'train'} and {test_root} differ in their classes: {odd!r} is in only one of them")
    if image_size is None:
        first = train[min(train)][0]
        width, height = _read(first).size
        if width != height:
            raise ValueError(f"{first} is {width}x{height} pixels, not square: give --image-size N to resize every image")
    decode = partial(_decode, size=image_size or width, resize=image_size is not None)
    splits = []
    for found in (train, test):
        paths = [path for images in found.values() for path in images]
        labels = [label for label, images in enumerate(found.values()) for _ in images]
        with ThreadPoolExecutor(workers) as pool:
            progress = tqdm(pool.map(decode, paths), total=len(paths), desc="decoding", unit="image", leave=False, disable=None)
            pixels = torch.from_numpy(np.stack(list(progress))).permute(0, 3, 1, 2)
        splits.append((pixels, torch.tensor(labels)))
    return splits[0], splits[1], len(train)


def _find_images(split: Path) -> dict[str, list[Path]]:
    """The images of each class. A class is a folder of ``split``; hidden files and folders are ignored.

    Raises ValueError if there is no class, or a class has no image.
    """
    found = {}
    for folder in sorted(path for path in split.iterdir() if path.is_dir() and not path.name.startswith(".")):
        # Folder by folder, in torchvision's order: in any other order, a seed would give other batches.
        images = sorted(images_in(folder), key=lambda path: (str(folder / path.parent), path.name))
        if not images:
            raise ValueError(
                f"{folder} has no image: each folder of {split} is a class and needs at least one ({', '.join(IMAGES)})"
            )
        found[folder.name] = [folder / path for path in images]
    if not found:
        raise ValueError(f"{split} has no folder: it must have one folder per class, with that class's images")
    return found


def _read(path: Path) -> Image.Image:
    """An image file, decoded in its own pixel format. Raises ValueError, naming the file, if Pillow cannot read it."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as error:  # its type depends on the format and the damage
        raise ValueError(f"{path} cannot be decoded as an image: {error}") from error


def _to_rgb(path: Path) -> Image.Image:
    """An image file in 8-bit RGB. 16-bit gray levels are scaled to 8 bits, because Pillow would clip them at 255.

    Raises ValueError if the range of the pixel values is unknown.
    """
    image = _read(path)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # 16 bits in these formats
        gray = np.asarray(image).astype(np.int64)
        return Image.fromarray(((gray + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"{path} holds {kind}, whose range is unknown: convert it to 8 or 16 bits per channel")
    return image.convert("RGB")


def _decode(path: Path, *, size: int, resize: bool) -> np.ndarray:
    """Pixels (size, size, 3) of an image file, uint8."""
    rgb = _to_rgb(path)
    if rgb.size != (size, size):
        if not resize:
            raise ValueError(f"{path} is {rgb.size[0]}x{rgb.size[1]} pixels, but others are {size}x{size}: give --image-size N")
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(rgb)

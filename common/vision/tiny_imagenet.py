"""TinyImageNet: download, sort the validation images by class, check: python -m common.vision.tiny_imagenet [--data-dir DIR].

The archive has all validation images in one folder, and their classes in val_annotations.txt. A loader that used this folder
unchanged would measure an accuracy at chance level. This module therefore copies the images to val/<class>/images/ and replaces
the original folder when the copy is complete. The archive's test/ has no labels and is not read.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

from ..experiments.config import FlagParser, exit_on_sigterm, say_interrupted
from ..experiments.downloads import downloading, one_at_a_time
from ..experiments.files import ROOT, images_in
from ..experiments.runs import clean_errors

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
CLASSES, TRAIN, VAL = 200, 500, 50  # number of classes, and of images per class in each split
FOLDER = "tiny-imagenet-200"


def find(data_dir: Path) -> Path | None:
    """The folder of the data set, under the archive's name or the released code's; None if there is none."""
    return next((data_dir / name for name in (FOLDER, "tiny_imagenet") if (data_dir / name / "train").is_dir()), None)


def sort_val(root: Path) -> None:
    """Sort val/ by class according to val_annotations.txt, unless it is sorted. Raises ValueError, naming what is missing.

    The sorted folder is complete before it replaces the original. If an earlier call was interrupted between the two
    renames, the original is restored first. Concurrent processes wait for each other. A sorted folder is never written to.
    """
    val, unsorted, partial = root / "val", root / ".val.unsorted", root / ".val.partial"
    if val.is_dir() and not (val / "images").is_dir():
        return
    if not os.access(root, os.W_OK):
        raise ValueError(f"{val} is not sorted by class, and {root} is not writable: copy it to another --data-dir")
    with open(root / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if unsorted.is_dir() and not val.is_dir():
            os.rename(unsorted, val)
        if not (val / "images").is_dir():
            return
        annotations = val / "val_annotations.txt"
        if not annotations.exists():
            raise ValueError(f"{val} is not sorted by class and {annotations} is missing: unpack {URL} again")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            missing = {str(path) for path in images_in(val / "images")}
            for number, line in enumerate(annotations.read_text().splitlines(), 1):
                name, _, rest = line.partition("\t")
                label = rest.partition("\t")[0]
                if not (name and label):
                    raise ValueError(f"{annotations} does not name an image and a class in line {number}: unpack {URL} again")
                source, target = val / "images" / name, partial / label / "images" / name
                if not source.exists():
                    raise ValueError(f"{source} is listed in {annotations.name} but missing: unpack {URL} again")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
                missing.discard(name)
            if missing:
                raise ValueError(f"{annotations} does not list {sorted(missing)[0]}: unpack {URL} again")
            shutil.copy2(annotations, partial / annotations.name)
            os.rename(val, unsorted)
            os.rename(partial, val)
            shutil.rmtree(unsorted)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _counts(split: Path) -> Counter[str]:
    """Number of images of each class of a split."""
    return Counter(
        {
            folder.name: len(images_in(folder))
            for folder in split.iterdir()
            if folder.is_dir() and not folder.name.startswith(".")
        }
    )


def check(root: Path, *, complete: bool) -> None:
    """Raise ValueError unless both splits have the same classes, and all classes of a split equally many images.

    With ``complete``, also require 200 classes of 500 training and 50 validation images; otherwise only warn on stderr.
    """
    listed = set((root / "wnids.txt").read_text().split()) if (root / "wnids.txt").exists() else None
    for split, expected in (("train", TRAIN), ("val", VAL)):
        counts = _counts(root / split)
        if not counts:
            raise ValueError(f"{root / split} has no class folder: unpack {URL} again")
        if not complete and (len(counts), max(counts.values())) != (CLASSES, expected):
            sizes = f"{len(counts)} classes of {max(counts.values())}, not {CLASSES} of {expected}"
            print(f"warning: {root / split} has {sizes}: it is not the complete TinyImageNet", file=sys.stderr)
        for name in sorted((listed or set(_counts(root / "train"))) ^ set(counts)):
            raise ValueError(f"class {name} is only in {'the list' if name not in counts else split}: unpack {URL} again")
        most = expected if complete else max(counts.values())
        for name, count in sorted(counts.items()):
            if count != most:
                raise ValueError(f"{root / split / name} has {count} images, expected {most}: unpack {URL} again")
        if complete and len(counts) != CLASSES:
            raise ValueError(f"{root / split} has {len(counts)} classes, expected {CLASSES}: unpack {URL} again")


def prepare(data_dir: Path, *, complete: bool = False) -> Path:
    """The folder of the data set, sorted and checked as in :func:`check`. Downloads the data set if it is missing."""
    root = find(data_dir)
    if root is None:
        from torchvision.datasets.utils import download_url, extract_archive

        where = f"unpack {URL} (MD5 {MD5}) in {data_dir}, so that {data_dir / FOLDER / 'train'} exists"
        with downloading("tiny_imagenet", where), one_at_a_time(data_dir, "tiny_imagenet"):
            if find(data_dir) is None:  # another process may have made it meanwhile
                download_url(URL, str(data_dir), md5=MD5)
                partial = data_dir / f".{FOLDER}.{os.getpid()}.partial"
                try:
                    extract_archive(str(data_dir / f"{FOLDER}.zip"), str(partial))
                    os.rename(partial / FOLDER, data_dir / FOLDER)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        root, complete = data_dir / FOLDER, True
    sort_val(root)
    if not (root / "val").is_dir():
        raise ValueError(f"{root} has train/ but no val/: unpack {URL} again")
    check(root, complete=complete)
    return root


def main() -> None:
    parser = FlagParser(prog="python -m common.vision.tiny_imagenet", description="Download, sort and check TinyImageNet.")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args()
    with clean_errors(parser.prog):
        root = prepare(args.data_dir, complete=True)
    print(f"{root}: {CLASSES} classes of {TRAIN} training and {VAL} validation images", file=sys.stderr)


if __name__ == "__main__":
    say_interrupted("python -m common.vision.tiny_imagenet")
    exit_on_sigterm()
    main()

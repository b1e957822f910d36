"""TinyImageNet: download, sort the validation images by class, check: python -m common.vision.tiny_imagenet [--data-dir DIR].

The archive keeps all validation images in one folder with their classes in val_annotations.txt. A loader that takes that folder
as it is trains to chance; here it is rebuilt as val/<class>/images/, and put in place when it is whole. The archive's test/
has no labels and is not read.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

from ..experiments.config import FlagParser, say_interrupted
from ..experiments.downloads import downloading
from ..experiments.files import ROOT, images_in
from ..experiments.runs import clean_errors

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
CLASSES, TRAIN, VAL = 200, 500, 50  # classes, and images of each in the two splits
FOLDER = "tiny-imagenet-200"


def find(data_dir: Path) -> Path | None:
    """The data set's folder, under the archive's name or the released code's."""
    return next((data_dir / name for name in (FOLDER, "tiny_imagenet") if (data_dir / name / "train").is_dir()), None)


def sort_val(root: Path) -> None:
    """Rebuild val/ by class from val_annotations.txt, unless that is done; raises ValueError naming what is missing.

    The sorted folder is complete before it takes the place of the other; what an interruption between the two renames
    left behind is put back first. Processes that start at once wait for each other. A sorted folder is not written to.
    """
    val, unsorted, partial = root / "val", root / ".val.unsorted", root / ".val.partial"
    if val.is_dir() and not (val / "images").is_dir():
        return
    if not os.access(root, os.W_OK):
        raise ValueError(f"{val} is not sorted by class, and {root} cannot be written to: copy it to another --data-dir")
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
                    raise ValueError(f"{annotations} names no image and class in line {number}: unpack {URL} again")
                source, target = val / "images" / name, partial / label / "images" / name
                if not source.exists():
                    raise ValueError(f"{source}, which {annotations.name} lists, is missing: unpack {URL} again")
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
    """Images of each class of a split."""
    return Counter(
        {
            folder.name: len(images_in(folder))
            for folder in split.iterdir()
            if folder.is_dir() and not folder.name.startswith(".")
        }
    )


def check(root: Path, *, complete: bool) -> None:
    """Check that classes agree, that each has as many images as the others and, if ``complete``, 200 x 500 and 200 x 50."""
    listed = set((root / "wnids.txt").read_text().split()) if (root / "wnids.txt").exists() else None
    for split, expected in (("train", TRAIN), ("val", VAL)):
        counts = _counts(root / split)
        if not counts:
            raise ValueError(f"{root / split} has no folder of a class: unpack {URL} again")
        if not complete and (len(counts), max(counts.values())) != (CLASSES, expected):
            sizes = f"{len(counts)} classes of {max(counts.values())}, not {CLASSES} of {expected}"
            print(f"warning: {root / split} has {sizes}: it is not the whole of TinyImageNet", file=sys.stderr)
        for name in sorted((listed or set(_counts(root / "train"))) ^ set(counts)):
            raise ValueError(f"class {name} is in {'the list' if name not in counts else split} only: unpack {URL} again")
        most = expected if complete else max(counts.values())
        for name, count in sorted(counts.items()):
            if count != most:
                raise ValueError(f"{root / split / name} has {count} images, expected {most}: unpack {URL} again")
        if complete and len(counts) != CLASSES:
            raise ValueError(f"{root / split} has {len(counts)} classes, expected {CLASSES}: unpack {URL} again")


def prepare(data_dir: Path, *, complete: bool = False) -> Path:
    """The folder of a data set that is there, sorted and checked; downloads it where it is missing."""
    root = find(data_dir)
    if root is None:
        from torchvision.datasets.utils import download_url, extract_archive

        with downloading(
            "tiny_imagenet", f"unpack {URL} (MD5 {MD5}) in {data_dir}, so that {data_dir / FOLDER / 'train'} exists"
        ):
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
        raise ValueError(f"{root} has no val/ beside its train/: unpack {URL} again")
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
    main()

"""Files: written whole or not at all, read with clear errors, and told apart by digests. Loads without torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMAGES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # suffixes, as torchvision has them


def write_atomic(path: Path, content: str | bytes, *, keep: Path | None = None) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new and nothing between.

    The old file moves to ``keep``, if given: a crash then leaves it there or here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, with null for numbers that are not finite."""
    write_atomic(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with None, which is null in JSON, for numbers that are not finite, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Content of a JSON file; raises ValueError naming the file where it is not JSON."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def is_image(path: Path) -> bool:
    """Whether a path, relative to a folder of images, is that of an image by its suffix; nothing hidden is."""
    return path.suffix.lower() in IMAGES and not any(part.startswith(".") for part in path.parts)


def images_in(folder: Path) -> list[Path]:
    """Paths, relative to a folder, of the images in it and in the folders below, also those that are links."""
    # rglob does not look into links, which data sets may have for classes.
    found = (Path(inner, name) for inner, _, names in os.walk(folder, followlinks=True) for name in names)
    return [path.relative_to(folder) for path in found if is_image(path.relative_to(folder)) and path.is_file()]


def digest(path: Path) -> str:
    """12 hexadecimal digits that depend on a file's content or, of a folder of images, on the names and sizes of these.

    What else lies in such a folder does not count: file managers put files of their own there.
    """
    if not path.is_dir():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    files = sorted((str(file), (path / file).stat().st_size) for file in images_in(path))
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]

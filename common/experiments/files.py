"""Files: written whole or not at all, read with clear errors, and identified by digests. Does not import torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMAGES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # the suffixes that torchvision accepts


def write_atomic(path: Path, content: str | bytes, *, keep: Path | None = None) -> None:
    """Write a file atomically. A reader, even after a crash, finds either the old content or the new content, never a mix.

    If ``keep`` is given, an existing file moves there first. After a crash it is at ``keep`` or still at ``path``.
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
    """Write a value as a JSON file atomically, with null for numbers that are not finite."""
    write_atomic(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with None (null in JSON) in place of numbers that are not finite, which JSON cannot express."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Content of a JSON file. Raises ValueError, which names the file, if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def in_project(path: Path) -> Path:
    """The path or, if it exists only below the project's root, that one. Rows name their data like this: ``data-bin/books``."""
    return path if path.exists() or not (ROOT / path).exists() else ROOT / path


def is_image(path: Path) -> bool:
    """Whether a path, relative to a folder of images, has an image's suffix and no hidden part (one that begins with ".")."""
    return path.suffix.lower() in IMAGES and not any(part.startswith(".") for part in path.parts)


def images_in(folder: Path) -> list[Path]:
    """Paths of the images in a folder and in all folders below it, relative to the folder. Symbolic links are followed."""
    # rglob does not follow links to folders, which data sets may use for classes.
    found = (Path(inner, name) for inner, _, names in os.walk(folder, followlinks=True) for name in names)
    return [path.relative_to(folder) for path in found if is_image(path.relative_to(folder)) and path.is_file()]


def digest(path: Path) -> str:
    """The first 12 hexadecimal digits of a SHA-256: of a file's content, or of the paths and sizes of the images in a folder.

    Other files in a folder do not count, because file managers create some of their own there.
    """
    if not path.is_dir():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    files = sorted((str(file), (path / file).stat().st_size) for file in images_in(path))
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]

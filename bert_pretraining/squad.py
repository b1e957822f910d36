"""Questions in the format of SQuAD 1.1: reading, windows of a context, and the official scores. Loads without torch."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from bert_pretraining.downstream import FRAME, QUESTION
from bert_pretraining.text import BOS, EOS, check_encodable
from common.experiments.files import read_json

ANSWER = 30  # most tokens of an answer

Encode = Callable[
    [str], tuple[Sequence[int], Sequence[tuple[int, int]]]
]  # text to its tokens, and to [begin, end) of each in the text


@dataclass(frozen=True)
class Question:
    """A question with at least one answer: the character at which it begins in the context, and its text."""

    id: str
    text: str
    context: str
    answers: tuple[tuple[int, str], ...]


def read(path: Path) -> list[Question]:
    """Questions of a SQuAD 1.1 file. Raises ValueError, naming the question, if an answer is not at its given place."""
    content, found = read_json(path), dict[str, Question]()
    try:
        for paragraph in (paragraph for article in content["data"] for paragraph in article["paragraphs"]):
            for entry in paragraph["qas"]:
                answers = tuple((answer["answer_start"], answer["text"]) for answer in entry["answers"])
                question = Question(entry["id"], entry["question"], paragraph["context"], answers)
                if question.id in found:
                    raise ValueError(f"{path}: two questions have the id {question.id}")
                found[question.id] = question
                _check(question, path)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not in the format of SQuAD 1.1: {type(error).__name__} {error}") from error
    if not found:
        raise ValueError(f"{path} has no questions")
    return list(found.values())


def _check(question: Question, path: Path) -> None:
    for value in (question.text, question.context):
        if not isinstance(value, str):
            raise TypeError(f"question {question.id} has {value!r} where a text is expected")
        try:
            check_encodable(value)
        except ValueError as error:
            raise ValueError(f"{path}: question {question.id}: {error}") from error
    if not question.answers:
        raise ValueError(f"{path}: question {question.id} has no answer: SQuAD 1.1 has one for each, unlike 2.0")
    for start, text in question.answers:
        there = question.context[max(start, 0) : start + len(text)]
        if not text.strip() or there != text:
            raise ValueError(
                f"{path}: question {question.id} has the answer {text!r} at character {start}, where the context has {there!r}"
            )


@dataclass(frozen=True, eq=False)
class Window:
    """A question with a part of its context: BOS question EOS context EOS.

    question:  index of the question.
    first:     position of the first token of the context.
    offsets:   (context tokens, 2): where each begins and ends in the context, in characters.
    target:    positions of the first and last token of the first answer; both 0, which is BOS, if the window lacks part of it.
    """

    question: int
    tokens: np.ndarray
    first: int
    offsets: np.ndarray
    target: tuple[int, int]


def windows(questions: Sequence[Question], encode: Encode, max_tokens: int, stride: int) -> list[Window]:
    """Windows of at most ``max_tokens`` tokens, starting every ``stride`` tokens of a context until one contains its end."""
    encode = cache(encode)  # questions share their contexts
    found = []
    for index, question in enumerate(questions):
        asked = list(encode(question.text)[0][:QUESTION])
        ids, spans = encode(question.context)
        if not ids:
            raise ValueError(f"question {question.id} has a context without tokens: {question.context!r}")
        offsets = np.array(spans, np.int64).reshape(-1, 2)
        start, text = question.answers[0]
        first, last = token_span(offsets, start, start + len(text))
        place, room = len(asked) + 2, max_tokens - len(asked) - FRAME
        for begin in range(0, max(len(ids) - room, 0) + stride, stride):
            part = ids[begin : begin + room]
            inside = begin <= first <= last < begin + len(part)
            target = (place + first - begin, place + last - begin) if inside else (0, 0)
            tokens = np.array([BOS, *asked, EOS, *part, EOS], np.uint16)
            found.append(Window(index, tokens, place, offsets[begin : begin + len(part)], target))
    return found


def token_span(offsets: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """The first and the last token that hold any of the characters in [``start``, ``end``)."""
    return int(np.searchsorted(offsets[:, 1], start, "right")), int(np.searchsorted(offsets[:, 0], end, "left")) - 1


def answer(question: Question, offsets: np.ndarray, first: int, last: int) -> str:
    """The text of the context from token ``first`` to token ``last``."""
    return question.context[offsets[first, 0] : offsets[last, 1]].strip()


# The scores of the official evaluation, evaluate-v1.1.py.


def normalize(text: str) -> str:
    """The text in lower case, without punctuation, articles and extra white space."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(prediction: str, gold: str) -> float:
    """1 if both are equal after normalization, else 0."""
    return float(normalize(prediction) == normalize(gold))


def f1(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall: the shares of the words of each text that the other also has."""
    ours, theirs = normalize(prediction).split(), normalize(gold).split()
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def scores(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
    """F1 and exact match in percent. Each question counts with its best answer, and with 0 if it has no prediction."""
    totals = {"f1": 0.0, "exact": 0.0}
    for question in questions:
        if question.id in predictions:
            for name, measure in (("f1", f1), ("exact", exact)):
                totals[name] += max(measure(predictions[question.id], gold) for _, gold in question.answers)
    return {name: 100 * total / len(questions) for name, total in totals.items()}

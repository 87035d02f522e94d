"""What a remote reward's client sends and reads: this package's format, and that of Flow-GRPO's reward servers."""

import io
import json
import math
import pickle
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from urllib3.filepost import encode_multipart_formdata

from fastflowgrpo.scoring.contract import RewardBatch, Scores

MEDIA_TYPES = {"raw": "application/octet-stream", "png": "image/png", "jpeg": "image/jpeg"}


@dataclass(frozen=True)
class Format:
    """How a batch travels.

    Attributes:
        encode: (reward's name, batch on the CPU, encoding of the images, timeout in seconds) -> path to append to the
            URL, body, content type.
        decode: (body of the answer, number of images) -> its scores; ValueError if it is no such answer.
    """

    encode: Callable[[str, RewardBatch, str, float], tuple[str, bytes, str]]
    decode: Callable[[bytes, int], Scores]


def _encode(name: str, batch: RewardBatch, encoding: str, timeout: float) -> tuple[str, bytes, str]:
    """multipart/form-data: a JSON field `request`, and a file `images` for each image (docs/serving.md)."""
    request = {
        "prompts": batch.prompts,
        "metadata": batch.metadata,
        "group_ids": batch.group_ids.tolist(),
        "size": list(batch.images.shape[2:]),
        "timeout": timeout,
    }
    raw = encoding == "raw"
    images: Any = list(batch.images.contiguous().numpy()) if raw else _files(batch.images, encoding)
    parts: list[Any] = [("images", (str(i), image, MEDIA_TYPES[encoding])) for i, image in enumerate(images)]
    body, content_type = encode_multipart_formdata([("request", json.dumps(request)), *parts])
    return f"/score/{name}", body, content_type


def _decode(body: bytes, count: int) -> Scores:
    try:
        answer = json.loads(body)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(answer, dict) or not isinstance(answer.get("details", {}), dict) or "scores" not in answer:
        raise ValueError("it is no object with scores and details")
    details = {name: _vector(values, count, name) for name, values in answer.get("details", {}).items()}
    return Scores(_vector(answer["scores"], count, "scores"), details, str(answer.get("error") or ""))


def _encode_flow_grpo(name: str, batch: RewardBatch, encoding: str, timeout: float) -> tuple[str, bytes, str]:
    """What all of Flow-GRPO's reward servers want; each takes what it needs. JPEGs in the quality of its client."""
    request = {
        "images": _files(batch.images, "jpeg"),
        "prompts": batch.prompts,
        "meta_datas": [{**m, "prompt": p} for m, p in zip(batch.metadata, batch.prompts, strict=True)],
        "only_strict": False,
    }
    return "", pickle.dumps(request), "application/octet-stream"


def _decode_flow_grpo(body: bytes, count: int) -> Scores:
    """`outputs` of a DeQA or UnifiedReward server, or `scores` of a GenEval server with its further results, under the
    names that `geneval` has for them. Its lists per tag are left out: an evaluation knows the tags of its prompts."""
    answer = restricted_loads(body)
    if isinstance(answer, dict) and "outputs" in answer:
        return Scores(_vector(answer["outputs"], count, "outputs"))
    if not isinstance(answer, dict) or "scores" not in answer:
        raise ValueError("it is no dict with outputs or scores")
    names = {"scores": "score", "strict_rewards": "strict", "rewards": "correct"}
    details = {ours: _vector(answer[theirs], count, theirs) for theirs, ours in names.items() if theirs in answer}
    return Scores(details["score"], details)


FORMATS = {"fastflowgrpo": Format(_encode, _decode), "flow_grpo": Format(_encode_flow_grpo, _decode_flow_grpo)}


def _files(images: torch.Tensor, encoding: str) -> list[bytes]:
    """Images uint8 (B, 3, H, W) as PNG files, or as JPEG files of Pillow's quality."""
    files = []
    for pixels in images.permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=encoding, **({"compress_level": 1} if encoding == "png" else {}))
        files.append(buffer.getvalue())
    return files


def _vector(values: Any, count: int, name: str) -> torch.Tensor:
    """float32 (count,) from a sequence of numbers, of which None and NaN are missing."""
    if not isinstance(values, list | tuple | np.ndarray) or len(values) != count:
        raise ValueError(f"{name}: expected {count} numbers, got {reprlib.repr(values)}")
    numbers = [math.nan if value is None else value for value in values]
    for number in numbers:
        if not isinstance(number, int | float | np.integer | np.floating | np.bool_):
            raise ValueError(f"{name}: expected numbers, got {reprlib.repr(number)}")
    vector = torch.tensor([float(number) for number in numbers], dtype=torch.float64).float()
    if vector.isinf().any():
        raise ValueError(f"{name}: infinite for image {int(vector.isinf().nonzero()[0])}")
    return vector


def restricted_loads(data: bytes) -> Any:
    """Read a pickle, of protocol 3 or later, of plain containers, numbers, strings, bytes, and numpy arrays of them.

    Nothing that the pickle names is imported or called. In place of numpy's constructors, which would take a dtype with
    fields that point anywhere in memory, stand those below, which check what they are given; other names are refused.

    Raises:
        ValueError: it is something else, or no pickle.
    """
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(f"pickle refused: {type(error).__name__}: {error}") from None


class _DType:
    """In place of numpy.dtype; `value` is the dtype."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if not re.fullmatch(r"[<>|=]?([biufcSU]\d{1,6}|\?)", code):
            raise ValueError(f"numpy dtype {code!r}")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Of numpy's state, only the byte order is not in the code already."""
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array(np.ndarray):
    """In place of numpy.ndarray, for an array that is filled after its making; numpy checks the shape."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, fortran, data = state
        super().__setstate__((version, shape, dtype.value, fortran, data))


class _Reconstruct:
    """In place of numpy's `_reconstruct`. An object without attributes: a pickle can set those of a function."""

    __slots__ = ()

    def __call__(self, kind: str, shape: tuple[int, ...], code: bytes) -> np.ndarray:
        return _Array.__new__(_Array, 0)


class _FromBuffer:
    """In place of numpy's `_frombuffer`."""

    __slots__ = ()

    def __call__(self, data: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> np.ndarray:
        array = np.frombuffer(data, dtype.value).reshape(shape, order="F" if order == "F" else "C")
        return array.view(_Array)


class _Scalar:
    """In place of numpy's `scalar`."""

    __slots__ = ()

    def __call__(self, dtype: _DType, data: bytes) -> Any:
        (value,) = np.frombuffer(data, dtype.value)
        return value


# What a pickle may name, and what it gets; in numpy 1 the core was called numpy.core.
_REPLACED = {
    "numpy.dtype": _DType,
    "numpy.ndarray": "ndarray",
    "numpy._core.multiarray._reconstruct": _Reconstruct(),
    "numpy._core.multiarray.scalar": _Scalar(),
    "numpy._core.numeric._frombuffer": _FromBuffer(),
}


class _Unpickler(pickle._Unpickler):
    """Python's own, not the C one, which a few bytes can make fill the memory with an empty memo."""

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}".replace("numpy.core.", "numpy._core.")
        if path not in _REPLACED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _REPLACED[path]

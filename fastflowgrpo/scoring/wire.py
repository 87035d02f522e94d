"""The wire formats of `RemoteReward`: this package's own, and the one of Flow-GRPO's reward servers."""

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

from fastflowgrpo.errors import UserError
from fastflowgrpo.scoring.contract import RewardBatch, Scores

MEDIA_TYPES = {"raw": "application/octet-stream", "png": "image/png", "jpeg": "image/jpeg"}


@dataclass(frozen=True)
class Format:
    """How a batch is sent and its scores are read.

    Attributes:
        encode: (reward's name, batch on the CPU, encoding of the images, timeout in seconds) -> path to append to the
            URL, body, content type.
        decode: (body of the answer, number of images) -> scores; ValueError if the answer has another form.
    """

    encode: Callable[[str, RewardBatch, str, float], tuple[str, bytes, str]]
    decode: Callable[[bytes, int], Scores]


def _encode(name: str, batch: RewardBatch, encoding: str, timeout: float) -> tuple[str, bytes, str]:
    """Encode as multipart/form-data: the JSON field `request`, and for each image, or frame of a video, a file `images`
    and, in an edit, a file `sources` (docs/serving.md)."""
    request: dict[str, Any] = {
        "prompts": batch.prompts,
        "metadata": batch.metadata,
        "group_ids": batch.group_ids.tolist(),
        "size": list(batch.images.shape[-2:]),
        "timeout": timeout,
    }
    if batch.images.ndim == 5:
        request["frames"] = batch.images.shape[1]
    fields = {"images": batch.images.flatten(0, -4)}
    if batch.sources is not None:
        fields["sources"] = torch.stack(batch.sources)
    parts: list[Any] = [
        (field, (str(i), file, MEDIA_TYPES[encoding]))
        for field, images in fields.items()
        for i, file in enumerate(list(images.contiguous().numpy()) if encoding == "raw" else _files(images, encoding))
    ]
    body, content_type = encode_multipart_formdata([("request", json.dumps(request)), *parts])
    return f"/score/{name}", body, content_type


def _decode(body: bytes, count: int) -> Scores:
    try:
        answer = json.loads(body)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(answer, dict) or not isinstance(answer.get("details", {}), dict) or "scores" not in answer:
        raise ValueError("expected an object with scores and details")
    details = {name: _vector(values, count, name) for name, values in answer.get("details", {}).items()}
    return Scores(_vector(answer["scores"], count, "scores"), details, str(answer.get("error") or ""))


def _encode_flow_grpo(name: str, batch: RewardBatch, encoding: str, timeout: float) -> tuple[str, bytes, str]:
    """Encode as a pickled dict with the fields of all of Flow-GRPO's reward servers; each server takes what it needs.

    The images are JPEG files with Pillow's default quality, as Flow-GRPO's client sends them.
    """
    if batch.sources is not None:
        raise UserError("format flow_grpo has no place for the source images of edits: leave it out")
    request = {
        "images": _files(batch.images, "jpeg"),
        "prompts": batch.prompts,
        "meta_datas": [{**m, "prompt": p} for m, p in zip(batch.metadata, batch.prompts, strict=True)],
        "only_strict": False,
    }
    return "", pickle.dumps(request), "application/octet-stream"


def _decode_flow_grpo(body: bytes, count: int) -> Scores:
    """Read `outputs` of a DeQA or UnifiedReward server, or `scores` and further results of a GenEval server.

    GenEval's results become details with the names that the reward `geneval` uses. Its results per tag are dropped: an
    evaluation computes them from the tags of its prompts.
    """
    answer = restricted_loads(body)
    if isinstance(answer, dict) and "outputs" in answer:
        return Scores(_vector(answer["outputs"], count, "outputs"))
    if not isinstance(answer, dict) or "scores" not in answer:
        raise ValueError("expected a dict with outputs or scores")
    names = {"scores": "score", "strict_rewards": "strict", "rewards": "correct"}
    details = {ours: _vector(answer[theirs], count, theirs) for theirs, ours in names.items() if theirs in answer}
    return Scores(details["score"], details)


FORMATS = {"fastflowgrpo": Format(_encode, _decode), "flow_grpo": Format(_encode_flow_grpo, _decode_flow_grpo)}


def _files(images: torch.Tensor, encoding: str) -> list[bytes]:
    """Encode images uint8 (B, 3, H, W) as PNG files, or as JPEG files with Pillow's default quality."""
    files = []
    for pixels in images.permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=encoding, **({"compress_level": 1} if encoding == "png" else {}))
        files.append(buffer.getvalue())
    return files


def _vector(values: Any, count: int, name: str) -> torch.Tensor:
    """Convert a sequence of numbers to float32 (count,); None and NaN become NaN."""
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
    """Read a pickle of plain containers, numbers, strings, bytes and numpy arrays, without running code from it.

    Nothing that the pickle names is imported or called. The classes below replace numpy's constructors and check their
    arguments: numpy would accept a dtype with fields that point anywhere in memory. All other names are refused.

    Args:
        data: a pickle of protocol 3 or later.

    Raises:
        ValueError: the data is no pickle, or holds anything else.
    """
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(f"pickle refused: {type(error).__name__}: {error}") from None


class _DType:
    """Replaces numpy.dtype; `value` is the dtype."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if not re.fullmatch(r"[<>|=]?([biufcSU]\d{1,6}|\?)", code):
            raise ValueError(f"numpy dtype {code!r}")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Set the byte order; the rest of numpy's state is already in the code."""
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array(np.ndarray):
    """Replaces numpy.ndarray, for an array that is filled after it was created; numpy checks the shape."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, fortran, data = state
        super().__setstate__((version, shape, dtype.value, fortran, data))


class _Reconstruct:
    """Replaces numpy's `_reconstruct`. It is no function, because a pickle could set attributes of a function."""

    __slots__ = ()

    def __call__(self, kind: str, shape: tuple[int, ...], code: bytes) -> np.ndarray:
        return _Array.__new__(_Array, 0)


class _FromBuffer:
    """Replaces numpy's `_frombuffer`."""

    __slots__ = ()

    def __call__(self, data: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> np.ndarray:
        array = np.frombuffer(data, dtype.value).reshape(shape, order="F" if order == "F" else "C")
        return array.view(_Array)


class _Scalar:
    """Replaces numpy's `scalar`."""

    __slots__ = ()

    def __call__(self, dtype: _DType, data: bytes) -> Any:
        (value,) = np.frombuffer(data, dtype.value)
        return value


# The names that a pickle may use, and what replaces them. numpy 1 called numpy._core numpy.core.
_REPLACED = {
    "numpy.dtype": _DType,
    "numpy.ndarray": "ndarray",
    "numpy._core.multiarray._reconstruct": _Reconstruct(),
    "numpy._core.multiarray.scalar": _Scalar(),
    "numpy._core.numeric._frombuffer": _FromBuffer(),
}


class _Unpickler(pickle._Unpickler):
    """Based on the unpickler in Python: a few bytes can make the one in C fill the memory with an empty memo."""

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}".replace("numpy.core.", "numpy._core.")
        if path not in _REPLACED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _REPLACED[path]

"""Wire formats: Flow-GRPO's servers, and what their pickles may hold."""

import io
import os
import pickle
import pickletools
from collections import OrderedDict
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from support.reward_server import batch_of, scripted

from fastflowgrpo.rewards import build_rewards
from fastflowgrpo.scoring.client import RemoteReward
from fastflowgrpo.scoring.wire import restricted_loads

PLAIN = {
    "scores": [0.5, 1, True, None, float("inf"), 2**70],
    "text": ("ü", b"bytes"),
    3: {"nested": [[], {}, ()]},
}
ARRAYS = [
    np.arange(6.0).reshape(2, 3),
    np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.array([1.5, np.nan], ">f4"),
    np.array(["yes", "no"]),
    np.array([b"yes"]),
    np.array([True, False]),
    np.zeros((0, 3), np.float16),
    np.float32(1.5),
    np.int64(-3),
    np.bool_(True),
    np.str_("text"),
]


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_and_arrays_are_read(protocol):
    value = PLAIN | ({"sets": [{1, 2}, frozenset({"a"})]} if protocol >= 4 else {})
    assert restricted_loads(pickle.dumps(value, protocol)) == value
    for array in ARRAYS:
        (loaded,) = restricted_loads(pickle.dumps([array], protocol))
        assert loaded.dtype.newbyteorder("=") == array.dtype.newbyteorder("=") and loaded.shape == array.shape
        np.testing.assert_array_equal(loaded, array)


def test_a_pickle_of_numpy_1_is_read():
    data = pickle.dumps(np.arange(3.0), 3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core" in data
    assert restricted_loads(data).tolist() == [0, 1, 2]


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


NEGATIVE = b"J\xfe\xff\xff\xffJ\xfd\xff\xff\xff\x86"  # -2, -3: their product fits the bytes
MALICIOUS = {
    "system": lambda path: pickle.dumps(Call(os.system, f"touch {path}")),
    "in a list": lambda path: pickle.dumps({"outputs": [1.0, Call(os.system, f"touch {path}")]}),
    "eval": lambda path: pickle.dumps(Call(eval, f"open({str(path)!r}, 'w')")),
    "old protocol": lambda path: pickle.dumps(Call(os.system, f"touch {path}"), 0),
    "inst": lambda path: f"(S'touch {path}'\nios\nsystem\n.".encode(),
    "numpy's file functions": lambda path: pickle.dumps(Call(np.save, str(path), 1)),
    "through numpy": lambda path: f"cnumpy\nos.system\n(S'touch {path}'\ntR.".encode(),
    "attribute of what is allowed": lambda path: b"cnumpy\ndtype.__class__\n.",
    "an object": lambda path: pickle.dumps(Fraction(1, 2)),
    "another container": lambda path: pickle.dumps(OrderedDict(a=1)),
    "tensor": lambda path: pickle.dumps(torch.zeros(1)),
    "array of objects": lambda path: pickle.dumps(np.array([{}, []], dtype=object)),
    "dtype with fields": lambda path: pickle.dumps(np.zeros(2, [("a", "V8")])),
    "dtype of objects": lambda path: pickle.dumps(np.dtype("O")),
    "negative shape": lambda path: pickle.dumps(np.zeros((2, 3)), 3).replace(b"K\2K\3\x86", NEGATIVE),
    "extension": lambda path: b"\x82\x01.",
    "persistent": lambda path: b"Pid\n.",
    "attributes of a function": lambda path: b"cnumpy._core.multiarray\nscalar\n(N}S'__defaults__'\nNstb.",
    "a memo of 4 billion": lambda path: b"Nr\xff\xff\xff\x7f0.",
    "cut off": lambda path: pickle.dumps([1.0] * 100)[:-20],
    "empty": lambda path: b"",
    "no pickle": lambda path: b"Traceback (most recent call last):",
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_anything_else_is_refused_and_nothing_executed(tmp_path, name):
    data = MALICIOUS[name](tmp_path / "executed")
    with pytest.raises(ValueError, match=r"^pickle refused: "):
        restricted_loads(data)
    assert not list(tmp_path.iterdir())


def test_every_way_to_name_something_is_refused():
    for code in pickletools.opcodes:
        if code.name in ("GLOBAL", "INST"):
            data = b"(" + code.code.encode("latin-1") + b"os\nsystem\n."
            with pytest.raises(ValueError, match=r"pickle refused: UnpicklingError: it names os\.system"):
                restricted_loads(data)
    with pytest.raises(ValueError, match=r"it names posix\.system"):
        restricted_loads(b"\x80\x04\x8c\x05posix\x8c\x06system\x93.")


# Flow-GRPO's servers


def geneval(path, body, headers):
    """As yifan123/reward-server's app_geneval.py reads and answers; the score is an image's brightness."""
    request = pickle.loads(body)
    assert path == "/" and request["only_strict"] is False and set(headers) >= {"Content-Length"}
    images = [Image.open(io.BytesIO(data), formats=["jpeg"]) for data in request["images"]]
    for metadata in request["meta_datas"]:
        assert metadata["tag"] == "counting" and metadata["prompt"] == "a cat" and metadata["include"]
    scores = [image.getpixel((0, 0))[0] / 255 for image in images]
    strict = [float(score > 0.5) for score in scores]
    groups = {"counting": strict, "colors": [-10.0] * len(strict)}
    answer = {
        "scores": scores,
        "rewards": [1.0] * len(scores),
        "strict_rewards": strict,
        "group_rewards": groups,
        "group_strict_rewards": groups,
    }
    return 200, {}, pickle.dumps(answer)


def test_a_geneval_server_of_flow_grpo():
    batch = batch_of([0, 51, 255])
    batch.metadata = [{"tag": "counting", "include": [{"class": "cat", "count": 1}]}] * 3
    with scripted(geneval) as url:
        scores = build_rewards({"geneval": {"url": url, "format": "flow_grpo"}})(batch)
    assert scores.values.tolist() == pytest.approx([0, 0.2, 1])
    assert scores.details["geneval/score"].tolist() == pytest.approx([0, 0.2, 1])
    assert scores.details["geneval/strict"].tolist() == [0, 0, 1]
    assert scores.details["geneval/correct"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", [list, np.array, lambda values: [np.float32(value) for value in values]])
def test_a_server_of_flow_grpo_with_outputs(kind):
    def answer(path, body, headers):
        request = pickle.loads(body)
        assert request["prompts"] == ["a cat"] * 2
        return 200, {}, pickle.dumps({"outputs": kind([0.25, float("nan")])})

    with scripted(answer) as url:
        scores = RemoteReward("deqa", url, format="flow_grpo")(batch_of([1, 2]))
    assert scores.values[0] == 0.25 and scores.values[1].isnan()


def test_a_malicious_answer_is_a_failure_that_executes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastflowgrpo.scoring.endpoint.FIRST_PAUSE", 0.01)
    data = pickle.dumps({"outputs": Call(os.system, f"touch {tmp_path / 'executed'}")})
    with scripted(lambda path, body, headers: (200, {}, data)) as url:
        scores = RemoteReward("deqa", url, format="flow_grpo", required=False)(batch_of([1]))
    assert scores.values.isnan().all()
    assert "unreadable answer: pickle refused: UnpicklingError: it names posix.system" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_traceback_is_reported_by_its_last_line(capsys, monkeypatch):
    monkeypatch.setattr("fastflowgrpo.scoring.endpoint.FIRST_PAUSE", 0.01)
    text = b"Traceback (most recent call last):\n  File ...\nKeyError: 'tag'\n"
    with scripted(lambda path, body, headers: (500, {}, text)) as url:
        RemoteReward("geneval", url, format="flow_grpo")(batch_of([1]))
    assert f"reward geneval: 1 of 1 images not scored: {url}: HTTP 500: KeyError: 'tag'" in capsys.readouterr().out

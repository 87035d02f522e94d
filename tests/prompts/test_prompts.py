"""Prompt files, GenEval metadata and the choice of an epoch's prompts."""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflowgrpo.prompts import Prompt, check_metadata, epoch_prompts, load_prompts

POSITION: dict[str, Any] = {
    "tag": "position",
    "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    "prompt": "a photo of a dog left of a cat",
}
COUNTING: dict[str, Any] = {
    "tag": "counting",
    "include": [{"class": "cat", "count": 2, "color": "red"}],
    "exclude": [{"class": "cat", "count": 3}],
    "prompt": "a photo of two red cats",
}


def test_txt_skips_blank_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\n   \n  caf\u00e9 \u201chi\u201d  \n{not json}".encode())
    assert load_prompts(str(path)) == [Prompt("a cat"), Prompt("caf\u00e9 \u201chi\u201d"), Prompt("{not json}")]
    assert load_prompts(str(path))[0].metadata == {}


def test_jsonl_keeps_the_metadata(tmp_path):
    path = tmp_path / "prompts.jsonl"
    extra = {**COUNTING, "source": "mine", "prompt": "line\u2028separator"}
    path.write_text("\n".join(json.dumps(m, ensure_ascii=False) for m in (POSITION, extra)) + "\n\n", encoding="utf-8")
    assert load_prompts(str(path)) == [Prompt(POSITION["prompt"], POSITION), Prompt("line\u2028separator", extra)]


def test_file_errors(tmp_path):
    (tmp_path / "train.txt").write_text("a cat")
    with pytest.raises(FileNotFoundError, match=r"trian\.txt: no such file \(did you mean 'train\.txt'\?\)$"):
        load_prompts(str(tmp_path / "trian.txt"))
    with pytest.raises(FileNotFoundError, match=r"nowhere/else\.jsonl: no such file$"):
        load_prompts(str(tmp_path / "nowhere" / "else.jsonl"))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"folder\.txt: there is no pair NAME\.png and NAME\.txt in it"):
        load_prompts(str(tmp_path / "folder.txt"))
    for wrong in ("prompts.tsv", "shape"):
        with pytest.raises(
            ValueError,
            match=wrong
            + r": expected a \.txt file .*GenEval \.jsonl file, .* or shapes, shapes_edit, geneval, ocr or general",
        ):
            load_prompts(wrong)
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_text("\n  \n")
        with pytest.raises(ValueError, match=rf"{name}: there is no prompt in it"):
            load_prompts(str(tmp_path / name))
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 text \(.* at byte 3\)"):
        load_prompts(str(tmp_path / "latin.txt"))


def wrong(field: str, value: Any, clause: int = 1) -> dict[str, Any]:
    """POSITION with one field of a clause changed."""
    changed = json.loads(json.dumps(POSITION))
    changed["include"][clause][field] = value
    return changed


RELATION = (
    r"include\[1\]\.position: expected \[relation, index\], the relation one of left of, .*, the index of an earlier"
)
BAD_METADATA = [
    ([], r"expected a JSON object, got \[\]"),
    ({k: v for k, v in POSITION.items() if k != "tag"}, r"tag: missing, expected one of single_object, two_object"),
    ({**POSITION, "tag": "positions"}, r"tag: expected one of .*position, color_attr, got 'positions'"),
    ({"tag": "counting", "prompt": "x"}, r"include: missing, expected a non-empty list"),
    ({**POSITION, "include": []}, r"include: expected a non-empty list, got \[\]"),
    ({**POSITION, "include": POSITION["include"][0]}, r"include: expected a non-empty list, got \{"),
    ({**POSITION, "include": ["cat"]}, r"include\[0\]: expected an object, got 'cat'"),
    (wrong("class", ""), r"include\[1\]\.class: expected an object's name, got ''"),
    (wrong("count", "two", 0), r"include\[0\]\.count: expected an integer of at least 1, got 'two'"),
    (wrong("count", 0), r"include\[1\]\.count: expected an integer of at least 1, got 0"),
    (wrong("count", 1.0), r"include\[1\]\.count: expected an integer of at least 1, got 1\.0"),
    (wrong("count", True), r"include\[1\]\.count: expected an integer of at least 1, got True"),
    (wrong("color", None), r"include\[1\]\.color: expected a colour's name, got None"),
    (wrong("colour", "red"), r"include\[1\]: unknown key 'colour' \(did you mean 'color'\?\), known: class, count, "),
    (wrong("position", "left of"), RELATION),
    (wrong("position", ["left", 0]), RELATION),
    (wrong("position", ["left of"]), RELATION),
    (wrong("position", ["left of", 1]), RELATION),
    (wrong("position", ["left of", -1]), RELATION),
    ({**COUNTING, "exclude": {}}, r"exclude: expected a list, got \{\}"),
    ({**COUNTING, "exclude": [{"class": "cat"}]}, r"exclude\[0\]\.count: missing, expected an integer of at least 1"),
    (
        {**COUNTING, "exclude": [{"class": "cat", "count": 3, "color": "red"}]},
        r"exclude\[0\]: unknown key 'color', known: class, count$",
    ),
]


@pytest.mark.parametrize("metadata, message", BAD_METADATA)
def test_metadata_errors_name_file_line_and_field(tmp_path, metadata, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(POSITION) + "\n\n" + json.dumps(metadata))
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3: " + message) as error:
        load_prompts(str(path))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="^" + message):
        check_metadata(metadata)


def test_jsonl_line_errors(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({k: v for k, v in POSITION.items() if k != "prompt"}))
    with pytest.raises(ValueError, match=r"line 1: prompt: missing, expected the prompt's text"):
        load_prompts(str(path))
    path.write_text(json.dumps({**POSITION, "prompt": " "}))
    with pytest.raises(ValueError, match=r"line 1: prompt: expected the prompt's text, got ' '"):
        load_prompts(str(path))
    path.write_text(json.dumps(POSITION) + "\n{'tag': 1}\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not JSON \(.* at column 2\)"):
        load_prompts(str(path))


def tagged(**counts: int) -> list[Prompt]:
    return [Prompt(f"{tag} {i}", {"tag": tag}) for tag, n in counts.items() for i in range(n)]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 30), count=st.integers(1, 40), seed=st.integers(0, 2**31 - 1))
def test_epochs_walk_through_shuffled_passes(size, count, seed):
    prompts = [Prompt(str(i)) for i in range(size)]
    total: Counter[int] = Counter()
    for epoch in range(8):
        chosen = epoch_prompts(prompts, count, seed, epoch)
        assert len(chosen) == count and set(chosen) <= set(range(size))
        # All different if there are enough prompts, otherwise used as evenly as possible.
        times = [chosen.count(i) for i in range(size)]
        assert max(times) - min(times) <= 1
        total.update(chosen)
        # Without replacement: over all epochs, two prompts differ by at most one use.
        counts = [total[i] for i in range(size)]
        assert max(counts) - min(counts) <= 1


def test_passes_and_seeds_differ():
    prompts = [Prompt(str(i)) for i in range(12)]
    passes = [epoch_prompts(prompts, 12, 0, epoch) for epoch in range(4)]
    assert all(sorted(p) == list(range(12)) for p in passes)
    assert len({tuple(p) for p in passes}) == 4
    halves = {frozenset(epoch_prompts(prompts, 6, 0, epoch)) for epoch in range(0, 12, 2)}
    assert len(halves) == 6, "each pass must be split anew"
    assert epoch_prompts(prompts, 6, 0, 3) != epoch_prompts(prompts, 6, 1, 3)
    assert epoch_prompts(prompts, 6, 0, 3) == epoch_prompts(prompts, 6, 0, 3), "stateless"


def test_mix_gives_each_tag_its_share():
    prompts = tagged(position=30, counting=11, colors=7, two_object=5, single_object=4)
    mix = {"position": 4, "counting": 2.0, "colors": 1, "two_object": 1, "single_object": 0}
    tags = [p.metadata["tag"] for p in prompts]
    used: Counter[int] = Counter()
    for epoch in range(30):
        chosen = epoch_prompts(prompts, 16, 3, epoch, mix)
        assert Counter(tags[i] for i in chosen) == {"position": 8, "counting": 4, "colors": 2, "two_object": 2}
        assert len(set(chosen)) == 16
        used.update(chosen)
    for tag, share in {"position": 240 / 30, "counting": 120 / 11, "colors": 60 / 7, "two_object": 60 / 5}.items():
        for i in (i for i, t in enumerate(tags) if t == tag):
            assert abs(used[i] - share) < 1, "every prompt of a tag comes equally often"
    assert not any(used[i] for i, t in enumerate(tags) if t == "single_object")


def test_mix_with_uneven_shares():
    prompts = tagged(position=40, counting=40, color_attr=40, colors=40, two_object=40)
    mix = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    tags = [p.metadata["tag"] for p in prompts]
    epochs, count = 400, 8
    total: Counter[str] = Counter()
    for epoch in range(epochs):
        chosen = epoch_prompts(prompts, count, 0, epoch, mix)
        per_tag = Counter(tags[i] for i in chosen)
        assert len(set(chosen)) == count == sum(per_tag.values())
        for tag, weight in mix.items():
            assert abs(per_tag[tag] - count * weight / 17) < 1
        total.update(per_tag)
    for tag, weight in mix.items():
        quota = count * weight / 17
        # A tag's count is one of two adjacent integers; allow 5 standard errors of the mean.
        assert abs(total[tag] / epochs - quota) < 5 * 0.5 / epochs**0.5, tag


def test_epoch_is_shuffled_across_tags():
    prompts = tagged(position=50, counting=50)
    halves = [epoch_prompts(prompts, 20, 0, epoch, {"position": 1, "counting": 1})[:10] for epoch in range(20)]
    in_first_half = sum(i < 50 for half in halves for i in half)
    assert 70 <= in_first_half <= 130, "an update on the first half of an epoch must see both tags"


def test_order_of_the_mix_does_not_matter():
    prompts = tagged(position=9, counting=9)
    one = epoch_prompts(prompts, 7, 5, 2, {"position": 1, "counting": 2})
    assert one == epoch_prompts(prompts, 7, 5, 2, {"counting": 2, "position": 1})


def test_mix_errors():
    prompts = tagged(position=3, counting=3)
    with pytest.raises(ValueError, match=r"no prompt has the tag 'countng' \(did you mean 'counting'\?\), tags: count"):
        epoch_prompts(prompts, 2, 0, 0, {"countng": 1})
    with pytest.raises(ValueError, match=r"no prompt has the tag 'position', tags: none"):
        epoch_prompts([Prompt("a")], 2, 0, 0, {"position": 1})
    wrong: list[Any] = [-1, float("nan"), float("inf"), "1", True]
    for weight in wrong:
        with pytest.raises(ValueError, match=r"the weight of position must be a number of at least 0, got"):
            epoch_prompts(prompts, 2, 0, 0, {"position": weight})
    nothing: list[dict[str, float]] = [{}, {"position": 0}]
    for mix in nothing:
        with pytest.raises(ValueError, match="every weight is 0"):
            epoch_prompts(prompts, 2, 0, 0, mix)
    with pytest.raises(ValueError, match="no prompts to draw from"):
        epoch_prompts([], 2, 0, 0)

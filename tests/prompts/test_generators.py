"""Generated prompts: the mix, the grammar, what is held out, and the command that prints them."""

import json
from collections import Counter

import pytest

from fastflowgrpo.config import Config, PromptsConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.prompts import Prompt, check_metadata, general, geneval, load_prompts, ocr
from fastflowgrpo.prompts.__main__ import main
from fastflowgrpo.prompts.geneval import CLASSES, COLORS, meaning, plural, singular
from fastflowgrpo.prompts.sources import GENERATORS, run_prompts
from fastflowgrpo.rewards.ocr import quoted_text

PLURALS = """people bicycles cars motorcycles airplanes buses trains trucks boats traffic_lights fire_hydrants
stop_signs parking_meters benches birds cats dogs horses sheep cows elephants bears zebras giraffes backpacks
umbrellas handbags ties suitcases frisbees pairs_of_skis snowboards sports_balls kites baseball_bats baseball_gloves
skateboards surfboards tennis_rackets bottles wine_glasses cups forks knives spoons bowls bananas apples sandwiches
oranges heads_of_broccoli carrots hot_dogs pizzas donuts cakes chairs couches potted_plants beds dining_tables toilets
TVs laptops computer_mice TV_remotes computer_keyboards cell_phones microwaves ovens toasters sinks refrigerators
books clocks vases pairs_of_scissors teddy_bears hair_driers toothbrushes"""


def texts(prompts):
    return {prompt.text for prompt in prompts}


def meanings(prompts):
    return {meaning(prompt.metadata) for prompt in prompts}


def target(prompt):
    return quoted_text(prompt.text).replace(" ", "").lower()


def in_words(metadata):
    """The expected words of a prompt, derived from its metadata."""
    objects = [singular(item["class"], item.get("color", "")) for item in metadata["include"]]
    if metadata["tag"] == "counting":
        (item,) = metadata["include"]
        assert metadata["exclude"] == [{"class": item["class"], "count": item["count"] + 1}]
        return f"{ {2: 'two', 3: 'three', 4: 'four'}[item['count']] } {plural(item['class'])}"
    assert "exclude" not in metadata and all(item["count"] == 1 for item in metadata["include"])
    if metadata["tag"] == "position":
        return f"{objects[1]} {metadata['include'][1]['position'][0]} {objects[0]}"
    return " and ".join(objects)


def test_plurals_and_articles():
    assert [plural(label) for label in CLASSES] == [word.replace("_", " ") for word in PLURALS.split()]
    assert [singular(label) for label in ("orange", "tv", "scissors", "umbrella")] == [
        "an orange",
        "a TV",
        "a pair of scissors",
        "an umbrella",
    ]
    assert singular("bus", "orange") == "an orange bus" and singular("apple", "red") == "a red apple"
    assert singular("skis", "orange") == "a pair of orange skis"
    vowel = {label for label in CLASSES if singular(label).startswith("an ")}
    assert vowel == {"airplane", "elephant", "umbrella", "apple", "orange", "oven"}


def test_geneval_training_prompts():
    prompts = geneval.generate(1700, seed=1)
    assert Counter(prompt.metadata["tag"] for prompt in prompts) == {
        "position": 700,
        "counting": 500,
        "color_attr": 300,
        "colors": 100,
        "two_object": 100,
    }
    assert len(texts(prompts)) == 1700
    for prompt in prompts:
        check_metadata(prompt.metadata)
        assert prompt.metadata["prompt"] == prompt.text
        assert in_words(prompt.metadata) in prompt.text
        colors = [item["color"] for item in prompt.metadata["include"] if "color" in item]
        assert len(colors) == {"colors": 1, "color_attr": 2}.get(prompt.metadata["tag"], 0) == len(set(colors))
        assert set(colors) <= set(COLORS)
        labels = [item["class"] for item in prompt.metadata["include"]]
        assert len(labels) == len(set(labels)) and not (colors and "person" in labels)
    # There are 240 contents for 500 counting prompts, so other wordings are needed; no other tag needs them.
    plain = [prompt for prompt in prompts if prompt.text == f"a photo of {in_words(prompt.metadata)}"]
    assert len(plain) == 1700 - 500 + 240
    # The order is independent of the tag.
    assert len({prompt.metadata["tag"] for prompt in prompts[:40]}) > 3


def test_geneval_generation_is_a_function_of_the_seed():
    assert geneval.generate(50, 3) == geneval.generate(50, 3)
    assert texts(geneval.generate(50, 3)) != texts(geneval.generate(50, 4))
    assert [geneval.generate(n)[0].metadata["tag"] for n in (1,)] == ["position"]
    assert [len(geneval.generate(n)) for n in (1, 2, 16, 18, 33)] == [1, 2, 16, 18, 33]


def test_geneval_evaluation_has_the_official_balance_and_is_held_out():
    held_out = geneval.evaluation()
    assert Counter(prompt.metadata["tag"] for prompt in held_out) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert len(texts(held_out)) == len(meanings(held_out)) == 553
    assert all(prompt.text == f"a photo of {in_words(prompt.metadata)}" for prompt in held_out)
    train = geneval.generate(8000, exclude=held_out)
    assert len(train) == 8000 and meanings(train).isdisjoint(meanings(held_out))
    # Without the exclusion such prompts would appear.
    assert not meanings(geneval.generate(8000)).isdisjoint(meanings(held_out))


def test_a_relation_is_the_same_from_both_sides():
    def position(subject, relation, other):
        include = [{"class": other, "count": 1}, {"class": subject, "count": 1, "position": [relation, 0]}]
        return Prompt("x", {"tag": "position", "include": include})

    assert meaning(position("cat", "left of", "dog").metadata) == meaning(position("dog", "right of", "cat").metadata)
    assert meaning(position("cat", "above", "dog").metadata) == meaning(position("dog", "below", "cat").metadata)
    assert meaning(position("cat", "left of", "dog").metadata) != meaning(position("dog", "left of", "cat").metadata)
    train = geneval.generate(3000, exclude=[position("cat", "left of", label) for label in CLASSES if label != "cat"])
    told = [
        (item["include"][1]["class"], item["include"][1]["position"][0], item["include"][0]["class"])
        for item in (prompt.metadata for prompt in train)
        if item["tag"] == "position"
    ]
    assert len(told) > 1000
    assert not [x for x in told if x[:2] == ("cat", "left of") or x[1:] == ("right of", "cat")]
    assert [x for x in told if x[:2] == ("cat", "right of")]


def test_plain_exclusions_hold_by_text_whatever_their_case():
    first = geneval.generate(200, seed=2)
    excluded = [Prompt(prompt.text.upper()) for prompt in first[:100]]
    second = geneval.generate(200, seed=2, exclude=excluded)
    assert len(second) == 200 and texts(second).isdisjoint(texts(first[:100]))


def test_too_many_prompts_are_an_error():
    everything = [
        Prompt("x", {"include": [{"class": label, "count": n}]})
        for label in CLASSES
        for n in (2, 3, 4)
        if label != "cat"
    ]
    with pytest.raises(ValueError, match=r"^500 counting prompts were asked for, but only 420 are not excluded$"):
        geneval.generate(1700, exclude=everything)
    with pytest.raises(ValueError, match=r"^5 different prompts were asked for, but only 0 were found$"):
        ocr.generate(5, length=(60, 70))


def test_ocr_prompts_quote_one_text_of_the_length_asked_for():
    prompts = ocr.generate(3000, seed=5, length=(4, 9))
    assert len(texts(prompts)) == 3000
    assert {prompt.text.count('"') for prompt in prompts} == {2}
    assert {len(quoted_text(prompt.text)) for prompt in prompts} == set(range(4, 10))
    assert all(prompt.text == " ".join(prompt.text.split()) for prompt in prompts)
    default = ocr.generate(3000)
    lengths = Counter(len(quoted_text(prompt.text)) for prompt in default)
    assert min(lengths) >= 3 and max(lengths) <= 24 and len(lengths) > 15
    quoted = [quoted_text(prompt.text) for prompt in default]
    assert any(" " in text for text in quoted) and any(text.isupper() for text in quoted)
    assert any(character.isdigit() for text in quoted for character in text)


def test_ocr_evaluation_is_held_out_by_its_texts():
    held_out = ocr.evaluation()
    assert len(texts(held_out)) == 1024
    train = ocr.generate(4000, exclude=held_out)
    trained, tested = {target(prompt) for prompt in train}, {target(prompt) for prompt in held_out}
    assert trained.isdisjoint(tested) and len(trained) > 1500 and len(tested) > 400
    assert not {target(prompt) for prompt in ocr.generate(4000)}.isdisjoint(tested)
    # Training keeps most of the plain words and notices.
    assert len({text for text in trained if text in {word.lower() for word in ocr._NOUNS}}) > 40


def test_general_prompts():
    held_out = general.evaluation()
    train = general.generate(5000, exclude=held_out)
    assert len(texts(train)) == 5000 and len(texts(held_out)) == 512
    assert texts(train).isdisjoint(texts(held_out))
    assert texts(general.generate(100, 1)) != texts(general.generate(100, 2))


@pytest.mark.parametrize("name", GENERATORS)
def test_a_run_makes_its_prompts_with_held_out_ones(name, monkeypatch):
    monkeypatch.setattr(GENERATORS[name].generate, "__defaults__", (500, *GENERATORS[name].generate.__defaults__[1:]))
    train, held_out = run_prompts(Config(prompts=PromptsConfig(train=name)))
    assert len(train) == 500 and texts(train).isdisjoint(texts(held_out))
    other, again = run_prompts(Config(prompts=PromptsConfig(train=name), seed=7))
    assert held_out == again == GENERATORS[name].evaluation()
    assert texts(other) != texts(train)


def test_a_run_keeps_a_files_prompts_out_of_what_it_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(geneval.generate, "__defaults__", (800, 0, ()))
    held_out = geneval.generate(300, seed=0)
    path = tmp_path / "official.jsonl"
    path.write_text("\n".join(json.dumps(prompt.metadata) for prompt in held_out))
    train, evaluated = run_prompts(Config(prompts=PromptsConfig(train="geneval", eval=str(path))))
    assert evaluated == held_out and meanings(train).isdisjoint(meanings(held_out))


def test_a_run_names_the_setting_that_is_wrong(tmp_path):
    for setting in ("train", "eval"):
        with pytest.raises(UserError, match=rf"prompts\.{setting}: geneva: expected a \.txt file .*, or shapes"):
            run_prompts(Config(prompts=PromptsConfig(**{setting: "geneva"})))


def test_command(tmp_path, capsys):
    assert main(["geneval", "--evaluation"]) == 0
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(capsys.readouterr().out)
    assert load_prompts(str(evaluation)) == geneval.evaluation()
    arguments = ["geneval", "--count", "400", "--seed", "9", "--exclude", str(evaluation)]
    assert main(arguments) == 0
    train = tmp_path / "train.jsonl"
    train.write_text(capsys.readouterr().out)
    assert load_prompts(str(train)) == geneval.generate(400, 9, geneval.evaluation())
    assert main(["ocr", "--count", "20", "--length", "5", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20 and all(5 <= len(quoted_text(line)) <= 6 for line in lines)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: kind"),
        (["genevall"], "invalid choice: 'genevall'"),
        (["ocr", "--count", "0"], "--count must be at least 1, got 0"),
        (["ocr", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (["ocr", "--length", "9", "4"], "--length: the minimum, 9, is above the maximum, 4"),
        (["general", "--length", "4", "9"], "--length is for ocr, not for general"),
        (["geneval", "--evaluation", "--count", "5"], "--evaluation prints fixed prompts"),
        (["geneval", "--exclude", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["general", "--count", "9999999"], "9999999 different prompts were asked for"),
    ],
)
def test_command_errors(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(general, "_LIGHTS", general._LIGHTS[:1])
    monkeypatch.setattr(general, "_PLACES", general._PLACES[:1])
    monkeypatch.setattr(general, "_ACTIONS", general._ACTIONS[:1])
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("error: ") and err.count("\n") == 1

"""Means, standard errors and differences of an evaluation's values."""

import math

import numpy as np
import pytest
import torch

from fastflowgrpo.evaluation.statistics import Statistic, difference, measures, statistics
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards import Scores


def test_statistics():
    values = torch.tensor([[1.0, 3.0], [2.0, 6.0], [0.0, 0.0]])
    found = Statistic.of(values)
    per_prompt = values.mean(1)
    assert (found.mean, found.scored, found.missing) == (2.0, 6, 0)
    assert found.standard_error == pytest.approx(float(per_prompt.std() / 3**0.5))

    values[1, 1] = values[2] = math.nan  # of two prompts there remain two values and one
    found = Statistic.of(values)
    assert (found.mean, found.scored, found.missing) == (2.0, 3, 3)
    assert found.standard_error == 0  # 1 + 3 - 2 x 2 and 2 - 2
    values[1, 0] = 8.0
    residuals = np.array([1 + 3 - 2 * 4.0, 8 - 4.0])
    assert Statistic.of(values).standard_error == pytest.approx(math.sqrt(2 * (residuals**2).sum()) / 3)

    assert math.isnan(Statistic.of(values[:1]).standard_error)
    assert Statistic.of(values[:1]).mean == 2
    none = Statistic.of(torch.full((2, 2), math.nan))
    assert math.isnan(none.mean)
    assert (none.scored, none.missing) == (0, 4)
    parts = [Statistic(0.2, 0.3, 4, 0), Statistic(0.6, 0.4, 3, 1)]
    assert Statistic.average(parts) == Statistic(pytest.approx(0.4), pytest.approx(0.25), 7, 1)


def test_measures_and_their_difference():
    prompts = [Prompt("two dogs", {"tag": "counting"}), Prompt("a red dog", {"tag": "colors"})]

    def measured(*values):
        values = torch.tensor(values)
        return measures(prompts, 2, Scores(values, {"geneval/strict": values}), {"pixels": values[:2]})

    base, trained = measured(0.0, 1.0, math.nan, 1.0), measured(3.0, math.nan, 1.0, 0.0)
    found = statistics(difference(base, trained))["GenEval, strict"]
    assert set(found) == {"overall", "counting", "colors"}
    assert (found["counting"].mean, found["counting"].missing) == (3, 1)
    assert (found["colors"].mean, found["colors"].missing) == (-1, 1)
    assert found["overall"].mean == 1
    assert statistics(base)["GenEval, strict"]["overall"].mean == 0.75
    assert statistics(base)["Diversity"]["pixels"].mean == 0.5
    plain = measures([Prompt("a"), Prompt("b")], 2, Scores(torch.zeros(4), {}), {})
    assert {title: list(rows) for title, rows in plain.items()} == {"Scores": ["reward"]}

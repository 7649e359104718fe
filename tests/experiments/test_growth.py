"""Times by seed."""

from condzoo.experiments import collect, judge


def test_every_seed_is_measured_and_judged(tiny, tmp_path):
    data = collect(tiny("cost"), "cpu", tmp_path, seeds=[4, 5])
    assert [point["seed"] for point in data["points"]] == [4] * 6 + [5] * 6
    assert all(set(verdict.values) == {4, 5} for verdict in judge(tiny("cost"), data))

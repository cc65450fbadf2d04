"""The tables on reinforcement learning, from made-up results."""

import pytest

from experiments import published, rl_report

EMPTY = {"navigation": [], "bandits": [], "mdps": [], "mazes": []}


def metric(*means):
    return {"mean": list(means), "ci95": [0.5] * len(means)}


def flags_of(result):
    return [f"--{name} {value}" for name, value in result["config"].items() if name != "horizon"]


def rows_of(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def navigation_result(algorithm="maml", seed=0, **config):
    returns = [-40.0, -11.0, -4.0, -3.0, -3.5]
    return {
        "algorithm": algorithm,
        "seed": seed,
        "config": {"horizon": 100} | config,
        "evaluations": [
            {"goals": goals, "count": count, "optimum": -0.5, "metrics": {"return": metric(*returns)}}
            for goals, count in (("published", 40), ("fresh", 600))
        ],
        "rates": [0.5, 0.1, 0.1, 0.1],
        "policy_std": [0.41, 0.4],
        "meta_steps": 300,
        "seconds": {"train": 120.0},
    }


def test_returns_stand_beside_the_published_ones():
    results = [navigation_result(), navigation_result(surrogate="loaded-dice", seed=1)]
    rows = rows_of(rl_report.navigation_table(results, flags_of))
    assert rows[0][:4] == ["MAML", "0", "40 published", "-40.00 ± 0.50"]
    assert rows[1][2] == "600 fresh"
    assert rows[2][:2] == ["MAML, `--surrogate loaded-dice`", "1"]
    assert rows[-1][0] == "MAML, published values"
    assert rows[-1][3:8] == [str(number) for number in published.NAVIGATION["maml"]]
    assert rows[0][8:] == ["0.5, 0.1", "0.41", "300", "2 min"]


def test_several_seeds_have_a_mean():
    other = navigation_result(seed=1)
    for evaluation in other["evaluations"]:
        evaluation["metrics"]["return"] = metric(-42.0, -10.0, -3.0, -3.0, -2.5)
    rows = rows_of(rl_report.navigation_table([navigation_result(), other], flags_of))
    assert [row[0] for row in rows[:5]] == ["MAML"] * 4 + ["MAML, mean of 2 seeds"]
    assert rows[4][2:5] == ["40 published", "-41.00 (-42.00 to -40.00)", "-10.50 (-11.00 to -10.00)"]
    assert rows[5][2] == "600 fresh"


def test_another_horizon_is_not_compared_with_the_published_one():
    rows = rows_of(rl_report.navigation_table([navigation_result(horizon=50)], flags_of))
    assert not any("published values" in row[0] for row in rows)


def bandit_result(arms, reward, algorithm="rl2", seed=0):
    return {
        "seed": seed,
        "algorithm": algorithm,
        "regret": {{"rl2": "RL²", "maml": "MAML"}[algorithm]: [0.1, 0.2], "UCB1": [0.2, 0.3], "random": [0.3, 0.6]},
        "config": {"num_pulls": 10, "num_arms": arms},
        "metrics": {"reward": metric(reward), "reward_of_draws": metric(reward - 0.1)},
        "strategies": {"UCB1": metric(6.6) | {"parameter": 0.1}},
        "optimum": 6.66,
        "meta_steps": 900,
    }


def test_strategies_have_a_column_for_each_size():
    results = [bandit_result(10, 6.65), bandit_result(5, 6.55), bandit_result(5, 6.45, "maml")]
    table = rl_report.strategies_table(results, lambda result: [], published.BANDITS, rl_report.BANDIT_SIZES)
    assert table.splitlines()[0] == "|  | 10 pulls, 5 arms | 10 pulls, 10 arms | meta-steps |"
    rows = {row[0]: row[1:] for row in rows_of(table)}
    assert rows["RL²"] == ["6.55 ± 0.50 (published 6.7)", "6.65 ± 0.50 (published 6.7)", "900"]
    assert rows["RL², drawn actions"][0] == "6.45 ± 0.50"
    assert rows["MAML"] == ["6.45 ± 0.50 (published 6.5)", "", "900"]
    assert rows["UCB1"][0] == "6.60 ± 0.50 (published 6.7)"
    assert rows["largest that can be expected"] == ["6.660", "6.660", ""]
    longer = bandit_result(10, 6.65) | {"meta_steps": 3000}
    table = rl_report.strategies_table([results[1], longer], lambda r: [], published.BANDITS, rl_report.BANDIT_SIZES)
    assert {row[0]: row[-1] for row in rows_of(table)}["RL²"] == "900 / 3,000"


def test_runs_with_other_flags_have_rows_and_curves_of_their_own():
    results = [bandit_result(5, 6.55, "maml"), bandit_result(5, 6.35, "maml")]
    results[1]["config"]["no-learn-temperature"] = ""

    def flags(result):
        return ["--num-arms 5", *(["--no-learn-temperature"] if "no-learn-temperature" in result["config"] else [])]

    table = rl_report.strategies_table(results, flags, published.BANDITS, rl_report.BANDIT_SIZES)
    rows = {row[0]: row[1:] for row in rows_of(table)}
    assert rows["MAML, `--no-learn-temperature`"] == ["6.35 ± 0.50 (published 6.5)", "900"]
    curves = rl_report.regrets(results, flags)["10 pulls, 5 arms"]
    assert curves.keys() == {"MAML", "MAML, `--no-learn-temperature`", "UCB1", "random"}
    results[0]["config"]["num_pulls"] = 100
    assert rl_report.regrets(results, flags).keys() == {"100 pulls, 5 arms"}


def test_no_result_hides_another():
    results = [bandit_result(5, 6.55), bandit_result(5, 1.23, seed=1)]
    table = rl_report.strategies_table(results, lambda result: [], published.BANDITS, rl_report.BANDIT_SIZES)
    rows = {row[0]: row[1:] for row in rows_of(table)}
    assert rows["RL²"] == ["6.55 ± 0.50 (published 6.7)", "900"]
    assert rows["RL², seed 1"] == ["1.23 ± 0.50 (published 6.7)", "900"]
    others = results[1] | {"strategies": {name: metric(9.99) for name in results[1]["strategies"]}}
    mixed = rl_report.strategies_table([results[0], others], lambda r: [], published.BANDITS, rl_report.BANDIT_SIZES)
    assert "9.99" not in mixed
    with pytest.raises(ValueError, match="two results are RL², seed 1 in 10 pulls, 5 arms"):
        rl_report.strategies_table([*results, results[1]], lambda r: [], published.BANDITS, rl_report.BANDIT_SIZES)
    older = {name: value for name, value in results[0].items() if name != "regret"}
    assert rl_report.regrets([older, *results], lambda r: [])["10 pulls, 5 arms"].keys() == {"RL²", "UCB1", "random"}


def walks(steps):
    found = {"steps": steps, "success": (0.99, 1.0), "improved": (0.9,)}
    ways = ("draws", "most_probable")
    metrics = {f"{what}_of_{way}": metric(*values) for what, values in found.items() for way in ways}
    return {"metrics": metrics, "shortest_path": 5.5}


def test_walks_stand_beside_the_published_ones():
    larger = {"size": 9, "horizon": 400} | walks((80.0, 60.0))
    result = {"config": {"size": 5, "view": 3, "horizon": 100}, "meta_steps": 100, "seed": 0} | walks((20.0, 10.0))
    rows = rows_of(rl_report.mazes_table([result | {"larger": larger}], lambda r: ["--size 5", "--eval-episodes 9"]))
    assert [row[:2] for row in rows[:4]] == [
        [name, how]
        for name in ("5 x 5, view 3", "5 x 5, view 3, tested in 9 x 9")
        for how in ("drawn", "most probable")
    ]
    assert [row[2] for row in rows[:5]] == ["100", "100", "400", "400", ""]
    assert rows[0][5:7] == ["0.50", "99.0 / 100.0"]
    assert rows[2][3:6] == ["80.00 ± 0.50", "60.00 ± 0.50", "0.75"]
    assert rows[4][3:8] == ["52.4", "39.1", "0.75", "99.3 / 99.6", "91.7"]
    result["config"]["start_run"] = "runs/smaller"
    rows = rows_of(rl_report.mazes_table([result, result | {"seed": 1}], lambda r: ["--associate"]))
    assert len(rows) == 6
    assert rows[0][0] == "5 x 5, view 3, started from smaller, `--associate`"
    assert rows[2][0] == "5 x 5, view 3, started from smaller, `--associate`, seed 1"


def test_only_what_there_is_has_a_section(tmp_path):
    assert rl_report.section(EMPTY, flags_of) == ""
    text = rl_report.section(EMPTY | {"navigation": [navigation_result()]}, flags_of)
    assert "### 2D navigation" in text
    assert "### Bandits" not in text
    rl_report.draw(tmp_path, EMPTY | {"navigation": [navigation_result(), navigation_result(seed=1)]}, flags_of)
    assert (tmp_path / "navigation.png").exists()
    assert not (tmp_path / "regret.png").exists()
    rl_report.draw(tmp_path, EMPTY | {"bandits": [bandit_result(5, 6.5), bandit_result(10, 6.5)]}, flags_of)
    assert (tmp_path / "regret.png").exists()


def test_a_picture_of_what_the_policy_does_is_shown_if_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(rl_report, "FIGURES", tmp_path)
    without = rl_report.section(EMPTY | {"navigation": [navigation_result()]}, flags_of)
    (tmp_path / "navigation_behaviour.png").touch()
    shown = rl_report.section(EMPTY | {"navigation": [navigation_result()]}, flags_of)
    assert "navigation_behaviour" not in without
    assert "![what the policy does](figures/navigation_behaviour.png)" in shown


def test_trainings_of_another_length_are_other_methods():
    longer = navigation_result(seed=1) | {"meta_steps": 1000}
    rows = rows_of(rl_report.navigation_table([navigation_result(), longer], lambda result: ["--num-meta-steps 9"]))
    assert [row[0] for row in rows[:4]] == ["MAML, 300 meta-steps"] * 2 + ["MAML, 1,000 meta-steps"] * 2
    assert not any("mean of" in row[0] for row in rows)


def test_the_drawn_regret_is_that_of_the_longest_training_and_the_first_seed():
    def result(seed, meta_steps, regret):
        return bandit_result(5, 6.5, seed=seed) | {"meta_steps": meta_steps, "regret": {"RL²": regret}}

    results = [result(0, 900, [0.1]), result(2, 3000, [0.2]), result(1, 3000, [0.3])]
    assert rl_report.regrets(results, lambda r: []) == {"10 pulls, 5 arms": {"RL²": [0.3]}}


def test_the_optimum_is_stated_for_both_sets_of_goals():
    result = navigation_result()
    result["evaluations"][0]["optimum"], result["evaluations"][1]["optimum"] = -0.54, -0.5
    text = rl_report.section(EMPTY | {"navigation": [result]}, flags_of)
    assert "The optimum is -0.50 on the fresh goals and -0.54 on the published ones." in text

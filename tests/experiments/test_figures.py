"""What the lines, points and bands of the figures are, on made-up results."""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import cross_domain, few_shot_report, figures, report

RESULTS = Path(report.__file__).parent / "results"


def stored(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a test draws, in place of their files."""
    found = []
    monkeypatch.setattr(figures, "save", lambda figure, file: found.append(figure))
    yield found
    for figure in found:
        figures.plt.close(figure)


def numbers(line):
    """The places and values of a line."""
    return np.asarray(line.get_data(), float)


def lines(axes):
    """The numbers of every line of a panel with a name."""
    return {
        line.get_label(): tuple(numbers(line).tolist())
        for line in axes.get_lines()
        if not line.get_label().startswith("_")
    }


def band(axes, index, x):
    """The lowest and the highest number of a band at one place."""
    (path,) = axes.collections[index].get_paths()
    of_x = [y for at, y in path.vertices if at == x]
    return min(of_x), max(of_x)


def bars(axes):
    """Place, value, lower and upper end of every errorbar of one point, in the order in which they were drawn."""
    found = []
    for container in axes.containers:
        ((x, y),) = np.transpose(container.lines[0].get_data())
        ((_, low), (_, high)) = container.lines[2][0].get_segments()[0]
        found.append((x, y, low, high))
    return found


def test_errors_against_inner_steps_are_medians_over_tasks_in_a_panel_for_each_number_of_points(drawn):
    def evaluation(shot, *medians):
        return {"shot": shot, "metrics": {"mse": {"median": list(medians), "mean": [90.0, 80.0]}}}

    of_seeds = [evaluation(10, 0.5, 0.25), evaluation(5, 4.0, 2.0), evaluation(5, 2.0, 1.0)]
    figures.inner_curves(None, {"maml": of_seeds, "pretrained": [evaluation(5, 6.0, 7.0), evaluation(10, 8.0, 9.0)]})
    five, ten = drawn[0].axes
    assert (five.get_title(), ten.get_title()) == ("5 support points", "10 support points")
    names = figures.title("maml"), figures.title("pretrained")
    assert lines(five) == {names[0]: ([0, 1], [3.0, 1.5]), names[1]: ([0, 1], [6.0, 7.0])}
    assert lines(ten) == {names[0]: ([0, 1], [0.5, 0.25]), names[1]: ([0, 1], [8.0, 9.0])}
    assert five.get_yscale() == "log"


def test_the_band_of_the_orders_goes_from_the_smallest_to_the_largest_seed(drawn):
    panel = {"MAML": [[9.0, 2.0], [9.0, 1.0], [9.0, 6.0]], "FOMAML": [[9.0, 7.0], [9.0, 8.0], [9.0, 8.0]]}
    curves = {"MAML": [[{"step": 100, "loss": loss}, {"step": 200, "loss": 1.0}] for loss in (4.0, 8.0)]}
    figures.orders(None, curves, {("sinusoids", "median squared error"): panel})
    training, test = drawn[0].axes
    assert lines(training) == {"MAML": ([100, 200], [6.0, 1.0])}
    assert band(training, 0, 100) == (4.0, 8.0)
    assert lines(test)["MAML"] == ([0, 1], [9.0, 3.0])
    assert [band(test, index, 1) for index in (0, 1)] == [(1.0, 6.0), (7.0, 8.0)]
    assert (training.get_yscale(), test.get_yscale()) == ("log", "log")


def test_accuracies_stand_at_their_inner_steps_and_at_the_computed_time(drawn):
    def result(*mean):
        return {"metrics": {"accuracy": {"mean": list(mean), "ci95": [0.5, 0.5, 0.02]}}}

    results = {"maml": [result(0.2, 0.9, 0.7)], "fomaml": [result(0.2, 0.5, 0.6), result(0.2, 0.7, 0.8)]}
    figures.accuracy(None, results, {"maml": 3.0, "fomaml": 1.0})
    left, right = drawn[0].axes
    found = lines(left)
    np.testing.assert_allclose(found["MAML"], ([1, 2], [90.0, 70.0]))
    np.testing.assert_allclose(found["FOMAML"], ([1, 2], [60.0, 70.0]))
    np.testing.assert_allclose(bars(right), [(3.0, 70.0, 68.0, 72.0), (1.0, 70.0, 60.0, 80.0)])
    assert right.get_xscale() == "log"


def test_an_accuracy_stands_at_the_minutes_of_the_training_in_its_setting(drawn):
    first = {"algorithm": "maml", "meta_steps": 9, "protocol": {}, "seconds": {"train": 60.0}}
    accuracy = {(5, 1): [(0.9, 0.05)], (20, 1): [(0.6, 0.1), (0.8, 0.1)], (5, 5): [(0.99, 0.001)]}
    minutes = {(5, 1): 4.0, (20, 1): 7.0, (5, 5): 9.0}
    figures.accuracy_against_time(None, [{"name": "MAML", "first": first, "accuracy": accuracy, "minutes": minutes}])
    five, twenty = drawn[0].axes
    np.testing.assert_allclose(bars(five), [(4.0, 0.9, 0.85, 0.95)])
    np.testing.assert_allclose(bars(twenty), [(7.0, 0.7, 0.6, 0.8)])


def test_learning_curves_of_seeds_are_means_of_logarithms_beside_plain_means_of_scores(drawn):
    logs = [[{"step": 10, "loss": loss}, {"step": 20, "val": val}] for loss, val in ((1.0, 0.25), (100.0, 0.75))]
    figures.learning_curves(None, {"maml": logs})
    training, validation = drawn[0].axes
    for axes, expected in ((training, ([10], [10.0])), (validation, ([20], [0.5]))):
        np.testing.assert_allclose(numbers(axes.get_lines()[0]), expected)
    # Of the logarithms 0 and 4.6 the mean has the standard error 2.3, and Student's t with 1 degree of freedom 12.7062.
    half = 12.7062 * np.log(10.0)
    np.testing.assert_allclose(np.log(band(training, 0, 10)), [np.log(10) - half, np.log(10) + half], rtol=1e-4)
    np.testing.assert_allclose(band(validation, 0, 20), [0.5 - 12.7062 * 0.25, 0.5 + 12.7062 * 0.25], rtol=1e-4)
    assert (training.get_yscale(), validation.get_yscale()) == ("log", "linear")


def test_schedules_are_rates_and_momenta_and_the_filled_loss_is_that_of_the_test(drawn):
    def method(rate, momentum, heldout, test):
        logits = [float(np.log(momentum / (1 - momentum)))] * 2
        losses = {"heldout_loss": {"mean": heldout, "ci95": 0.5}, "test_loss": {"mean": test, "ci95": 0.25}}
        layers = {name: [float(np.log(rate))] * 2 for name in ("dense_0", "dense_1")}
        return {"hyperparameters": {"log_rates": layers, "momentum_logits": logits}} | losses

    methods = {"before learning": method(9.0, 0.5, 9.0, 9.0), "constant rate": method(0.1, 0.75, 1.0, 2.0)}
    methods["hypergradients"] = method(0.4, 0.25, 3.0, 4.0)
    figures.schedules(None, methods)
    rates, momenta, scores = drawn[0].axes
    of_layers = {f"hypergradients, dense_{layer}": 0.4 for layer in (0, 1)}
    for axes, expected in (
        (rates, {"constant rate": 0.1} | of_layers),
        (momenta, {"constant rate": 0.75, "hypergradients": 0.25}),
    ):
        found = lines(axes)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], ([0, 1], [value] * 2))
    found = {}
    for container in scores.containers:
        line = container.lines[0]
        found.setdefault(line.get_markerfacecolor() == "none", []).append(line.get_xdata()[0])
    assert found == {True: [1.0, 3.0], False: [2.0, 4.0]}
    assert [label.get_text() for label in scores.get_yticklabels()] == ["constant rate", "hypergradients"]


def test_memory_is_in_megabytes_against_mini_batches(drawn):
    rows = [
        {"inner_steps": steps, "way": way, "temporary_bytes": 1e6 * steps * factor}
        for steps in (50, 100)
        for way, factor in (("mixed mode", 1), ("reverse over reverse", 3))
    ]
    figures.memory(None, rows)
    assert lines(drawn[0].axes[0]) == {
        "mixed mode": ([50, 100], [50.0, 100.0]),
        "reverse over reverse": ([50, 100], [150.0, 300.0]),
    }


def test_a_number_of_points_that_the_first_command_has_not_tested_has_a_panel_too(drawn):
    def evaluation(shot, median):
        return {"shot": shot, "metrics": {"mse": {"median": [median] * 2}}}

    figures.inner_curves(None, {"a": [evaluation(5, 1.0)], "b": [evaluation(5, 2.0), evaluation(10, 3.0)]})
    five, ten = drawn[0].axes
    assert lines(five).keys() == {"a", "b"}
    assert lines(ten) == {"b": ([0, 1], [3.0, 3.0])}
    figures.inner_curves(None, {"a": [evaluation(10, 1.0)], "b": [evaluation(5, 2.0)]})
    (legend,) = drawn[1].legends
    assert {text.get_text() for text in legend.get_texts()} == {"a", "b"}


def test_a_return_has_the_interval_over_seeds_if_there_are_several(drawn):
    def result(*mean):
        return {"evaluations": [{"metrics": {"return": {"mean": list(mean), "ci95": [0.5, 0.25]}}}]}

    results = {"one": [result(-9.0, -3.0)], "two": [result(-8.0, -2.0), result(-8.0, -4.0)]}
    figures.returns(None, results, {"two": [-7.0, -1.0, -0.5]})
    for axes in drawn[0].axes:
        one, two = axes.containers
        for container, mean, half in ((one, [-9.0, -3.0], [0.5, 0.25]), (two, [-8.0, -3.0], [0.0, 12.7062])):
            np.testing.assert_allclose(numbers(container.lines[0]), ([0, 1], mean))
            ends = [[y for _, y in segment] for segment in container.lines[2][0].get_segments()]
            np.testing.assert_allclose(ends, [[m - h, m + h] for m, h in zip(mean, half, strict=True)], rtol=1e-4)
        assert lines(axes)["two, published"] == ([0, 1], [-7.0, -1.0])


def test_regrets_begin_with_the_first_pull(drawn):
    figures.regrets(None, {"5 arms": {"RL²": [1.0, 1.5], "random": [2.0, 4.0]}})
    assert lines(drawn[0].axes[0]) == {"RL²": ([1, 2], [1.0, 1.5]), "random": ([1, 2], [2.0, 4.0])}


def test_a_roc_is_the_rate_of_true_accepts_against_that_of_false_ones(drawn):
    rates = np.linspace(0.2, 1.0, len(figures.ROC_POINTS))
    figures.roc(None, {"edges": {"ERM": rates}})
    (axes,) = drawn[0].axes
    np.testing.assert_allclose(lines(axes)["ERM"], (figures.ROC_POINTS, rates))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("false accept rate", "true accept rate")


def test_bleu_is_that_of_one_kind_of_state_with_the_interval_over_draws(drawn):
    def row(pairs, state, *bleu, language="pt"):
        return {"language": language, "state": state, "pairs": pairs, "bleu": list(bleu)}

    rows = [row(500, "last", 3.0, 5.0), row(500, "selected", 90.0, 90.0), row(0, "last", 1.0)]
    figures.low_resource(None, {"": {"MAML": [*rows, row(9, "last", 7.0, language="cs")]}})
    pt, cs = drawn[0].axes
    (container,) = pt.containers
    np.testing.assert_allclose(numbers(container.lines[0]), ([500, 0], [4.0, 1.0]))
    ends = [[y for _, y in segment] for segment in container.lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, [[4 - 12.7062, 4 + 12.7062], [1.0, 1.0]], rtol=1e-4)
    np.testing.assert_allclose(numbers(cs.containers[0].lines[0]), ([9], [7.0]))


def test_a_smooth_line_is_the_mean_over_its_neighbours():
    np.testing.assert_allclose(figures._smooth(np.array([0.0, 3.0, 6.0, 0.0]), 3), [1.5, 3.0, 3.0, 3.0])
    values = np.arange(42.0) ** 2
    assert figures._smooth(values)[20] == values[10:31].mean()


def test_the_path_of_a_walk_is_drawn_in_rows_and_columns(drawn):
    maze = SimpleNamespace(walls=np.zeros((3, 4)), start=np.array([0, 1]), goal=np.array([2, 3]))
    squares = np.array([[0, 1], [1, 1], [2, 3]])
    figures.mazes(None, [{"maze": maze, "walks": [squares]}])
    path, start, goal = drawn[0].axes[0].get_lines()
    np.testing.assert_allclose(path.get_xydata(), squares[:, ::-1], atol=0.25)
    np.testing.assert_allclose([start.get_xydata()[0], goal.get_xydata()[0]], [(1, 0), (3, 2)])


def test_accuracies_of_data_sets_stand_beside_their_chance(drawn):
    def cell(mean):
        return {"accuracy": {"mean": [mean], "ci95": [0.05]}}

    records = [
        {"label": "a", "data_sets": {"digits": cell(0.5), "signs": cell(0.7)}},
        {"label": "b", "data_sets": {"digits": {"not_tested": "5 ways only"}, "signs": cell(0.9)}},
    ]
    results = {"methods": records, "data_sets": {"digits": {"chance": 0.2}, "signs": {"chance": 0.1}}}
    cross_domain.draw(None, results)
    (axes,) = drawn[0].axes
    a, b = axes.containers
    np.testing.assert_allclose(numbers(a.lines[0])[1], [50.0, 70.0])
    np.testing.assert_allclose(np.rint(numbers(a.lines[0])[0]), [0, 1])
    np.testing.assert_allclose(numbers(b.lines[0])[1], [90.0])
    np.testing.assert_allclose(np.rint(numbers(b.lines[0])[0]), [1])
    chances = [line.get_ydata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"]
    np.testing.assert_allclose(chances, [20.0, 10.0])


# What the report gives to its figures


def test_the_computed_time_of_a_training_is_its_tasks_times_the_time_of_a_task(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(figures, "accuracy", lambda file, results, relative: given.update(relative))
    costs = {name: {"times_fomaml": {"median": median}} for name, median in (("fomaml", 1.0), ("maml", 2.0))}
    monkeypatch.setattr(few_shot_report, "relative_costs", lambda: costs)
    made = [{"algorithm": name, "meta_steps": 1000, "config": {"meta_batch_size": tasks}}
            for name, tasks in (("maml", 24), ("fomaml", 8), ("cavia", 1))]  # fmt: skip
    monkeypatch.setattr(few_shot_report, "equal_budget", lambda results: made)
    monkeypatch.setattr(few_shot_report, "order_of", lambda result: result["algorithm"])
    few_shot_report.draw(tmp_path, defaultdict(list))
    assert given == {"fomaml": 1.0, "maml": 6.0}


def test_the_figure_of_minutes_on_a_cpu_has_no_training_on_a_gpu(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "accuracy_against_time", lambda file, records: shown.extend(records))
    monkeypatch.setattr(figures, "accuracy", lambda *_: None)
    (cpu, *_) = [stored(file.stem) for file in sorted(RESULTS.glob("omniglot_protonets*.json"))]
    cpu["device"] = "AMD EPYC, 2 cores"
    gpu = cpu | {"device": "1 x NVIDIA H200", "algorithm": "matching"}
    few_shot_report.draw(tmp_path, defaultdict(list, omniglot=[cpu, gpu]))
    assert [record["first"]["algorithm"] for record in shown] == ["protonets"]


def test_the_orders_are_compared_in_runs_of_the_recipe_with_five_points_and_in_5_way_1_shot():
    of = defaultdict(list)
    for name in ("maml", "fomaml"):
        plain = stored(f"sinusoid_{name}_seed-0")
        of["sinusoid"] += [plain, plain | {"config": plain["config"] | {"inner_lr": 0.01}}]
        for file in sorted(RESULTS.glob(f"omniglot_{name}_*.json")):
            of["omniglot"].append(stored(file.stem))
    panels = report.orders_panels(of)
    for name in ("maml", "fomaml"):
        (five,) = [e for e in stored(f"sinusoid_{name}_seed-0")["evaluations"] if e["shot"] == 5]
        found = panels["sinusoids, test with 5 points", "median squared error"][figures.title(name)]
        assert found == [five["metrics"]["mse"]["median"]]
        wanted = stored(f"omniglot_{name}_seed-0")
        assert (wanted["config"]["way"], wanted["config"]["shot"], wanted["meta_steps"]) == (5, 1, 60_000)
        (found,) = panels["Omniglot, after 60,000 meta-steps", "test accuracy, %"][figures.title(name)]
        np.testing.assert_allclose(found, 100 * np.array(wanted["metrics"]["accuracy"]["mean"]))


def test_the_drawn_schedules_are_those_of_the_command_with_the_fewest_flags(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(figures, "schedules", lambda file, methods: given.update(methods=methods))
    monkeypatch.setattr(figures, "memory", lambda file, rows: given.update(rows=rows))
    plain = stored("hyperparameters_hypergradient_seed-0")
    other = plain | {"config": plain["config"] | {"num_meta_steps": 7}, "methods": {}, "memory": []}
    report.draw(tmp_path, defaultdict(list, hyperparameters=[other, plain]), {})
    assert given == {"methods": plain["methods"], "rows": plain["memory"]}


def test_the_training_of_both_orders_is_drawn_at_the_rate_of_the_recipe(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(figures, "orders", lambda file, curves, panels: given.update(curves))
    monkeypatch.setattr(figures, "learning_curves", lambda *_: None)
    monkeypatch.setattr(report, "orders_panels", lambda of: {"panel": {}})
    names = {label: figures.title(label) for label in ("maml", "fomaml")}
    curves = {f"{name}, rate {rate}": [f"{name} {rate}"] for name in names.values() for rate in (0.001, 0.01)}
    report.draw(tmp_path, defaultdict(list), curves)
    assert given == {name: [f"{name} 0.001"] for name in names.values()}

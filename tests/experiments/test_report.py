"""The report is what the committed results say, and the README's examples run."""

import dataclasses
import errno
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import chex
import jax
import numpy as np
import optax
import PIL.Image
import PIL.ImageDraw
import pytest
from scipy import stats

import maml_jax
from experiments import cli, commands, common, few_shot_report, figures, omniglot, published, report, runs, sinusoid
from maml_jax import models, tasks

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"


def test_the_bar_of_several_seeds_ends_at_the_smallest_and_the_largest():
    mean, bar = figures.mean_and_bar([(63.0, 1.8), (64.0, 1.9), (41.0, 1.9)])
    np.testing.assert_allclose((mean, *bar.ravel()), (56.0, 15.0, 8.0))
    mean, bar = figures.mean_and_bar([(63.0, 1.8)])
    np.testing.assert_allclose((mean, *bar.ravel()), (63.0, 1.8, 1.8))
    assert np.isnan(figures.mean_and_bar([(None, None)])[0])


def test_a_training_that_diverged_is_drawn_and_the_others_beside_it(tmp_path):
    kept = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("omniglot_*maml_*seed-0.json"))]
    (first, *_) = [result for result in kept if result["algorithm"] == "maml" and result["meta_steps"] == 60_000]
    for statistic in ("mean", "ci95"):
        first["metrics"]["accuracy"][statistic][-1] = None
    (tmp_path / "figures").mkdir()
    few_shot_report.draw(tmp_path / "figures", defaultdict(list, omniglot=kept))
    panels = {("Omniglot", "accuracy, %"): {"MAML": [[20.0, np.nan]], "FOMAML": [[20.0, np.nan]]}}
    curves = {name: [[{"step": step, "loss": 0.5} for step in (100, 200)]] for name in ("MAML", "FOMAML")}
    figures.orders(tmp_path / "orders.png", curves, panels)


def test_report_and_pages_are_those_of_the_committed_results(tmp_path):
    assert {page.relative_to(ROOT).as_posix() for page in report.PAGES} == {"README.md", "experiments/GUIDE.md"}
    copies = [Path(shutil.copy(page, tmp_path / page.name)) for page in report.PAGES]
    report.write(RESULTS, tmp_path / "RESULTS.md", copies)
    for name in ("RESULTS.md", "PROVENANCE.md"):
        assert (tmp_path / name).read_text() == (ROOT / "experiments" / name).read_text()
    for page, copy in zip(report.PAGES, copies, strict=True):
        assert copy.read_text() == page.read_text()


def draw_symbols(directory):
    """A stroke that stands and one that lies, as examples of two classes, and another one that stands."""

    def draw(file, *line):
        file.parent.mkdir(parents=True, exist_ok=True)
        image = PIL.Image.new("L", (105, 105), 255)
        PIL.ImageDraw.Draw(image).line(line, fill=0, width=4)
        image.save(file)

    draw(directory / "my_symbols" / "lying" / "1.png", 20, 50, 85, 52)
    draw(directory / "my_symbols" / "standing" / "1.png", 50, 20, 52, 85)
    draw(directory / "new.png", 55, 15, 52, 88)


def test_examples_of_the_readme_run(tmp_path, monkeypatch):
    # The examples write to the working directory, and one reads a run of `make demo` from it.
    monkeypatch.chdir(tmp_path)
    settings = {"num_meta_steps": 1, "val_every": 1, "log_every": 1, "meta_batch_size": 1}
    config = dataclasses.replace(sinusoid.METHODS["maml"], run_dir=Path("runs/demo/maml"), **settings)
    config = sinusoid.with_paper_defaults(config)
    with runs.open_run(config.run_dir, config):
        learner = sinusoid.make_learner(config, inner_lr=0.001, num_inner_steps=1)
        training = common.Training(learner, tasks.sinusoid.make_sampler(shot=10, query_shot=10))
        trained = common.train(config.run_dir, config, training)

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 11
    draw_symbols(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    found, of_block = {}, []
    assert "num_steps=5000" in blocks[0]
    for block in blocks:
        exec(block.replace("num_steps=5000", "num_steps=1000"), found)
        of_block.append(dict(found))

    first, adapted, evaluated, lines, algorithm = (of_block[index] for index in (0, 1, 2, 5, 7))
    for training, num_steps in ((first, 1000), (lines, 200)):
        loss = training["info"].loss
        assert loss.shape == (num_steps,)
        assert float(loss[-50:].mean()) < 0.8 * float(loss[:50].mean())
    assert adapted["predictions"].shape == (3, 1)
    assert float(adapted["info"].support_loss[-1]) < float(adapted["info"].support_loss[0])
    assert evaluated["result"].mean.shape == (6,)
    assert evaluated["result"].mean[-1] < evaluated["result"].mean[0]
    assert of_block[6]["episode"].support.inputs.shape == (2, 28, 28, 1)
    assert found["predictions"].shape == (3, 1)
    assert found["config"].algorithm == "maml"
    chex.assert_trees_all_equal(found["params"], trained.params)
    chex.assert_shape(found["probabilities"], (1, 2))
    assert found["names"][int(found["probabilities"][0].argmax())] == "standing"

    # Meta-SGD with equal rates is MAML.
    episode = lines["sample_line"](jax.random.key(0))
    maml = maml_jax.maml(
        models.mlp(features=(40, 40, 1)), found["huber"], inner_optimizer=optax.sgd(0.01), num_inner_steps=5
    )
    meta_params = algorithm["learner"].init(jax.random.key(1), episode.support.inputs)
    losses = [
        learner.objective(params, episode)[0]
        for learner, params in ((algorithm["learner"], meta_params), (maml, meta_params["params"]))
    ]
    chex.assert_trees_all_close(*losses, rtol=1e-6)


@pytest.mark.parametrize(
    ("experiment", "flags"),
    [
        ("sinusoid", "maml"),
        ("sinusoid", "pretrained"),
        ("sinusoid", "maml --inner-lr 0.01"),
        ("sinusoid", "reptile --num-inner-steps 5"),
        ("omniglot", "maml --way 20"),
        ("omniglot", "fomaml --shot 5 --no-rotations"),
        ("navigation", "maml --surrogate loaded-dice"),
        ("bandits", "rl2 --num-arms 10 --decay 0.3"),
        ("mdps", "rl2"),
        ("mazes", "rl2 --size 9"),
    ],
)
def test_the_command_is_recovered_from_the_results(experiment, flags):
    module = commands.EXPERIMENTS[experiment]
    config = module.with_paper_defaults(cli.parse(module.METHODS, "", [*flags.split(), "--seed", "3"]))
    results = {"experiment": experiment, "algorithm": config.algorithm, "config": runs.as_json(config)}
    assert commands.command(results) == f"python -m experiments.{experiment} {flags}"


def test_a_short_curve_is_reported(tmp_path):
    results = json.loads((RESULTS / "sinusoid_maml_seed-0.json").read_text())
    for evaluation in results["evaluations"]:
        for name, values in evaluation["metrics"]["mse"].items():
            evaluation["metrics"]["mse"][name] = values[:4]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "short.json").write_text(json.dumps(results))
    report.write(tmp_path / "results", tmp_path / "RESULTS.md")
    row = next(line for line in (tmp_path / "RESULTS.md").read_text().splitlines() if line.startswith("| MAML |"))
    _, _, _, one_step, five_steps, ten_steps, _, median, diverged, *_ = row.split("|")
    assert float(one_step) < 1.0
    assert [cell.strip() for cell in (five_steps, ten_steps, median, diverged)] == [""] * 4


def test_the_published_network_without_convolutions_stands_beside_its_published_number():
    results = json.loads((RESULTS / "omniglot_maml_seed-0.json").read_text())
    results["config"]["network"] = "mlp"
    assert few_shot_report.as_published(results)
    row = few_shot_report.omniglot_table([results]).splitlines()[2].split(" | ")
    assert row[0] == "| MAML, `--network mlp`"
    assert row[3] == published.OMNIGLOT["maml", "mlp", 5, 1]
    assert few_shot_report.has_smaller_budget(results | {"meta_steps": 1000})
    for departure in ({"network": "multi-scale"}, {"inner_lr": 0.5}):
        other = results | {"config": results["config"] | departure}
        assert few_shot_report.departures(other)
        assert not few_shot_report.as_published(other)
        assert not few_shot_report.has_smaller_budget(other)


def test_the_longest_training_of_a_method_in_each_setting_is_shown():
    def record(name, algorithm, meta_steps, *settings, flags=(), head=""):
        first = {"algorithm": algorithm, "meta_steps": meta_steps}
        return {"name": name, "first": first, "accuracy": dict.fromkeys(settings), "flags": flags, "head": head}

    records = [
        record("short", "maml", 1000, (5, 1), (5, 5)),
        record("long", "maml", 8000, (5, 1)),
        record("changed", "maml", 60_000, (5, 1), flags=("--network mlp",)),
        record("other setting", "maml", 400, (20, 1)),
        record("only changed", "leo", 10, (5, 1), flags=("--dropout-rate 0",)),
        *(record(head, "pretrained-classifier", 10, (5, 1), head=head) for head in ("linear", "centroid")),
    ]
    shown = few_shot_report.longest(records, [(5, 1), (20, 1)])
    assert [kept["name"] for kept in shown] == ["long", "other setting", "only changed", "linear", "centroid"]


def test_a_time_names_the_device_unless_it_is_a_cpu():
    def seeds(device, *minutes):
        return [{"device": device, "seconds": {"train": 60 * of_seed}} for of_seed in minutes]

    on_cpu, on_gpu = seeds("AMD EPYC, 2 cores", 4, 5.2), seeds("1 x NVIDIA H200", 7)
    assert few_shot_report.training_time(on_cpu) == "5 min"
    assert few_shot_report.training_time(on_gpu, seeds("1 x NVIDIA H200", 8)) == "7 / 8 min, 1 x NVIDIA H200"
    assert few_shot_report.training_time(on_gpu, on_cpu) == "7 min, 1 x NVIDIA H200 / 5 min"


def test_costs_are_those_of_a_task():
    def result(**execution):
        return {"config": {"meta_batch_size": 8}, "execution": execution}

    counted = result(flops=40_000_000_000, temporary_bytes=3_000_000)
    assert few_shot_report.cost_cells(counted) == ["5", "3"]
    assert few_shot_report.cost_cells(result()) == ["", ""]


def test_the_table_of_full_trainings_has_relative_costs_where_they_were_measured_and_names_an_ensemble():
    results = json.loads((RESULTS / "omniglot_maml++_val-every-500_seed-0.json").read_text())
    row = few_shot_report.omniglot_table([results], with_costs=True).splitlines()[2].split(" | ")
    assert row[0] == "| MAML++, ensemble of 5"
    assert all(float(cell.removesuffix(" |")) > 1.0 for cell in row[-3:])
    results["config"]["shot"] = 5
    row = few_shot_report.omniglot_table([results], with_costs=True).splitlines()[2].split(" | ")
    assert [cell.removesuffix(" |").strip() for cell in row[-3:]] == [""] * 3


def test_equal_meta_steps_are_compared_with_measured_costs():
    def result(algorithm, steps, **settings):
        config = omniglot.with_paper_defaults(dataclasses.replace(omniglot.METHODS[algorithm], **settings))
        stored = runs.as_json(config) | {"num_meta_steps": steps}
        accuracy = {"mean": [0.2, 0.7], "ci95": [0.01, 0.02]}
        return {
            "experiment": "omniglot",
            "algorithm": algorithm,
            "config": stored,
            "meta_steps": steps,
            "metrics": {"accuracy": accuracy},
        }

    equal = [result("fomaml", 1000), result("maml", 1000)]
    others = [result("maml", 5000), result("maml", 1000, shot=5), result("anil", 60_000), result("boil", 5000, way=20)]
    assert few_shot_report.equal_budget([*others, *equal]) == equal
    assert few_shot_report.equal_budget([]) == []
    maml, fomaml = (line.split(" | ") for line in few_shot_report.budget_table(equal).splitlines()[2:])
    assert (maml[:4], maml[5:7]) == (["| MAML", "70.00 ± 2.00", "1", "2"], ["1,000", "32"])
    assert fomaml[7:] == ["1.0", "1.0", "1.0", published.OMNIGLOT["fomaml", "conv4", 5, 1] + " |"]
    assert all(float(cell) > 1.0 for cell in maml[7:10])
    told = few_shot_report.shorter_trainings([*equal, *others])
    assert "MAML in 5-way 1-shot (5,000 of 60,000); MAML in 5-way 5-shot (1,000 of 60,000); FOMAML in" in told
    assert "BOIL in 20-way 1-shot (5,000 of 60,000)" in told
    assert "ANIL" not in told
    assert few_shot_report.shorter_trainings([others[2]]) == ""
    whole = result("maml", 60000, shot=5)
    of_network = whole | {"config": whole["config"] | {"network": "mlp"}}
    assert "MAML in 5-way 5-shot (1,000 of 60,000)" in few_shot_report.shorter_trainings([*others, of_network])
    inductive = result("reptile", 1000, inductive=True)
    assert few_shot_report.equal_budget([*others, *equal, inductive]) == equal
    assert few_shot_report.departures(inductive) == []
    assert few_shot_report.departures(result("maml", 1000, inductive=True)) == ["--inductive"]
    assert few_shot_report.published_accuracy(inductive, 5, 1) == published.OMNIGLOT_INDUCTIVE["reptile", "conv4", 5, 1]
    better = result("maml", 1000, seed=1) | {"metrics": {"accuracy": {"mean": [0.2, 0.8], "ci95": [0.01, 0.02]}}}
    of_seeds = few_shot_report.budget_table([*equal, better]).splitlines()[2].split(" | ")
    assert of_seeds[1:3] == ["75.00 (70.00–80.00)", "2"]


def test_differences_of_domains_are_paired_by_seed():
    def result(algorithm, seed, accuracy):
        scores = {"accuracy": {"mean": [accuracy]}}
        config = {"data": "pacs", "held_out": "photo", "seed": seed}
        found = {"experiment": "domains", "algorithm": algorithm, "seed": seed, "config": config, "meta_steps": 10}
        return found | {"metrics": scores, "source_validation": scores}

    results = [result("mldg", 0, 0.5), result("mldg", 1, 0.7), result("mldg", 2, 0.9)]
    results += [result("erm", 1, 0.6), result("erm", 0, 0.6)]
    # Seeds 0 and 1 have the differences -10 and 10; Student's t with one degree of freedom is 12.706.
    row = report.domain_table(results).splitlines()[2].split(" | ")
    assert row[4] == "0.00 ± 127.06"
    assert report.domain_table(results[:2]).splitlines()[2].split(" | ")[3] == ""


def test_mldg_is_beside_the_erm_of_equal_meta_steps_and_of_equal_operations():
    def result(algorithm, steps, accuracy, flops, **settings):
        stored = json.loads((RESULTS / f"domains_{algorithm}_seed-0.json").read_text())
        scores = {"accuracy": {"mean": [accuracy]}}
        changes = {"meta_steps": steps, "metrics": scores, "source_validation": scores, "execution": {"flops": flops}}
        return stored | changes | {"config": stored["config"] | settings | {"num_meta_steps": steps}}

    results = [
        result("mldg", 10, 0.5, 30), result("mldg", 10, 0.4, 30, inner_lr=0.1), result("mldg", 90, 0.9, 30),
        result("erm", 10, 0.6, 10), result("erm", 30, 0.7, 10),
    ]  # fmt: skip
    rows = [line.strip("| ").split(" | ") for line in report.domain_table(results).splitlines()[2:]]
    assert [[row[0], row[2][:5], row[3][:5], *row[-3:-1]] for row in rows] == [
        ["rotated-omniglot", "50.00", "60.00", "10", "3.0"],
        ["rotated-omniglot", "90.00", "", "90", ""],
        ["rotated-omniglot, `--inner-lr 0.1`", "40.00", "60.00", "10", "3.0"],
        ["rotated-omniglot", "50.00", "70.00", "10 / 30", "1.0"],
    ]


def test_runs_with_other_settings_have_rows_of_their_own():
    def stored(name):
        return json.loads((RESULTS / f"{name}.json").read_text())

    def changed(result, **settings):
        return result | {"config": result["config"] | settings}

    def labels(table):
        return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]

    domain = stored("domains_erm_seed-0")
    assert labels(report.domain_table([domain, changed(domain, features=16)])) == [
        "rotated-omniglot",
        "rotated-omniglot, `--features 16`",
    ]
    wave = stored("sinusoid_maml_seed-0")
    short = changed(wave, num_meta_steps=100)
    assert labels(report.sinusoid_table([wave, short], 5)) == ["MAML", "MAML, `--num-meta-steps 100`"]
    assert report.sinusoid_table([short], 5).count("0.67 / 0.38 / 0.35") == 0
    assert labels(report.sinusoid_table([wave], 7)) == []
    rates = changed(stored("sinusoid_meta-sgd_seed-0"), inner_lr=0.005, inner_lr_max=0.1)
    assert labels(report.sinusoid_table([rates], 5)) == ["Meta-SGD, `--inner-lr-max 0.1`"]
    photographs = next(json.loads(file.read_text()) for file in sorted(RESULTS.glob("images_fomaml_num*.json")))
    assert len(labels(few_shot_report.images_table([photographs, changed(photographs, size=84)]))) == 2
    centroids = json.loads(next(RESULTS.glob("images_pretrained-classifier_*.json")).read_text())
    rows = labels(few_shot_report.images_table([centroids, changed(centroids, shot=5, train_shot=5)]))
    assert len(rows) == 2 * sum(", trained 5-shot" in row for row in rows)
    assert len(rows) == 2 * len({row.replace(", trained 5-shot", "") for row in rows})


def test_curves_of_other_settings_have_labels_of_their_own(tmp_path, monkeypatch):
    waves = [json.loads((RESULTS / f"sinusoid_maml_seed-{seed}.json").read_text()) for seed in (0, 1)]
    short = [wave | {"config": wave["config"] | {"num_meta_steps": 100}} for wave in waves]
    fast = [wave | {"config": wave["config"] | {"inner_lr": 0.01}} for wave in waves]
    expected = ["MAML, rate 0.001, --num-meta-steps 100", "MAML, rate 0.001", "MAML, rate 0.01"]
    assert sorted(report.seed_curves([*short, *waves, *fast])) == sorted(expected)
    drawn = {}
    monkeypatch.setattr(report.figures, "inner_curves", lambda file, curves: drawn.update(curves))
    report.draw(tmp_path, defaultdict(list, sinusoid=[*short, *waves, *fast]), {})
    assert drawn.keys() == {"maml", expected[0], expected[2]}
    same = [wave | {"config": wave["config"] | {"eval_shots": [5]}} for wave in waves]
    with pytest.raises(runs.RunError, match=r"maml --eval-shots 5` have one row in the tables"):
        report.seed_curves([*waves, *same])


def test_hyperparameters_of_several_seeds_are_averaged():
    first = json.loads((RESULTS / "hyperparameters_hypergradient_seed-0.json").read_text())
    second = json.loads(json.dumps(first))
    second["config"]["seed"] = 1
    second["methods"]["random search"]["test_loss"]["mean"] = 0.1
    second["methods"]["random search"]["test_loss_more"]["mean"] = -0.1
    assert report.over_seeds([first]) == first["methods"]
    pooled = report.over_seeds([first, second])
    one, found = first["methods"]["random search"]["test_loss"]["mean"], pooled["random search"]["test_loss"]
    assert found["mean"] == pytest.approx((one + 0.1) / 2)
    assert found["ci95"] == pytest.approx(stats.t.ppf(0.975, 1) * abs(one - 0.1) / 2)  # of two numbers
    assert pooled["linear decay"]["test_loss"]["ci95"] == 0
    text = report.hyperparameter_summary([first, second])
    assert "Their difference is within its interval. Of 2 seeds, the lowest is that of hypergradients in 1, " in text
    assert report.hyperparameter_table([first, second]).count(" | 2 |") == len(first["methods"])
    second["methods"]["linear decay"]["test_loss"] = {"mean": None, "ci95": None}
    assert "| linear decay | 0.1734 ± 0.0000 | not finite |" in report.hyperparameter_table([first, second])


def test_a_method_that_diverged_does_not_win():
    result = json.loads(next(RESULTS.glob("hyperparameters_*.json")).read_text())
    first = min(result["methods"], key=lambda name: result["methods"][name]["test_loss"]["mean"])
    assert f"The lowest test loss is that of {first}" in report.hyperparameter_summary([result])
    result["methods"][first]["test_loss"]["mean"] = None
    text = report.hyperparameter_summary([result])
    assert "The lowest test loss is that of " in text
    assert first not in text


def test_seeds_with_other_numbers_of_meta_steps_are_not_averaged():
    results = [json.loads((RESULTS / f"navigation_maml_seed-{seed}.json").read_text()) for seed in (0, 1)]
    assert list(report.rl_report.labelled(results, commands.flags_but_seed)) == ["MAML"]
    results[1] |= {"meta_steps": 100, "config": results[1]["config"] | {"num_meta_steps": 100}}
    found = report.rl_report.labelled(results, commands.flags_but_seed)
    assert {label: len(group) for label, group in found.items()} == {
        "MAML, 300 meta-steps": 1,
        "MAML, 100 meta-steps": 1,
    }


def test_a_result_is_named_after_a_path_without_its_folders(tmp_path):
    results = json.loads((RESULTS / "omniglot_leo_num-meta-steps-5000_outer-schedule-halved_seed-0.json").read_text())
    results["config"]["pretrained_run"] = "runs/other"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    assert report.add(tmp_path / "run", tmp_path).name == (
        "omniglot_leo_num-meta-steps-5000_outer-schedule-halved_pretrained-run-runs-other_seed-0.json"
    )


def test_a_test_on_other_data_sets_is_added_without_a_method(tmp_path):
    content = (RESULTS / "cross_domain_ways-5_episodes-600_seed-0.json").read_text()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(content)
    added = report.add(tmp_path / "run", tmp_path)
    assert added.name == "cross_domain_ways-5_episodes-600_seed-0.json"
    assert json.loads(added.read_text()) == json.loads(content)


@pytest.mark.parametrize("changes", [{"data_dir": "my_photographs"}, {"tfds": "cifar100"}, {"way": 10}])
def test_photographs_of_ones_own_are_not_added(changes, tmp_path):
    results = json.loads((RESULTS / "images_leo_num-meta-steps-5000_size-64_seed-0.json").read_text())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(json.dumps(results | {"config": results["config"] | changes}))
    with pytest.raises(ValueError, match=r"on the data that \$MAML_JAX_IMAGES names"):
        report.add(tmp_path / "run", tmp_path)


def test_a_classifier_has_a_row_with_all_settings_for_every_head_and_training():
    def result(algorithm, heads=(None,), **settings):
        config = omniglot.with_paper_defaults(dataclasses.replace(omniglot.METHODS[algorithm], **settings))
        evaluations = [
            {"way": way, "shot": shot, "metrics": {"accuracy": {"mean": [0.5, 0.01 * way], "ci95": [0.1, 0.002]}}}
            | ({"head": head} if head else {})
            for way, shot in omniglot.SETTINGS
            for head in heads
        ]
        return {
            "experiment": "omniglot",
            "algorithm": algorithm,
            "config": runs.as_json(config),
            "protocol": {"way": 5, "shot": 1, "split_by": "alphabet", "normalisation": "transductive"},
            "metrics": evaluations[0]["metrics"],
            "evaluations": evaluations,
            "seconds": {"train": 60.0},
            "seed": 0,
            "device": "AMD EPYC, 2 cores",
            "meta_steps": 1000,
            "execution": {"flops": 2_500_000_000},
        }

    heads = ("neighbour", "linear")
    results = [result("protonets"), result("protonets", shot=5), result("pretrained-classifier", heads)]
    lines = few_shot_report.all_methods_table(results).splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[0] for row in rows] == [
        "ProtoNets, trained 1-shot",
        "ProtoNets, trained 5-shot",
        "pretrained on all classes, linear",
        "pretrained on all classes, neighbour",
    ]
    full = ["20,000", "20,000", "4,000", "4,000"]
    for row, steps in zip(rows, (f"1,000 of {number}" for number in full), strict=True):
        assert row[1:5] == ["5.0 ± 0.2", "5.0 ± 0.2", "20.0 ± 0.2", "20.0 ± 0.2"]
        assert row[6:] == ["alphabet", "5", "transductive", steps, "60", "2.5", "1 min"]
    # One row for the trainings of a method that has one for every setting, each with its own costs.
    maml = [
        result("maml") | {"evaluations": [{"way": 5, "shot": 1, "metrics": results[0]["metrics"]}]},
        result("maml", shot=5)
        | {"evaluations": [{"way": 5, "shot": 5, "metrics": results[0]["metrics"]}], "seconds": {"train": 180.0}},
    ]
    (record,) = few_shot_report.all_methods(maml)
    assert record["minutes"] == {(5, 1): 1.0, (5, 5): 3.0}
    (line,) = few_shot_report.all_methods_table(maml).splitlines()[2:]
    assert [cell.strip() for cell in line.split("|")[-4:-1]] == ["60 / 180", "2.5", "1 / 3 min"]
    # Published numbers stand beside the head that they are of.
    assert [row[5] for row in rows] == ["98.8 / 99.7 / 96.0 / 98.9"] * 2 + ["", "80.0 / 95.0 / 69.5 / 89.1"]


@pytest.mark.parametrize(
    ("name", "expected"), [("seed-0", True), ("seed-1", False), ("surrogate-loaded-dice_seed-0", False)]
)
def test_the_picture_of_what_a_policy_does_is_taken_from_the_run_with_the_default_settings(tmp_path, name, expected):
    run_dir, experiments = tmp_path / "run", tmp_path / "experiments"
    for folder in (run_dir / "figures", experiments / "results", experiments / "figures"):
        folder.mkdir(parents=True)
    for suffix in (".png", ".pdf"):
        (run_dir / "figures" / f"behaviour{suffix}").write_bytes(b"picture")
    (run_dir / "results.json").write_text((RESULTS / f"navigation_maml_{name}.json").read_text())
    report.add(run_dir, experiments / "results")
    for suffix in (".png", ".pdf"):
        assert (experiments / "figures" / f"navigation_behaviour{suffix}").exists() == expected


def test_adding_never_replaces_other_results(tmp_path):
    (tmp_path / "run").mkdir()
    results = json.loads(next(iter(sorted(RESULTS.glob("*.json")))).read_text()) | {"diverged": None}
    (tmp_path / "run" / "results.json").write_text(json.dumps(results | {"diverged": float("nan")}))
    (tmp_path / "results").mkdir()
    file = report.add(tmp_path / "run", tmp_path / "results")
    assert json.loads(file.read_text()) == results
    assert report.add(tmp_path / "run", tmp_path / "results") == file  # the same again is no conflict
    (tmp_path / "run" / "results.json").write_text(json.dumps(results | {"seconds": {}}))
    with pytest.raises(ValueError, match="holds other results of that name; delete it"):
        report.add(tmp_path / "run", tmp_path / "results")


@pytest.mark.parametrize("full", [".png", ".pdf"])
def test_a_figure_on_a_full_disk_is_named_and_leaves_no_part(full, tmp_path, monkeypatch):
    write = Path.write_bytes

    def write_bytes(file, content):
        if file.suffix == full:
            write(file, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match=rf"the figure .*curve\{full} cannot be written: .*No space left"):
        figures.learning_curves(tmp_path / "curve.png", {"maml": [[{"step": n, "loss": 1.0} for n in (1, 2)]]})
    assert sorted(file.name for file in tmp_path.iterdir()) == (["curve.png"] if full == ".pdf" else [])


def test_a_table_of_instances_ends_with_the_sequence():
    found = {"algorithm": "mann", "meta_steps": 5, "instances": {"mean": [0.2, 0.5, None], "ci95": [0.1, 0.1, None]}}
    row = few_shot_report.instance_table([found]).splitlines()[-1]
    assert row.startswith("| MANN | 20.0 ± 10.0 | 50.0 ± 10.0 | not finite |  |  |  |")


def test_accuracies_that_are_not_finite_are_named_in_the_tables_of_domains():
    def result(algorithm, accuracy):
        score = {"accuracy": {"mean": [accuracy]}}
        config = {"data": "pacs", "held_out": "photo"}
        return {"experiment": "domains", "algorithm": algorithm, "seed": 0, "meta_steps": 5, "config": config,
                "metrics": score, "source_validation": score}  # fmt: skip

    table = report.domain_table([result("mldg", None), result("erm", 0.5)])
    assert "not finite" in table
    assert "50.0" in table


def test_a_seed_is_in_a_row_once():
    result = {"experiment": "sinusoid", "algorithm": "maml", "config": {}, "seed": 3}
    evaluation = {"way": 5, "shot": 1}
    few_shot_report.check_seeds_differ([(result, evaluation), (result, evaluation), (result, {"way": 5, "shot": 5})])
    few_shot_report.check_seeds_differ([(result, evaluation), (result | {"seed": 4}, evaluation)])
    with pytest.raises(runs.RunError, match=r"two results of one row have the seed 3: `python -m experiments\.sinus"):
        few_shot_report.check_seeds_differ([(result, evaluation), (dict(result), evaluation)])


def test_seeds_are_averaged_over_the_steps_that_all_have_logged():
    direct = [{"step": step, "loss": float(step)} for step in (10, 20, 30, 40)]
    continued = [{"step": step, "loss": None if step == 40 else 3.0 * step} for step in (10, 15, 25, 40)]
    steps, values = figures.of_common_steps([direct, [*continued, {"step": 40, "val": 1.0}]], "loss")
    assert steps == [10, 40]
    np.testing.assert_array_equal(values, [[10.0, 40.0], [30.0, np.nan]])

"""The report on translation, on made-up results."""

import pytest

from experiments import figures, translation_report


def made_up(algorithm, shift, *, pairs_trained=1000, meta_steps=10, states=("selected",), **settings):
    rows = [
        {
            "state": state, "step": 5, "language": language, "pairs": pairs,
            "nll": [3.0 + shift * (draw + 1) for draw in range(2)],
            "bleu": [10.0 - 10 * shift * (draw + 1) for draw in range(2)],
            "resampled_bleu": [10.0 - 10 * shift, 10.0 - 20 * shift],
        }
        for state in states for language in ("xc",) for pairs in (0, 4, 8)
    ]  # fmt: skip
    config = {
        "lexical": False,
        "sources": ["xa"],
        "held_out": ["xc"],
        "num_subsets": 2,
        "sizes": [4, 8],
        "validation": "xv", "query_shot": 3, "meta_batch_size": 2, "pretrain_steps": 0, "shot": 2,
    } | settings  # fmt: skip
    example = {"language": "xc", "source": "kidog | x", "before": "a", "after": "dog", "reference": "dog"}
    protocol = {"selection": "least dev loss of xv", "bleu": "signature", "test_sentences": 6, "selected_step": 5}
    return {
        "algorithm": algorithm, "config": config, "seed": 0, "meta_steps": meta_steps, "evaluations": rows,
        "protocol": protocol | {"pairs_trained": pairs_trained}, "examples": [example],
    }  # fmt: skip


def test_the_report_pairs_a_method_with_its_pretraining(tmp_path):
    baseline = made_up("pretrained", 0.0, states=("selected", "last"))
    for row in baseline["evaluations"]:
        row["nll"] = [value + (row["state"] == "last") for value in row["nll"]]
    results = [
        made_up("fomaml", -0.1),
        baseline,
        made_up("pretrained", 0.3, lexical=True),
        made_up("pretrained", 0.3, meta_steps=0, pairs_trained=0),
        made_up("pretrained", 0.2, meta_steps=5, pairs_trained=500),
    ]
    text = translation_report.section(results, lambda result: ["--lexical"] * result["config"]["lexical"])
    lines = [line for line in text.splitlines() if line.startswith("| FOMAML")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    differences = [row[1:] for row in cells if row[3] == "xc" and row[1].startswith("pretraining")]
    # Against seed and meta-steps of the shorter pretraining too; never against the lexical one or no training.
    assert [row[:3] for row in differences] == [
        ["pretraining", "last", "xc"],
        ["pretraining", "selected", "xc"],
        ["pretraining, 10 meta-steps, seed 0", "last, equal pairs", "xc"],
        ["pretraining, 10 meta-steps, seed 0", "selected", "xc"],
    ]
    loss, bleu_over_draws, over_test_sets = differences[3][3:]
    half = 0.05 * 12.706  # Student's t with one degree of freedom: half of the distance of both draws, times t
    assert loss == f"-0.150 ± {half:.3f}"
    assert bleu_over_draws == f"1.50 ± {10 * half:.2f}"
    assert over_test_sets == "1.02 to 1.98"
    assert differences[2][3].startswith("-1.150")  # the last state of the pretraining; FOMAML has one state
    assert "from scratch" in text
    assert "kidog / x" in text
    assert translation_report.section([], lambda result: []) == ""
    with pytest.raises(ValueError, match="there are two results of FOMAML"):
        translation_report.section([results[0]] * 3, lambda result: [])
    translation_report.draw(tmp_path / "bleu.png", results, lambda result: ["--lexical"] * result["config"]["lexical"])
    assert (tmp_path / "bleu.png").exists()


def test_the_figure_has_a_column_for_every_network(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "low_resource", lambda file, groups: drawn.update(groups))
    results = [
        made_up("fomaml", -0.1, lexical=True, pretrain_steps=5),
        made_up("pretrained", 0.0, states=("selected", "last")),
        made_up("pretrained", 0.1, lexical=True),
    ]

    def flags_of(result):
        return ["--pretrain-steps 5"] * (result["config"]["pretrain_steps"] > 0) + ["--lexical"] * result["config"][
            "lexical"
        ]

    translation_report.draw(tmp_path / "bleu.png", results, flags_of)
    assert {title: list(group) for title, group in drawn.items()} == {
        "": ["pretraining", "pretraining, last state"],
        "--lexical": ["pretraining", "FOMAML, `--pretrain-steps 5`"],
    }


def test_the_table_has_the_means_over_draws_and_the_pairs_that_a_state_has_seen():
    result = made_up("fomaml", -0.1, query_shot=300, lexical=True)
    for row in result["evaluations"]:
        row["bleu"] = [value + row["pairs"] for value in row["bleu"]]
    result["evaluations"] = [row for row in result["evaluations"] if row["pairs"]]  # no zero shots
    text = translation_report.section([result, made_up("pretrained", 0.0, query_shot=300)], lambda result: [])
    assert "| state | pairs seen | language | 0 pairs | 4 pairs | 8 pairs |" in text
    # The state is of step 5, and each step has two episodes.
    assert "| FOMAML | selected, step 5 | 3k | xc |  | 15.50 (2.850) | 19.50 (2.850) |" in text
    assert "| pretraining | selected, step 5 | 3k | xc | 10.00 (3.000) | 10.00 (3.000) | 10.00 (3.000) |" in text

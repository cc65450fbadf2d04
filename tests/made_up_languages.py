"""A text in made-up languages, and the settings of a translation that learns from it in seconds."""

import dataclasses

import numpy as np

from experiments import translation

WORDS = ("a", "man", "dog", "red", "runs", "sits", "in", "park", "the", "on", "grass", "woman", "big", "child", "sees")
LANGUAGES = {"xa": "o{}", "xb": "{}ta", "xc": "ki{}", "xd": "{}un", "xv": "po{}"}
LINES = {"train": 60, "val": 8, "test": 6}
TINY = {
    "sources": ("xa", "xb"), "held_out": ("xc", "xd"), "validation": "xv", "source_pairs": 30, "pool_lines": 30,
    "max_subwords": 16, "source_subwords": 60, "target_subwords": 34, "width": 8, "depth": 1, "vector_size": 4,
    "shot": 2, "query_shot": 3, "num_meta_steps": 4, "val_every": 2, "log_every": 1, "sizes": (4, 8), "num_subsets": 2,
    "validation_pairs": 4,
    "dev_pairs": 5, "finetune_steps": 20, "finetune_batch": 2, "beam": 2,
}  # fmt: skip


def write_corpus(directory):
    """Writes English of a dozen words, and languages that write each of them in another way; returns the directory."""
    rng = np.random.default_rng(0)
    for part, count in LINES.items():
        english = [" ".join(rng.choice(WORDS, rng.integers(3, 7))) for _ in range(count)]
        write(directory, part, "en", english)
        for language, form in LANGUAGES.items():
            write(directory, part, language, [" ".join(form.format(w) for w in line.split()) for line in english])
    return directory


def write(directory, part, language, lines):
    (directory / f"{part}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")


def config_of(corpus, algorithm="fomaml", **settings):
    return dataclasses.replace(translation.METHODS[algorithm], data_dir=corpus, **TINY | settings)

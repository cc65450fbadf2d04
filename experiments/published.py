"""The published numbers that ours are put beside, with where they were published."""

SINUSOID = {
    ("maml", 0.001): (0.67, 0.38, 0.35),
    ("pretrained", 0.001): (2.41, 2.23, 2.19),
}
"""Mean squared error after 1, 5 and 10 gradient steps on 5 support points, by algorithm and inner rate: Finn et al.,
2017, appendix C.1, table 2. The rate is that of the authors' code; the paper's text says 0.01."""

SUMMED_LOSS = " The authors' code sums the cross-entropy over the classes: with 5, its rate of {code} is {ours} here."
"""A sentence for the methods that have the recipe of Finn et al., with the rates of 5 classes."""

OMNIGLOT = {
    ("maml", "conv4", 5, 1): "98.7 ± 0.4",
    ("maml", "conv4", 5, 5): "99.9 ± 0.1",
    ("maml", "conv4", 20, 1): "95.8 ± 0.3",
    ("maml", "conv4", 20, 5): "98.9 ± 0.2",
    ("maml", "mlp", 5, 1): "89.7 ± 1.1",
    ("maml", "mlp", 5, 5): "97.5 ± 0.6",
    ("fomaml", "conv4", 5, 1): "98.3 ± 0.5",
    ("fomaml", "conv4", 5, 5): "99.2 ± 0.2",
    ("fomaml", "conv4", 20, 1): "89.4 ± 0.5",
    ("fomaml", "conv4", 20, 5): "97.9 ± 0.1",
    ("reptile", "conv4", 5, 1): "97.68 ± 0.04",
    ("reptile", "conv4", 5, 5): "99.48 ± 0.06",
    ("reptile", "conv4", 20, 1): "89.43 ± 0.14",
    ("reptile", "conv4", 20, 5): "97.12 ± 0.32",
    ("anil", "conv4", 20, 1): "96.2",
    ("anil", "conv4", 20, 5): "98.0",
    ("meta-sgd", "conv4", 5, 1): "99.53 ± 0.26",
    ("meta-sgd", "conv4", 5, 5): "99.93 ± 0.09",
    ("maml++", "conv4", 5, 1): "99.47",
    ("maml++", "conv4", 5, 5): "99.93",
    ("maml++", "conv4", 20, 1): "97.65",
    ("maml++", "conv4", 20, 5): "99.33",
    ("imaml", "conv4", 5, 1): "99.16 ± 0.35",
    ("imaml", "conv4", 5, 5): "99.67 ± 0.12",
    ("imaml", "conv4", 20, 1): "94.46 ± 0.42",
    ("imaml", "conv4", 20, 5): "98.69 ± 0.1",
    ("protonets", "conv4", 5, 1): "98.8",
    ("protonets", "conv4", 5, 5): "99.7",
    ("protonets", "conv4", 20, 1): "96.0",
    ("protonets", "conv4", 20, 5): "98.9",
    ("matching", "conv4", 5, 1): "98.1",
    ("matching", "conv4", 5, 5): "98.9",
    ("matching", "conv4", 20, 1): "93.8",
    ("matching", "conv4", 20, 5): "98.5",
    ("r2d2", "multi-scale", 5, 1): "98.55",
    ("r2d2", "multi-scale", 5, 5): "99.67",
    ("r2d2", "multi-scale", 20, 1): "94.70",
    ("r2d2", "multi-scale", 20, 5): "98.91",
    ("siamese", "conv4", 5, 1): "96.7",
    ("siamese", "conv4", 5, 5): "98.4",
    ("siamese", "conv4", 20, 1): "88.0",
    ("siamese", "conv4", 20, 5): "96.5",
    ("pretrained-classifier", "conv4", 5, 1): "80.0",
    ("pretrained-classifier", "conv4", 5, 5): "95.0",
    ("pretrained-classifier", "conv4", 20, 1): "69.5",
    ("pretrained-classifier", "conv4", 20, 5): "89.1",
    ("pretrained-classifier, fine-tuned", "conv4", 5, 1): "86.0",
    ("pretrained-classifier, fine-tuned", "conv4", 5, 5): "97.6",
    ("pretrained-classifier, fine-tuned", "conv4", 20, 1): "72.9",
    ("pretrained-classifier, fine-tuned", "conv4", 20, 5): "92.3",
    ("mann", "pixels", 5, 1): "82.8",
    ("mann", "pixels", 5, 5): "94.9",
    ("memory-module", "conv4", 5, 1): "98.4",
    ("memory-module", "conv4", 5, 5): "99.6",
    ("memory-module", "conv4", 20, 1): "95.0",
    ("memory-module", "conv4", 20, 5): "98.6",
    ("neural-statistician", "conv4", 5, 1): "98.1",
    ("neural-statistician", "conv4", 5, 5): "99.5",
    ("neural-statistician", "conv4", 20, 1): "93.2",
    ("neural-statistician", "conv4", 20, 5): "98.1",
}
"""Accuracy in % by algorithm, network, way and shot; see `OMNIGLOT_SOURCES`."""

OMNIGLOT_INDUCTIVE = {
    ("reptile", "conv4", 5, 1): "95.39 ± 0.09",
    ("reptile", "conv4", 5, 5): "98.90 ± 0.10",
    ("reptile", "conv4", 20, 1): "88.14 ± 0.15",
    ("reptile", "conv4", 20, 5): "96.65 ± 0.33",
}
"""The same for the tests with `--inductive`, which are not those of `OMNIGLOT`."""

OMNIGLOT_SOURCES = """Sources: MAML from Finn et al., 2017, table 1. FOMAML and Reptile from Nichol et al., 2018,
table 2, FOMAML transductive and Reptile both ways. ANIL from Raghu et al., 2020. Meta-SGD from Li et al., 2017.
MAML++, an ensemble of five checkpoints, from Antoniou et al., 2019. iMAML by gradient descent from Rajeswaran et al.,
2019. ProtoNets from Snell et al., 2017, table 1. Matching networks, without fine-tuning, and the pretrained classifier,
compared by cosines or fine-tuned, from Vinyals et al., 2016, table 1. Siamese networks, without fine-tuning, from the
same table: a re-implementation, not the authors' own. R2-D2 with 64 filters as quoted by others, not checked against
its table; its wider network is quoted with 98.91 / 99.74 / 96.24 / 99.20. MANN from Santoro et al., 2016; its "1-shot"
is the second and its "5-shot" the fifth image of a class in a sequence. Memory module from Kaiser et al., 2017. Neural
statistician from Edwards and Storkey, 2017."""
"""Where the numbers of `OMNIGLOT` are from."""

INSTANCES = {
    "mann": (36.4, 82.8, 91.0, 92.6, 94.9, 98.1),
    "lstm": (24.4, 49.5, 55.3, 61.0, 63.6, 62.5),
}
"""Accuracy in % on the 1st, 2nd, 3rd, 4th, 5th and 10th image of a class in a sequence of 50 images of 5 classes:
Santoro et al., 2016, table 1."""

IMAGES = {
    "maml": ("48.70 ± 1.84", "63.11 ± 0.92"),
    "fomaml": ("48.07 ± 1.75", "63.15 ± 0.91"),
    "reptile": ("49.97", "65.99"),
    "anil": ("46.7", "61.5"),
    "boil": ("49.61 ± 0.16", "66.45 ± 0.37"),
    "meta-sgd": ("50.47 ± 1.87", "64.03 ± 0.94"),
    "maml++": ("52.15 ± 0.26", "68.32 ± 0.44"),
    "cavia": ("51.82 ± 0.65", "65.85 ± 0.55"),
    "meta-lstm": ("43.44 ± 0.77", "60.60 ± 0.71"),
    "protonets": ("49.42 ± 0.78", "68.20 ± 0.66"),
    "matching": ("43.40 ± 0.78", "51.09 ± 0.71"),
    "r2d2": ("49.5", "65.4"),
    "leo": ("61.76 ± 0.08", "77.59 ± 0.12"),
    "pretrained-classifier": ("41.08 ± 0.70", "51.04 ± 0.65"),
    "pretrained-classifier, fine-tuned": ("28.86 ± 0.54", "49.79 ± 0.79"),
}
"""Accuracy in % on miniImageNet, 5-way 1-shot and 5-shot. MAML, FOMAML: Finn et al., 2017, table 1. Matching networks
without full context, the meta-learner LSTM, and a pretrained classifier with the nearest neighbour or fine-tuned: Ravi
and Larochelle, 2017, table 1. Reptile, transductive: Nichol et al., 2018. ANIL: Raghu et al., 2020. BOIL: Oh et al.,
2021. Meta-SGD: Li et al., 2017. MAML++, 48 filters and five checkpoints: Antoniou et al., 2019. CAVIA, 512 filters:
Zintgraf et al., 2019. ProtoNets, trained on 30 and 20 classes: Snell et al., 2017. R2-D2, 64 filters: Bertinetto et
al., 2019. LEO, on the features of a wide residual network: Rusu et al., 2019."""

NAVIGATION = {
    "maml": (-40.41, -11.68, -3.33, -3.23, -3.35),
    "pretrained": (-40.81, -19.73, -11.72, -8.47, -7.49),
    "random": (-82.66, -57.96, -53.84, -46.81, -42.91),
    "oracle": (-2.29,),
}
"""Mean return after 0, 1, ... updates in 2D navigation, on 40 goals: Finn et al., 2017, figure 4, from the data files
of the authors' code."""

_STRATEGIES = (
    "random", "Gittins", "Thompson sampling", "optimistic Thompson sampling", "UCB1", "epsilon-greedy", "greedy", "RL²",
)  # fmt: skip
_MAML_ON_BANDITS = {
    (10, 5): 6.5,
    (10, 10): 6.6,
    (10, 50): 6.6,
    (100, 5): 67.1,
    (100, 10): 70.1,
    (100, 50): 70.3,
}

BANDITS = {
    sizes: dict(zip(_STRATEGIES, rewards, strict=True))
    | ({"MAML": _MAML_ON_BANDITS[sizes]} if sizes in _MAML_ON_BANDITS else {})
    for sizes, rewards in {
        (10, 5): (5.0, 6.6, 5.7, 6.5, 6.7, 6.6, 6.6, 6.7),
        (10, 10): (5.0, 6.6, 5.5, 6.2, 6.7, 6.6, 6.6, 6.7),
        (10, 50): (5.1, 6.5, 5.2, 5.5, 6.6, 6.5, 6.5, 6.8),
        (100, 5): (49.9, 78.3, 74.7, 77.9, 78.0, 75.4, 74.8, 78.7),
        (100, 10): (49.9, 82.8, 76.7, 81.4, 82.4, 77.4, 77.1, 83.5),
        (100, 50): (49.8, 85.2, 64.5, 67.7, 84.3, 78.3, 78.0, 84.9),
        (500, 5): (249.8, 405.8, 402.0, 406.7, 405.8, 388.2, 380.6, 401.6),
        (500, 10): (249.0, 437.8, 429.5, 438.9, 437.1, 408.0, 395.0, 432.5),
        (500, 50): (249.6, 463.7, 427.2, 437.6, 457.6, 413.6, 402.8, 438.9),
    }.items()
}
"""Mean total reward on Bernoulli bandits by (pulls, arms) and strategy: Duan et al., 2016, table 1, on 1,000 tasks.
MAML: as quoted from Mishra et al., 2018, https://arxiv.org/abs/1707.03141, without the number of pulls before an
update."""

MDPS = {
    episodes: dict(
        zip(("random", "PSRL", "OPSRL", "UCRL2", "BEB", "epsilon-greedy", "greedy", "RL²"), rewards, strict=True)
    )
    for episodes, rewards in {
        10: (100.1, 138.1, 144.1, 146.6, 150.2, 132.8, 134.8, 156.2),
        25: (250.2, 408.8, 425.2, 424.1, 427.8, 377.3, 368.8, 445.7),
        50: (499.7, 904.4, 930.7, 918.9, 917.8, 823.3, 769.3, 936.1),
        75: (749.9, 1417.1, 1449.2, 1427.6, 1422.6, 1293.9, 1172.9, 1428.8),
        100: (999.4, 1939.5, 1973.9, 1942.1, 1935.1, 1778.2, 1578.5, 1913.7),
    }.items()
}
"""Mean total reward in random processes by episodes and strategy: Duan et al., 2016, table 2, on 1,000 tasks."""

MAZES = {
    "5 x 5": {"steps": (52.4, 39.1), "success": (0.993, 0.996), "improved": 0.917},
    "tested in 9 x 9": {"steps": (180.1, 151.8), "success": (0.971, 0.967), "improved": 0.714},
}
"""Steps and success of both episodes in mazes, and the share of mazes whose second episode was no longer: Duan et al.,
2016, tables 3 and 4. Those mazes are three-dimensional, so only shares and ratios can be compared."""

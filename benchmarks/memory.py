"""Temporary memory of one task's meta-gradient against inner steps and depth, for every way to differentiate.

The compiled program states its memory and is not run for it, so the numbers are exact and have no spread. For one
number of inner steps the meta-gradients are also timed, in turns. A language model of millions of parameters is
compiled too, and never run. With --short only the convolutional network is measured.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks import common
from maml_jax import Batch, Episode, Model, checkpointed, first_order, losses, maml, mixed_mode, models
from maml_jax.cost import cost_of

DERIVATIVES = {
    "reverse_over_reverse": jax.value_and_grad,
    "checkpointed": checkpointed,
    "mixed_mode": mixed_mode,
    "first_order": first_order,
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of variable depth, and the size of its images.

    Attributes:
      make: `(depth) -> Model`.
      depth: layers or blocks in the sweep over inner steps.
      depths: layers or blocks in the sweep over depth; empty if the depth is fixed.
      size: height and width of the images, in pixels.
    """

    make: Callable[[int], Model]
    depth: int
    depths: tuple[int, ...]
    size: int


NETWORKS = {
    "mlp": Network(lambda depth: models.mlp(features=(64,) * depth + (5,)), 4, (2, 4, 8, 16), 8),
    "conv4": Network(lambda depth: models.conv4(way=5), 4, (), 28),
    "resnet12": Network(lambda depth: models.resnet12(way=5, widths=(8, 16, 32, 64)[:depth]), 4, (1, 2, 3, 4), 16),
}


class Block(nn.Module):
    """A block of a transformer: causal self-attention and a fully connected layer, each after a normalisation."""

    heads: int

    @nn.compact
    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, None]:
        """[S, L, D] -> [S, L, D], the carry of a scan over blocks."""
        width = hidden.shape[-1]
        mask = nn.make_causal_mask(hidden[..., 0])
        hidden += nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(hidden), mask=mask)
        return hidden + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(hidden)))), None


class GPT(nn.Module):
    """A transformer that predicts the next token.

    Attributes:
      vocabulary: the number of tokens.
      context: the largest L.
      width: D.
      depth: blocks.
      heads: attention heads of a block.
      remat: whether a block keeps its input only, and computes the rest again in its backward pass. The blocks are
        scanned, because XLA would merge the recomputation with the first pass otherwise.
    """

    vocabulary: int = 2048
    context: int = 128
    width: int = 256
    depth: int = 6
    heads: int = 8
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens, int [S, L] -> [S, L, vocabulary]."""
        embed = nn.Embed(self.vocabulary, self.width, name="tokens")
        positions = nn.Embed(self.context, self.width, name="positions")(jnp.arange(tokens.shape[1]))
        hidden = embed(tokens) + positions[None]
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        blocks = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        hidden, _ = blocks(self.heads, name="blocks")(hidden)
        return embed.attend(nn.LayerNorm(name="norm")(hidden))


LANGUAGE_MODEL = GPT()


@dataclasses.dataclass(frozen=True)
class Config(common.Settings):
    """The sweep. The networks are small and compile in seconds. Ratios hold for larger networks; bytes do not."""

    networks: tuple[Literal["mlp", "conv4", "resnet12"], ...] = ("mlp", "conv4", "resnet12")
    """The MLP has 64 units a layer, conv4 the 64 filters of Omniglot, ResNet-12 an eighth of its usual widths."""
    inner_steps: tuple[int, ...] = (1, 2, 5, 10, 20)
    """Inner steps."""
    depth_inner_steps: int = 5
    """Inner steps in the sweep over depth and in the timed meta-gradients."""
    shot: int = 5
    """Support and query examples for each of five classes."""
    language_model_sequences: int = 8
    """Sequences of 128 tokens in the support and in the query set of the language model; 0 leaves it out."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything is compiled, for a setting without a value."""
        super().__post_init__()
        common.check_not_empty(self, "networks", "inner_steps")


SHORT = Config(short=True, networks=("conv4",), inner_steps=(1, 5, 20), language_model_sequences=0)


def meta_gradient_of(name: str, depth: int, inner_steps: int, derivative: str) -> tuple[Model, Callable]:
    """Returns a network, and `(params, episode) -> (gradient, info)` for one task."""
    model = NETWORKS[name].make(depth)
    return model, gradient_of(model, inner_steps, derivative)


def gradient_of(model: Model, inner_steps: int, derivative: str) -> Callable:
    """`(params, episode) -> (gradient, info)` of MAML for one task."""
    learner = maml(
        model,
        losses.cross_entropy,
        inner_optimizer=optax.sgd(0.1),
        num_inner_steps=inner_steps,
        inner_grad=DERIVATIVES[derivative],
    )
    return jax.grad(learner.objective, has_aux=True)


def episode_for(name: str, shot: int) -> Episode:
    """One task of five classes, with images of the size for this network."""
    shape = (NETWORKS[name].size, NETWORKS[name].size, 1)
    episodes = common.random_episodes(num_tasks=1, way=5, shot=shot, query_shot=shot, shape=shape)
    return jax.tree.map(lambda x: x[0], episodes)


def run_case(name: str, depth: int, inner_steps: int, derivative: str, shot: int) -> dict[str, Any]:
    """Compiles the meta-gradient of one task and returns its row of the result file."""
    model, gradient = meta_gradient_of(name, depth, inner_steps, derivative)
    episode = jax.eval_shape(lambda: episode_for(name, shot))
    params = jax.eval_shape(model.init, jax.random.key(0), episode.support.inputs)
    return {
        "network": name,
        "depth": depth,
        "inner_steps": inner_steps,
        "derivative": derivative,
        **cost_of(gradient, params, episode)._asdict(),
        "parameter_bytes": num_bytes(params),
    }


def num_bytes(tree: Any) -> int:
    """The bytes of all leaves, arrays or their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def run_language_model(config: Config) -> list[dict[str, Any]]:
    """Compiles the meta-gradient of the language model for one task. A row for each derivative, with and without remat.

    Adapting to a text is predicting its next tokens. Only shapes matter, so there is no text.
    """
    rows = []
    for remat in (False, True):
        module = LANGUAGE_MODEL.clone(remat=remat)
        model = models.from_linen(module)
        tokens = jax.ShapeDtypeStruct((config.language_model_sequences, module.context), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)
        episode = Episode(Batch(tokens, tokens), Batch(tokens, tokens))
        for derivative in DERIVATIVES:
            cost = cost_of(gradient_of(model, config.depth_inner_steps, derivative), params, episode)
            rows.append(
                {
                    "inner_steps": config.depth_inner_steps,
                    "sequences": config.language_model_sequences,
                    "remat": remat,
                    "derivative": derivative,
                    **cost._asdict(),
                    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
                    "parameter_bytes": num_bytes(params),
                }
            )
    return rows


def time_derivatives(name: str, config: Config) -> dict[str, Any]:
    """Times the meta-gradient of one task, all ways to differentiate in turns, and returns a row."""
    calls, episode = {}, episode_for(name, config.shot)
    for derivative in DERIVATIVES:
        model, gradient = meta_gradient_of(name, NETWORKS[name].depth, config.depth_inner_steps, derivative)
        params = model.init(jax.random.key(0), episode.support.inputs)
        compiled, _ = common.compile_of(gradient, params, episode)
        calls[derivative] = lambda compiled=compiled, params=params: compiled(params, episode)
    seconds = common.measure_alternately(calls, config)
    return {
        "network": name,
        "inner_steps": config.depth_inner_steps,
        "seconds": {derivative: common.summarise(values) for derivative, values in seconds.items()},
    }


def run(config: Config) -> dict[str, Any]:
    """Compiles, prints, writes memory.json and memory.png, and returns the content."""
    start = time.perf_counter()
    rows, times = [], []
    for name in config.networks:
        times.append(time_derivatives(name, config))
        network = NETWORKS[name]
        cases = [(network.depth, steps) for steps in config.inner_steps]
        cases += [(depth, config.depth_inner_steps) for depth in network.depths]
        for depth, steps in dict.fromkeys(cases):
            rows += [run_case(name, depth, steps, derivative, config.shot) for derivative in DERIVATIVES]
        common.console.print(f"{name} compiled; {time.perf_counter() - start:.0f} s")
    language_model = run_language_model(config) if config.language_model_sequences else []
    content = {"rows": rows, "times": times, "language_model": language_model}
    common.show(tables(content))
    common.write_results("memory", config, content)
    draw(config, rows)
    return content


def tables(content: dict[str, Any]) -> list[common.Table]:
    """Memory, operations and times for each way to differentiate."""
    rows = content["rows"]
    cases = dict.fromkeys((row["network"], row["depth"], row["inner_steps"]) for row in rows)
    by_case = {(*(row[key] for key in ("network", "depth", "inner_steps")), row["derivative"]): row for row in rows}
    headings = [name.replace("_", " ") for name in DERIVATIVES]

    def megabytes(case):
        return [f"{by_case[*case, name]['temporary_bytes'] / 1e6:.2f}" for name in DERIVATIVES]

    def ratios(case):
        first = by_case[*case, "first_order"]["flops"]
        return [f"{by_case[*case, name]['flops'] / first:.2f}" for name in DERIVATIVES]

    columns = ["network", "depth", "inner steps", *headings]
    found = [
        common.Table("Temporaries, MB", columns, [[*case, *megabytes(case)] for case in cases]),
        common.Table("Operations, relative to first order", columns, [[*case, *ratios(case)] for case in cases]),
        common.Table(
            "Milliseconds (quartiles)",
            ["network", "inner steps", *headings],
            [
                [row["network"], row["inner_steps"], *(row["seconds"][name] for name in DERIVATIVES)]
                for row in content["times"]
            ],
        ),
    ]
    if of_model := content.get("language_model"):
        found.append(_language_model_table(of_model, headings))
    return found


def _language_model_table(rows: list[dict[str, Any]], headings: list[str]) -> common.Table:
    by_case = {(row["remat"], row["derivative"]): row for row in rows}
    first = by_case[False, "first_order"]["flops"]
    cells = []
    for remat, blocks in ((False, "kept"), (True, "computed again")):
        of_case = [by_case[remat, name] for name in DERIVATIVES]
        cells.append([blocks, "temporaries, MB", *(f"{row['temporary_bytes'] / 1e6:.0f}" for row in of_case)])
        cells.append([blocks, "operations, relative", *(f"{row['flops'] / first:.2f}" for row in of_case)])
    return common.Table(
        f"A language model of {rows[0]['parameters'] / 1e6:.1f} million parameters, {rows[0]['inner_steps']} inner "
        f"steps on {rows[0]['sequences']} sequences",
        ["results of a block", "", *headings],
        cells,
        f"The parameters take {rows[0]['parameter_bytes'] / 1e6:.0f} MB. Compiled and not run.",
    )


def draw(config: Config, rows: list[dict[str, Any]]) -> None:
    """Plots memory against inner steps for each network, and against depth where it varies."""
    deep = [name for name in config.networks if NETWORKS[name].depths]

    def curves(axes, name, x, **fixed):
        chosen = [row for row in rows if row["network"] == name and all(row[k] == v for k, v in fixed.items())]
        for derivative in DERIVATIVES:
            points = sorted((row[x], row["temporary_bytes"] / 1e6) for row in chosen if row["derivative"] == derivative)
            # The curves of checkpointed and mixed mode coincide, so the former is dashed and has larger marks.
            style = (
                {"linestyle": "--", "marker": "s", "markersize": 9} if derivative == "checkpointed" else {"marker": "o"}
            )
            axes.plot(*zip(*points, strict=True), label=derivative.replace("_", " "), **style)
        axes.set_xticks(sorted({row[x] for row in chosen}))
        axes.set(ylabel="temporaries, MB", ylim=(0, None))

    count = len(config.networks) + len(deep)
    columns = -(-count // 2)
    with common.figure("memory", config, columns=columns, rows=2) as drawn:
        for axes, name in zip(drawn, config.networks, strict=False):
            curves(axes, name, "inner_steps", depth=NETWORKS[name].depth)
            axes.set(title=name, xlabel="inner steps")
        for axes, name in zip(drawn[len(config.networks) : count], deep, strict=True):
            curves(axes, name, "depth", inner_steps=config.depth_inner_steps)
            axes.set(title=f"{name}, {config.depth_inner_steps} inner steps", xlabel="layers or blocks")
        for axes in drawn[count:]:
            axes.axis("off")
        drawn[0].legend()


if __name__ == "__main__":
    common.main(Config, run, __doc__, SHORT)

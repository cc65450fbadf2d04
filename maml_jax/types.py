"""The records and function signatures that the rest of the library is written in.

A meta-learner turns a few examples of a task into a function for that task. It is described by four
pure functions, each about one episode; batching over episodes, differentiation, the outer update and
the placement on devices are added from outside.
"""

import functools
import inspect
import numbers
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np

ArrayTree = chex.ArrayTree
PRNGKey = chex.PRNGKey


class Batch(NamedTuple):
    """Examples of one task: two pytrees with leaves [S, ...], an entry of the leading axis for each example."""

    inputs: ArrayTree
    targets: ArrayTree


class Episode(NamedTuple):
    """One draw of a task. A meta-batch is an `Episode` whose leaves have one more leading axis [T, ...].

    Attributes:
      support: the examples that adapt, [S, ...].
      query: the examples that score, [M, ...].
      key: the randomness that belongs to this draw (dropout, latent samples, rollouts), or None.
    """

    support: Batch
    query: Batch
    key: PRNGKey | None = None


class Model(NamedTuple):
    """A network: a pair of pure functions.

    Attributes:
      init: `(key, inputs) -> params`.
      apply: `(params, inputs) -> outputs`; with `stochastic`, `(params, inputs, *, key=None) -> outputs`.
      stochastic: whether `apply` draws from a key, as dropout does. Without a key it is deterministic.
    """

    init: Callable[[PRNGKey, ArrayTree], ArrayTree]
    apply: Callable[..., ArrayTree]
    stochastic: bool = False

    def call(self, params: ArrayTree, inputs: ArrayTree, key: PRNGKey | None = None) -> ArrayTree:
        """`apply`, with the key if the model takes one."""
        return self.apply(params, inputs, key=key) if self.stochastic else self.apply(params, inputs)


class LossFn(Protocol):
    """`(outputs, targets) -> scalar`, the mean loss of one batch."""

    def __call__(self, outputs: ArrayTree, targets: ArrayTree) -> jax.Array: ...


class ObserveFn(Protocol):
    """`(task_params) -> pytree`, evaluated before the first and after every inner step."""

    def __call__(self, task_params: ArrayTree) -> ArrayTree: ...


class SampleEpisodeFn(Protocol):
    """A task distribution: `(key) -> Episode`, pure and traceable.

    A distribution whose data depend on the current policy is `(key, params) -> Episode`; no derivative passes
    through the parameters that it is given. One that holds arrays is a `jax.tree_util.Partial` of a function and
    these arrays, which are then arguments of the compiled program and not constants in it.
    """

    def __call__(self, key: PRNGKey, *params: ArrayTree) -> Episode: ...


class Environment(NamedTuple):
    """A distribution of Markov decision processes: three pure functions.

    A task is a pytree that determines the process completely. Several tasks are batched by `jax.vmap` over it. No
    function starts a new trajectory by itself. The shapes and dtypes of state and observation never change.

    Attributes:
      sample_task: `(key) -> task`.
      reset: `(task, key) -> (state, observation)`.
      step: `(task, state, action, key) -> (state, observation, reward, done)`, with a reward and a bool for the end of
        the trajectory, both scalars.
    """

    sample_task: Callable[[PRNGKey], ArrayTree]
    reset: Callable[[ArrayTree, PRNGKey], tuple[ArrayTree, ArrayTree]]
    step: Callable[[ArrayTree, ArrayTree, ArrayTree, PRNGKey], tuple[ArrayTree, ArrayTree, jax.Array, jax.Array]]


class InnerGradFn(Protocol):
    """A transform with the signature of `jax.value_and_grad`.

    It computes the same value and gradient as `jax.value_and_grad`; what it decides is what an outer
    `jax.grad` sees when it differentiates that gradient once more.
    """

    def __call__(
        self, fun: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False
    ) -> Callable[..., Any]: ...


class InitFn(Protocol):
    """`(key, inputs) -> meta_params`, where inputs [S, ...] show the shape of one support set."""

    def __call__(self, key: PRNGKey, inputs: ArrayTree) -> ArrayTree: ...


class AdaptFn(Protocol):
    """`(meta_params, support, *, key=None, observe_fn=None) -> (task_params, info)`; see `MetaLearner`."""

    def __call__(
        self,
        meta_params: ArrayTree,
        support: Batch,
        *,
        key: PRNGKey | None = None,
        observe_fn: ObserveFn | None = None,
    ) -> tuple[ArrayTree, Any]: ...


class PredictFn(Protocol):
    """`(task_params, inputs) -> outputs`."""

    def __call__(self, task_params: ArrayTree, inputs: ArrayTree) -> ArrayTree: ...


class ObjectiveFn(Protocol):
    """`(meta_params, episode) -> (scalar, info)`, what `jax.grad` is taken of."""

    def __call__(self, meta_params: ArrayTree, episode: Episode) -> tuple[jax.Array, Any]: ...


class MetaLearner(NamedTuple):
    """A meta-learning algorithm: four pure functions about ONE episode.

    Attributes:
      init: `(key, inputs) -> meta_params`, where inputs [S, ...] show the shape of one support set.
      adapt: `(meta_params, support, *, key=None, observe_fn=None) -> (task_params, info)`, what is deployed. Without a
        key it is deterministic. With one it may draw an order of the support set, and a stochastic model draws too.
        Without `jax.jit` around it, the loop of the inner steps is compiled anew in every call. `info` is an
        `InnerInfo`, or another record with a field `observed`. It holds the values of `observe_fn(task_params)` before
        the first and after every inner step, stacked to [K+1, ...], or [1, ...] for a learner that observes only its
        end. `evaluate` reads this field.
      predict: `(task_params, inputs) -> outputs`, one output an input, [M, ...].
      objective: `(meta_params, episode) -> (scalar, info)`, how it is trained: what `jax.grad` is taken of.
    """

    init: InitFn
    adapt: AdaptFn
    predict: PredictFn
    objective: ObjectiveFn


LearnerOrSchedule = MetaLearner | Callable[[jax.Array], MetaLearner]
"""A learner, or a function from the meta-step (int32 scalar, traced) to one: annealed losses, schedules."""


class InnerInfo(NamedTuple):
    """What happened while adapting to one support set.

    Attributes:
      support_loss: [K], the support loss before each inner step.
      observed: the values of `observe_fn`, stacked to [K+1, ...]; [1, ...] for a learner that observes only its end;
        None without one.
      opt_state: the state of the inner optimiser after the last step, from `inner_loop`; learners leave it out.
    """

    support_loss: jax.Array
    observed: ArrayTree = None
    opt_state: ArrayTree = None


class MetaState(NamedTuple):
    """All that the next meta-step needs.

    Attributes:
      params: the meta-parameters θ.
      opt_state: the state of the outer optimiser.
      step: int32 scalar, the number of meta-steps taken.
    """

    params: ArrayTree
    opt_state: ArrayTree
    step: jax.Array


class MetaInfo(NamedTuple):
    """What a meta-step reports: scalars, or [num_steps] from a training loop.

    Attributes:
      loss: the mean objective over the meta-batch, before the update.
      grad_norm: the Euclidean norm of the meta-gradient.
      finite: whether the loss, the norm of the meta-gradient and the parameters after the update are all finite.
      objective: the info of the objective, averaged over the meta-batch.
    """

    loss: jax.Array
    grad_norm: jax.Array
    finite: jax.Array
    objective: ArrayTree


class Evaluation(NamedTuple):
    """A metric at every inner step, K+1 values from before the first to after the last.

    If the metric is a pytree, so is each attribute.

    Attributes:
      mean: [K+1], over the episodes. It is not finite if one episode is not.
      ci95: [K+1], half-width of the 95 % interval of the mean, by Student's t.
      per_episode: [E, K+1].
      num_nonfinite: [K+1], the number of episodes whose metric is not finite.
      finite_mean: [K+1], the mean over the other episodes.
      finite_median: [K+1], the median of the other episodes.
    """

    mean: ArrayTree
    ci95: ArrayTree
    per_episode: ArrayTree
    num_nonfinite: ArrayTree
    finite_mean: ArrayTree
    finite_median: ArrayTree


def check_floating(params: ArrayTree) -> None:
    """Raises ValueError naming the first leaf of `params` that is not a real floating array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path) or "(the only leaf)"
        if not hasattr(leaf, "dtype") and not isinstance(leaf, numbers.Number):
            raise ValueError(
                f"parameter {name} is a {type(leaf).__name__} and no array; keep it in the model's closure"
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"parameter {name} has dtype {jnp.result_type(leaf)} and "
                "cannot be adapted by gradients; use floating parameters, keep integers in the model's closure, and "
                "split complex numbers into two parts"
            )


def check_optimizer(name: str, optimizer: Any) -> None:
    """Raises ValueError unless `optimizer` has the `init` and `update` of an optax transformation."""
    is_outer_rule = hasattr(optimizer, "looks_at_episodes")
    if is_outer_rule or not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(f"{name} must be an optax transformation such as optax.sgd(0.1), got {optimizer!r}")


def check_model(model: Any) -> None:
    """Raises ValueError unless `model` is a `Model`."""
    if not isinstance(model, Model):
        raise ValueError(
            f"model must be a maml_jax.Model, got {type(model).__name__}; wrap a flax module with models.from_linen "
            "or models.from_nnx, and two functions as maml_jax.Model(init, apply)"
        )


def check_learner(learner: Any) -> None:
    """Raises ValueError unless `learner` is a `MetaLearner`."""
    if not isinstance(learner, MetaLearner):
        raise ValueError(
            f"the learner must be a MetaLearner, got {type(learner).__name__}. Training also takes a function from the "
            "meta-step to a MetaLearner; evaluation also takes a Partial that returns one, and a schedule at a step"
        )


def learner_at(learner: LearnerOrSchedule, step: int | jax.Array) -> MetaLearner:
    """The learner of a meta-step.

    Raises:
      ValueError: if it is not a `MetaLearner`.
    """
    built = learner(step) if callable(learner) else learner
    check_learner(built)
    return built


def check_integer(name: str, value: Any, at_least: int) -> int:
    """Returns `value` as an `int`.

    Args:
      name: what the number is called in the message.
      value: an integer of Python or numpy.
      at_least: the smallest value allowed.

    Raises:
      ValueError: if `value` is no integer (a bool is none), or smaller than `at_least`.
    """
    try:
        number = at_least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = at_least - 1
    if number < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")
    return number


def values_of(array: jax.Array) -> np.ndarray | None:
    """The values of an array; None for one that is traced and has none yet."""
    try:
        return np.asarray(array)
    except jax.errors.TracerArrayConversionError:
        return None


def holds_for(value: Any, condition: Callable[[Any], Any]) -> bool:
    """Whether a real number, or every entry of an array, is finite and fulfils `condition`.

    A traced array has no value yet, and passes. A bool, an empty array, and anything else that is no number, fails.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real | np.ndarray | jax.Array):
        return False
    try:
        found = values_of(value) if isinstance(value, np.ndarray | jax.Array) else np.float64(float(value))
    except OverflowError:  # an integer beyond all floating numbers
        return False
    if found is None:
        return True
    if not found.size or (found.dtype.kind not in "iuf" and not jnp.issubdtype(found.dtype, jnp.floating)):
        return False
    return bool(np.all(np.isfinite(found) & condition(found)))


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a positive finite number or an array of them; traced arrays pass."""
    if not holds_for(value, lambda x: x > 0):
        raise ValueError(f"{name}={value} must be a positive number")


def check_not_negative(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a finite number of at least 0 or an array of them; traced arrays pass."""
    if not holds_for(value, lambda x: x >= 0):
        raise ValueError(f"{name}={value} must be a number of at least 0")


def check_function(name: str, value: Any, example: str) -> None:
    """Raises ValueError unless `value` can be called."""
    if not callable(value):
        raise ValueError(f"{name} must be a function such as {example}, got {value!r}")


def check_classes(way: int, targets: jax.Array, name: str = "the support set") -> None:
    """Checks the labels of a set that must hold every one of N classes.

    Labels that are traced have no values yet; then only their shape and dtype are checked.

    Args:
      way: N.
      targets: integer class indices [S].
      name: what the set is called in the message.

    Raises:
      ValueError: if the targets are no vector of integers, a label is not in 0..N-1, or a class has no example.
    """
    if jnp.ndim(targets) != 1 or not jnp.issubdtype(jnp.result_type(targets), jnp.integer):
        raise ValueError(
            f"the targets of {name} must be integer class indices [S], got {jnp.result_type(targets)} "
            f"{jnp.shape(targets)}; for one-hot targets pass targets.argmax(-1)"
        )
    if len(targets) < way:
        raise ValueError(f"{name} has {len(targets)} examples of way={way} classes; give at least one of each class")
    if (labels := values_of(targets)) is None:
        return
    if wrong := sorted(set(labels.tolist()) - set(range(way))):
        raise ValueError(f"{name} has the label {wrong[0]}, which is none of 0..{way - 1}; number its classes from 0")
    if missing := sorted(set(range(way)) - set(labels.tolist())):
        raise ValueError(f"{name} has no example of class {missing[0]} of way={way}; give at least one of each class")


def check_batch(name: str, batch: Any) -> None:
    """Raises ValueError unless `batch` has inputs and targets; `name` is that of the set."""
    if not (hasattr(batch, "inputs") and hasattr(batch, "targets")):
        raise ValueError(
            f"the {name} set is a {type(batch).__name__} without inputs and targets; make it a "
            "maml_jax.Batch(inputs, targets)"
        )


def check_query(episode: Episode) -> None:
    """Raises ValueError if the query set of an episode is no batch, or has no example, over which a loss is a mean."""
    check_batch("query", episode.query)
    if any(jnp.shape(leaf)[:1] == (0,) for leaf in jax.tree.leaves(episode.query)):
        raise ValueError(
            "the query set of the episode is empty; give it one example or more, or train a learner without queries, "
            "such as pretrained_classifier or reptile"
        )


def check_support(support: ArrayTree, axis: int = 0) -> None:
    """Raises ValueError if a support set is no batch, or has no example along `axis`: a mean of none is constant."""
    check_batch("support", support)
    if any(jnp.shape(leaf)[axis : axis + 1] == (0,) for leaf in jax.tree.leaves(support)):
        raise ValueError(
            "the support set is empty, so the inner steps would change nothing; give it one example or more, or take "
            "num_inner_steps=0"
        )


def all_examples(episode: Episode) -> Batch:
    """The support and the query examples of an episode as one batch [S + M, ...]."""
    return jax.tree.map(lambda s, q: jnp.concatenate([s, q]), episode.support, episode.query)


def check_pair(value: Any) -> tuple[jax.Array, ArrayTree]:
    """Returns what an objective has returned; raises ValueError if it is not two values."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(
            f"the objective must return (scalar, info), got {type(value).__name__}; return (loss, ()) without an info"
        )
    return tuple(value)


def as_floating(info: ArrayTree) -> ArrayTree:
    """`info` without its keys, and with numbers that are not floating as float32."""

    def convert(leaf):
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            return None
        return jnp.asarray(leaf, None if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else jnp.float32)

    return jax.tree.map(convert, info)


def at_least_float32(tree: ArrayTree) -> ArrayTree:
    """Leaves of fewer than 32 bits, and integers, as float32: a sum of many of them would round much, or overflow."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)


def wide_integers(labels: jax.Array) -> jax.Array:
    """Integers of fewer than 32 bits as int32: JAX casts what they are compared with to their dtype, where it wraps."""
    labels = jnp.asarray(labels)
    is_narrow = jnp.issubdtype(labels.dtype, jnp.integer) and jnp.iinfo(labels.dtype).bits < 32
    return labels.astype(jnp.int32) if is_narrow else labels


def task_keys(key: PRNGKey, num_tasks: int) -> PRNGKey:
    """Keys [T] of a meta-batch; the i-th depends on `key` and i only, whatever T is.

    Args:
      key: the randomness of the meta-batch.
      num_tasks: T.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_tasks))


def function_and_data(function: Callable) -> tuple[Callable, tuple]:
    """Splits a `jax.tree_util.Partial` into its function and its data `(args, keywords)`; another function has none.

    The data can be arguments of a compiled program. The function is kept out of them, because JAX's caches hold
    the structure of arguments, and with it a function and all that it closes over.
    """
    if isinstance(function, jax.tree_util.Partial):
        return function.func, (function.args, function.keywords)
    return function, ((), {})


def with_data(function: Callable, data: tuple) -> Callable:
    """The inverse of `function_and_data`."""
    args, keywords = data
    return functools.partial(function, *args, **keywords)


def predict_beside_support(
    predict: PredictFn, task_params: ArrayTree, support_inputs: ArrayTree, inputs: ArrayTree
) -> ArrayTree:
    """The outputs [M, ...] for inputs [M, ...], each predicted with only the support set [S, ...] beside it.

    No output depends on another input then, whatever statistics of a batch the network uses.

    Raises:
      ValueError: if an input has another shape than an example of the support set, or a leaf no axis of examples.
    """
    if any(jnp.ndim(leaf) == 0 for leaf in jax.tree.leaves((support_inputs, inputs))):
        raise ValueError("inputs hold a number without an axis of examples; repeat it for every example")
    examples = [jax.tree.map(lambda x: jnp.shape(x)[1:], batch) for batch in (support_inputs, inputs)]
    if examples[0] != examples[1]:
        raise ValueError(
            f"inputs of the shape {examples[1]} have no place beside a support set of examples {examples[0]}; predict "
            "all of them together. A learner with data_per_step has no support set that inputs fit beside"
        )

    def one(one_input):
        batch = jax.tree.map(lambda s, x: jnp.concatenate([s, x[None]]), support_inputs, one_input)
        return jax.tree.map(lambda outputs: outputs[-1], predict(task_params, batch))

    return jax.lax.map(one, inputs)


def draw_episode(sample_episode: SampleEpisodeFn, key: PRNGKey, params: ArrayTree) -> Episode:
    """Draws one episode.

    A distribution with a second required argument gets the parameters, as constants to the gradient.

    Raises:
      ValueError: if what the distribution returns has no support set.
    """
    required = [
        parameter
        for parameter in inspect.signature(sample_episode).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    arguments = (key,) if len(required) < 2 else (key, jax.lax.stop_gradient(params))
    episode = sample_episode(*arguments)
    if not hasattr(episode, "support"):
        raise ValueError(
            f"a task distribution returns an Episode, and this one returned a {type(episode).__name__}; return "
            "Episode(support, query, key)"
        )
    return episode


def leaf_names(tree: ArrayTree) -> list[str]:
    """The names of the leaves, which are their paths, such as "norm_0/offset".

    Dataclasses and named tuples give the names of their fields. The array in a variable of `flax.nnx` has the name of
    the variable, as in linen.
    """

    def is_variable(node: Any) -> bool:
        return hasattr(node, "get_raw_value")

    names = []
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable):
        parts = jax.tree_util.tree_leaves_with_path(node)
        for part, _ in parts:
            full = (*path, *(part if len(parts) > 1 or not is_variable(node) else ()))
            names.append(jax.tree_util.keystr(full, simple=True, separator="/"))
    return names


def named_leaves(tree: ArrayTree) -> dict[str, Any]:
    """The leaves by their names; see `leaf_names`."""
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def partition(tree: ArrayTree, belongs: Callable[[str, Any], bool]) -> tuple[ArrayTree, ArrayTree]:
    """Divides a tree into two of the same form, with None for the leaves of the other one.

    Args:
      tree: any pytree.
      belongs: `(name, leaf) -> bool`, whether a leaf is in the first tree; the name is as in `leaf_names`.
    """
    leaves, structure = jax.tree.flatten(tree)
    is_chosen = [bool(belongs(name, leaf)) for name, leaf in zip(leaf_names(tree), leaves, strict=True)]

    def part(chosen: bool) -> ArrayTree:
        return structure.unflatten([leaf if of == chosen else None for leaf, of in zip(leaves, is_chosen, strict=True)])

    return part(True), part(False)


def combine(tree: ArrayTree, other: ArrayTree) -> ArrayTree:
    """The inverse of `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, tree, other, is_leaf=lambda leaf: leaf is None)


def select(params: ArrayTree, where: Callable[[str], bool] | None) -> tuple[ArrayTree, ArrayTree]:
    """Divides parameters into those that adapt and the others, each with None where the other has a leaf.

    Args:
      params: a pytree.
      where: `(name) -> bool`, whether a parameter adapts; None for all of them.

    Raises:
      ValueError: if there are parameters and `where` is false for all.
    """
    if where is None:
        return params, jax.tree.map(lambda _: None, params)
    check_function("`where`", where, 'lambda name: name.startswith("head")')
    chosen, others = partition(params, lambda name, _: where(name))
    if jax.tree.leaves(others) and not jax.tree.leaves(chosen):
        names = list(named_leaves(params))
        raise ValueError(f"`where` selects none of the parameters {names}; correct the names in it")
    return chosen, others

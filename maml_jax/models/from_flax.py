"""Turns flax modules into `Model`s, pairs of pure functions."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import InvalidRngError, ModifyScopeVariableError
from flax.traverse_util import flatten_dict

from maml_jax.types import ArrayTree, Model

if TYPE_CHECKING:
    from flax import nnx


def from_linen(module: nn.Module, *, rngs: Sequence[str] = (), frozen: Mapping[str, ArrayTree] | None = None) -> Model:
    """Makes a `Model` of a linen module whose variables are parameters and constants.

    The `init` of the model has an optional third argument `params`, a part of the parameters. It keeps these and
    draws the others. A learner that starts from a pretrained body and a new head is built from
    `model._replace(init=functools.partial(model.init, params={"body": pretrained}))`.

    Args:
      module: called as `module(inputs) -> outputs`, with inputs [S, ...].
      rngs: names of the random streams that `module` draws from in training, such as `("dropout",)`. With names,
        the model is stochastic. A key given to `apply` puts the module into training mode, and every stream gets
        its own key derived from it. Without a key the module is in evaluation mode, and every `nn.Dropout` is the
        identity. The mode is passed to the arguments `train`, `training` and `deterministic` of `module.__call__`,
        if it has them. Without names and `frozen`, these arguments keep their defaults; one without a default
        says evaluation.
      frozen: collections of variables beside "params" that stay as they are, such as the running averages
        `{"batch_stats": ...}` of a trained network. Without a key the module is then in evaluation mode.

    Returns:
      A `Model` whose parameters are the module's "params" collection.

    Raises:
      ValueError: if `module` is not a linen module, `rngs` is a string, or `frozen` holds "params". `init` raises it if
        the module keeps variables that are not frozen, such as the running averages of `nn.BatchNorm`, which are state
        that an inner loop would have to carry; if `frozen` lacks one of a collection, or has another shape; if the
        module changes a frozen variable; if it needs more arguments than its inputs; if it draws from a stream that
        `rngs` does not name, or without a key; and if a given parameter has a name or a shape that the module does not
        have.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module must be a flax.linen module, got {module!r}; of a class make an instance")
    if isinstance(rngs, str):
        raise ValueError(f'rngs must be a sequence of names, got {rngs!r}; write rngs=("{rngs}",)')
    frozen = dict(frozen or {})
    if "params" in frozen:
        raise ValueError('frozen holds "params", which an inner loop adapts; pass them to init, or name them in where=')
    name = type(module).__name__
    accepted = inspect.signature(module.__call__).parameters

    def mode(training):
        arguments = {"train": training, "training": training, "deterministic": not training}
        return {argument: value for argument, value in arguments.items() if argument in accepted}

    required = {
        name
        for name, argument in accepted.items()
        if argument.default is argument.empty and argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
    }
    if others := [name for name in required - mode(training=False).keys() if name != next(iter(accepted))]:
        raise ValueError(
            f"{name} has the arguments {sorted(others)} beside its inputs, and a model is called as module(inputs); "
            "let it take one pytree of inputs"
        )

    def evaluate(method, *args, **kwargs):
        if not rngs and not frozen:
            wanted = {argument: value for argument, value in mode(training=False).items() if argument in required}
            return method(*args, **kwargs, **wanted)
        with nn.intercept_methods(_skip_dropout):
            return method(*args, **kwargs, **mode(training=False))

    def apply(params, inputs, *, key=None):
        if key is None:
            return evaluate(module.apply, {"params": params, **frozen}, inputs)
        keys = {stream: jax.random.fold_in(key, index) for index, stream in enumerate(rngs)}
        return module.apply({"params": params, **frozen}, inputs, rngs=keys, **mode(training=True))

    def draw(key, inputs):
        variables = dict(evaluate(module.init, key, inputs))
        params = variables.pop("params", {})
        if kept := sorted(variables.keys() - frozen.keys()):
            raise ValueError(
                f"{name} keeps variables beside its parameters: {kept}; an inner loop only adapts parameters. Use "
                "maml_jax.models.BatchStatNorm or PopulationNorm instead of a normalisation with running averages, or "
                "pass those of a trained network as frozen="
            )
        check_frozen(variables)
        try:
            for stream_key in (key, None) if rngs else (None if frozen else key,):
                jax.eval_shape(functools.partial(apply, key=stream_key), params, inputs)
        except ModifyScopeVariableError as error:
            raise ValueError(
                f"{name} changes a variable in a call, and {sorted(frozen)} are frozen: {error}. Build "
                "normalisations with use_running_average=True"
            ) from error
        except InvalidRngError as error:
            raise ValueError(
                f"{name} draws from a random stream that rngs={tuple(rngs)} does not name, or draws without a key: "
                f'{error}. Name every stream, as in from_linen(module, rngs=("dropout",)). If the module draws '
                "outside nn.Dropout, its __call__ needs an argument `train` that turns this off"
            ) from error
        return params

    def check_frozen(variables):
        expected = {path: leaf.shape for path, leaf in flatten_dict(variables).items()}
        given = {path: jnp.shape(leaf) for path, leaf in flatten_dict(frozen).items()}
        if wrong := sorted(path for path in expected.keys() | given.keys() if expected.get(path) != given.get(path)):
            path, none = wrong[0], "no such variable"
            raise ValueError(
                f"of {'/'.join(path)}, frozen has {given.get(path, none)} and {name} has {expected.get(path, none)}; "
                "freeze the variables of this module, and all of a collection"
            )

    def init(key, inputs, params=None):
        if params is None:
            return draw(key, inputs)
        expected = flatten_dict(jax.eval_shape(draw, key, inputs))
        for path, leaf in flatten_dict(params).items():
            if path not in expected or jnp.shape(leaf) != expected[path].shape:
                raise ValueError(
                    f"params has {'/'.join(path)} of shape {jnp.shape(leaf)}, and {name} has "
                    f"{expected[path].shape if path in expected else 'no such parameter'}; leave out the parameters "
                    "that are to be drawn"
                )
        # A copy, because a training loop donates its state and the caller keeps `params`.
        given = {"params": jax.tree.map(jnp.copy, params), **frozen}
        filled = evaluate(module.apply, given, inputs, rngs={"params": key}, mutable=["params"])[1]
        return filled["params"]

    if rngs:
        return Model(init, apply, stochastic=True)
    return Model(init, lambda params, inputs: apply(params, inputs))


def _skip_dropout(next_function, args, kwargs, context):
    if isinstance(context.module, nn.Dropout):
        return args[0] if args else kwargs["inputs"]
    return next_function(*args, **kwargs)


def from_nnx(module: "nnx.Module | Callable[..., nnx.Module]") -> Model:
    """Makes a `Model` of an nnx module.

    Variables other than `nnx.Param`, and arrays made by the constructor, are constants of the model. A module with
    random streams, such as those of `nnx.Dropout`, makes a stochastic model. A key given to `apply` reseeds the
    streams and sets the attribute `deterministic` of every layer to False. Without a key, `deterministic` is True.
    `use_running_average` is not changed.

    Args:
      module: a function called as `module(rngs=nnx.Rngs(...))`, such as a module class, with which `init` draws new
        parameters; its constants are those made with `nnx.Rngs(0)`. Or a module: `init` then returns copies of its
        present parameters, whatever the key, and later changes of the module have no effect.

    Returns:
      A `Model` whose parameters are the `nnx.State` of the module's `nnx.Param`s.

    Raises:
      ValueError: from `init`, if a call changes variables that are neither parameters nor random streams, such as
        the running averages of `nnx.BatchNorm`. Variables that pass through `nnx.jit` or `nnx.remat` count as
        changed.
    """
    from flax import nnx  # here, because it takes a tenth of the import of everything

    is_module = isinstance(module, nnx.Module)
    built = nnx.clone(module, arrays=True) if is_module else module(rngs=nnx.Rngs(0))
    name = type(built).__name__
    graphdef, present, constants = nnx.split(built, nnx.Param, ...)
    variables = [variable for _, variable in nnx.to_flat_state(constants)]
    streams = sorted({variable.tag for variable in variables if isinstance(variable, nnx.RngKey)})

    def merge(params, constants, key=None):
        # A copy of the variables, not of their arrays: a call changes the counters of random streams in place.
        instance = nnx.merge(graphdef, params, constants, copy=True)
        if streams:
            instance.set_attributes(deterministic=key is None, raise_if_not_found=False)
        if key is not None:
            keys = {stream: jax.random.fold_in(key, index) for index, stream in enumerate(streams)}
            nnx.reseed(instance, policy="match_shape", **keys)
        return instance

    def changed_kinds(params, inputs, key):
        kinds = set()

        def others(instance):
            state = nnx.split(instance, nnx.Param, nnx.RngState, ...)[-1]
            return {
                path: (type(leaf).__name__ if isinstance(leaf, nnx.Variable) else "array", jax.tree.leaves(leaf))
                for path, leaf in nnx.to_flat_state(state)
            }

        def call(params, constants, inputs, key):
            instance = merge(params, constants, key)
            before, outputs, after = others(instance), instance(inputs), others(instance)
            for path, (kind, leaves) in before.items():
                # In a traced call, an unchanged variable holds the same tracer as before.
                if any(new is not old for new, old in zip(after[path][1], leaves, strict=True)):
                    kinds.add(kind)
            return outputs

        jax.eval_shape(call, params, constants, inputs, key if streams else None)
        return sorted(kinds)

    def init(key, inputs):
        if is_module:
            # A copy, because a training loop donates its state and `init` may be called again.
            params = jax.tree.map(jnp.copy, present)
        else:
            params = nnx.split(module(rngs=nnx.Rngs(key)), nnx.Param, ...)[1]
        if kinds := changed_kinds(params, inputs, key):
            raise ValueError(
                f"a call of {name} changes its variables of kind {kinds}; an inner loop only adapts nnx.Param. Build "
                "normalisations with use_running_average=True, or use one without running averages"
            )
        return params

    if streams:
        return Model(init, lambda params, inputs, *, key=None: merge(params, constants, key)(inputs), stochastic=True)
    return Model(init, lambda params, inputs: merge(params, constants)(inputs))

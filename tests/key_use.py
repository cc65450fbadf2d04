"""Watches the random keys that a function consumes."""

import contextlib
import inspect

import jax
import numpy as np
import pytest


def assert_every_key_has_one_purpose(sample_episode, key):
    """Samples an episode and checks that no two of its random choices can depend on each other through a key.

    Each key that is drawn from or split must descend from `key` and be used once, and `episode.key` must be a
    descendant of `key` that nothing has used. Runs the sampler without jit; what it returns is the episode.
    """
    used, made = [], [_data(key)]

    def note(name, data):
        used.append(data)

    def keep(result):
        if _is_key(result):
            made.extend(_flat(data) for data in np.asarray(jax.random.key_data(result)).reshape(-1, 2))

    with _watched(note, keep):
        episode = sample_episode(key)
    jax.effects_barrier()

    assert len(used) > 1
    assert set(used) <= set(made), "a key was used that does not descend from the key of the episode"
    assert len(set(used)) == len(used), "a key was used twice"
    assert _data(episode.key) in made[1:], "episode.key does not descend from the key of the episode"
    assert _data(episode.key) not in used, "episode.key was used for the episode itself"
    return episode


def keys_by_use(function):
    """Calls `function()` and finds the keys that it draws from, as a list, and those that it makes others of, as a set.

    Keys that `split` and `fold_in` make of one key may be equal, so only the numbers of a key tell whether two draws
    depend on each other.
    """
    drawn, divided = [], set()

    def note(name, data):
        if name in ("split", "fold_in"):
            divided.add(data)
        else:
            drawn.append(data)

    with _watched(note):
        jax.block_until_ready(function())
    jax.effects_barrier()
    return drawn, divided


@contextlib.contextmanager
def _watched(note, keep=lambda result: None):
    """Calls `note(name, key)` whenever a function of `jax.random` uses a key, and `keep` with what it returns."""

    def watched(name, function):
        def call(key, *args, **kwargs):
            # A callback, because inside `vmap` the numbers of a key are not known.
            jax.debug.callback(lambda data: note(name, _flat(data)), jax.random.key_data(key))
            result = function(key, *args, **kwargs)
            keep(result)
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, function in vars(jax.random).items():
            if inspect.isfunction(function) and next(iter(inspect.signature(function).parameters), None) == "key":
                patch.setattr(jax.random, name, watched(name, function))
        yield


def _is_key(value):
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


def _data(key):
    return _flat(jax.random.key_data(key))


def _flat(data):
    return tuple(np.asarray(data).ravel().tolist())

"""What belongs to one step of an inner loop: its key and its mini-batch, for `per_step` of `inner_loop`."""

import jax

from maml_jax.types import PRNGKey, task_keys


def step_keys(key: PRNGKey | None, num_steps: int) -> PRNGKey | None:
    """The keys [K] of the inner steps, `fold_in(key, k)`; None without a key."""
    return None if key is None else task_keys(key, num_steps)


def mini_batches(key: PRNGKey, num_examples: int, num_steps: int, batch_size: int) -> jax.Array:
    """Passes through a set of examples, each in another order and without a gap between them.

    A mini-batch that ends one pass and begins the next may hold an example twice.

    Args:
      key: the randomness of the orders.
      num_examples: S.
      num_steps: K.
      batch_size: B ≤ S.

    Returns:
      int32 [K, B], the examples of each mini-batch.

    Raises:
      ValueError: if B > S.
    """
    if batch_size > num_examples:
        raise ValueError(
            f"mini-batches of {batch_size} exceed the {num_examples} examples; choose a smaller batch_size"
        )
    num_passes = -(-num_steps * batch_size // num_examples)
    orders = jax.vmap(lambda k: jax.random.permutation(k, num_examples))(jax.random.split(key, num_passes))
    return orders.reshape(-1)[: num_steps * batch_size].reshape(num_steps, batch_size)

"""RL²: a recurrent policy whose state carries what it has learned of a task from one episode to the next.

A trial is several episodes of one task. The policy sees what it did last, what that earned, and whether an episode has
just ended. Its state is zero at the start of a trial and is kept at the ends of episodes. Whole trials are trained with
the loss of proximal policy optimisation, so that exploring in one episode pays in the next.

Duan, Schulman, Chen, Bartlett, Sutskever and Abbeel, 2016, RL²: fast reinforcement learning via slow reinforcement
learning. https://arxiv.org/abs/1611.02779
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maml_jax import models
from maml_jax.inner.learner import observed_once
from maml_jax.rl.advantages import generalised_advantages, standardised
from maml_jax.rl.distributions import Categorical, unless_diverged
from maml_jax.rl.environments import check_environment
from maml_jax.rl.surrogates import Transition, clipped_surrogate, masked_mean
from maml_jax.types import (
    ArrayTree,
    Batch,
    Environment,
    Episode,
    MetaLearner,
    PRNGKey,
    SampleEpisodeFn,
    check_integer,
    check_not_negative,
    check_positive,
)


class RecurrentPolicy(NamedTuple):
    """A policy with a state.

    Attributes:
      init: `(key, inputs [..., D]) -> params`.
      start: `() -> carry`, the state at the start of a trial.
      step: `(params, carry, inputs [D]) -> (carry, (Categorical, value))`.
      num_actions: A.
    """

    init: Callable[[PRNGKey, jax.Array], ArrayTree]
    start: Callable[[], ArrayTree]
    step: Callable[[ArrayTree, ArrayTree, jax.Array], tuple[ArrayTree, tuple[Categorical, jax.Array]]]
    num_actions: int


class Trial(NamedTuple):
    """One trial, leaves [L, ...] for at most L time steps.

    Attributes:
      inputs: [L, D], what the policy saw: observation, last action (one-hot), last reward, end of the last episode.
      action: int32 [L].
      reward: [L], 0 after the end of the trial.
      mask: [L], 1 for a time step of the trial and 0 after its end.
      episode: int32 [L], the index of the episode.
      done: [L], 1 where the environment ended the episode at this time step.
      policy: the distributions that the actions were drawn from.
      value: [L], the values that the policy expected.
    """

    inputs: jax.Array
    action: jax.Array
    reward: jax.Array
    mask: jax.Array
    episode: jax.Array
    done: jax.Array
    policy: Categorical
    value: jax.Array


class TrialTargets(NamedTuple):
    """What the loss of a trial needs beside the inputs.

    Attributes:
      transition: what happened, leaves [L, ...].
      value: [L], the targets of the values.
    """

    transition: Transition
    value: jax.Array


class TrialInfo(NamedTuple):
    """What the objective of RL² reports about one trial.

    Attributes:
      reward: the sum of all rewards.
      kl: KL(policy that acted ‖ policy now), a mean over time steps, in nats.
      entropy: of the policy, a mean over time steps, in nats.
      value_error: the mean squared error of the values.
    """

    reward: jax.Array
    kl: jax.Array
    entropy: jax.Array
    value_error: jax.Array


def gru_policy(*, num_actions: int, hidden_size: int = 64, memory: int | None = None) -> RecurrentPolicy:
    """A gated recurrent unit with a linear layer for the logits and one for the value.

    Args:
      num_actions: A.
      hidden_size: the number of units.
      memory: the time steps that units remember at the start, at most; None for what the zero biases of `models.gru`
        give, about two.

    Returns:
      A `RecurrentPolicy` with inputs [..., O + A + 2] for any O: the observation, the last action, its reward, and
      whether an episode has ended.

    Raises:
      ValueError: if a number is not a positive integer, or `memory` below 2.
    """
    num_actions = check_integer("num_actions", num_actions, at_least=1)
    network = models.gru(hidden_size=hidden_size, heads={"logits": num_actions, "value": 1}, memory=memory)

    def step(params: ArrayTree, carry: ArrayTree, inputs: jax.Array) -> tuple:
        carry, outputs = network.step(params, carry, inputs)
        return carry, (Categorical(outputs["logits"]), outputs["value"][..., 0])

    return RecurrentPolicy(network.init, network.start, step, num_actions)


def _check_policy(policy: RecurrentPolicy) -> None:
    """Raises ValueError unless `policy` is a `RecurrentPolicy`."""
    if not isinstance(policy, RecurrentPolicy):
        raise ValueError(
            f"policy must be an rl.RecurrentPolicy, got {type(policy).__name__}; rl.gru_policy, rl.associative_policy "
            "and rl.maml_policy make one"
        )


def check_input_size(inputs: jax.Array, observation_size: int, num_actions: int) -> None:
    """Raises ValueError for inputs [..., I] of a recurrent policy that do not fit its flat observation and actions."""
    expected = observation_size + num_actions + 2
    if inputs.shape[-1] != expected:
        raise ValueError(
            f"the inputs have {inputs.shape[-1]} numbers; observation_size={observation_size} and "
            f"num_actions={num_actions} need {expected}: the observation, the last action, its reward, and the end"
        )


def associative_policy(
    *, num_actions: int, observation_size: int, hidden_size: int = 64, memory: int | None = None
) -> RecurrentPolicy:
    """A gated recurrent unit that can bind a reward to the observation and the action that it followed.

    The unit also reads the outer product of the last observation o' and the last action, and that times the last
    reward. Its layers are read at the present observation o: the logits are b(h) + oᵀ W(h), with b [A] and W [O, A]
    linear in the state h, and the value alike. A plain unit has to learn such products. This is not in the RL² paper.

    Args:
      num_actions: A.
      observation_size: O, of an observation that is one flat array.
      hidden_size: the number of units.
      memory: as in `gru_policy`.

    Returns:
      A `RecurrentPolicy` with inputs [..., O + A + 2], as those of `gru_policy`.

    Raises:
      ValueError: if a number is not a positive integer, or `memory` below 2. `init` raises it if inputs have another
        size.
    """
    num_actions = check_integer("num_actions", num_actions, at_least=1)
    size = check_integer("observation_size", observation_size, at_least=1)
    heads = {"logits": num_actions, "value": 1, "logits_of": size * num_actions, "value_of": size}
    network = models.gru(hidden_size=hidden_size, heads=heads, memory=memory)

    def init(key: PRNGKey, inputs: jax.Array) -> ArrayTree:
        check_input_size(inputs, size, num_actions)
        return network.init(key, jnp.zeros((1, inputs.shape[-1] + 2 * size * num_actions)))

    def start() -> ArrayTree:
        return {"hidden": network.start(), "observation": jnp.zeros(size)}

    def step(params: ArrayTree, carry: ArrayTree, inputs: jax.Array) -> tuple:
        observation, action, (reward, _) = jnp.split(inputs, (size, size + num_actions))
        pair = jnp.outer(carry["observation"], action).ravel()  # zero before the first action
        hidden, outputs = network.step(params, carry["hidden"], jnp.concatenate([inputs, pair, reward * pair]))
        logits = outputs["logits"] + observation @ outputs["logits_of"].reshape(size, num_actions)
        value = outputs["value"][0] + observation @ outputs["value_of"]
        return {"hidden": hidden, "observation": observation}, (Categorical(logits), value)

    return RecurrentPolicy(init, start, step, num_actions)


def run_trial(
    environment: Environment,
    policy: RecurrentPolicy,
    params: ArrayTree,
    task: ArrayTree,
    key: PRNGKey,
    *,
    num_episodes: int,
    horizon: int,
    greedy: bool = False,
) -> Trial:
    """Lets a recurrent policy act through the episodes of one trial.

    An episode ends when the environment says so, or after `horizon` time steps; the next one starts at once.

    Args:
      environment: the processes.
      policy: with as many actions as the environment.
      params: of the policy.
      task: of the environment.
      key: the randomness.
      num_episodes: E.
      horizon: H, the most time steps of an episode.
      greedy: whether the most probable action is taken, in place of a draw.

    Returns:
      A `Trial` with L = E·H.

    Raises:
      ValueError: if a count is wrong, `policy` is not a `RecurrentPolicy`, or the environment breaks its contract.
    """
    _check_policy(policy)
    num_episodes = check_integer("num_episodes", num_episodes, at_least=1)
    horizon = check_integer("horizon", horizon, at_least=1)
    task = jax.tree.map(jnp.asarray, task)  # an environment may index it by what is traced
    reset_key, act_key = jax.random.split(key)
    state, observation = jax.tree.map(jnp.asarray, environment.reset(task, reset_key))
    one = Categorical(jnp.zeros((1, policy.num_actions)))
    check_environment(environment, task, one, *jax.tree.map(lambda x: x[None], (state, observation)))

    def act(carry, key):
        state, observation, last, hidden, episode, time = carry
        action_key, step_key, reset_key = jax.random.split(key, 3)
        inputs = jnp.concatenate([*(leaf.reshape(-1) for leaf in jax.tree.leaves(observation)), last])
        hidden, (distribution, value) = policy.step(params, hidden, inputs)
        action = distribution.mode() if greedy else distribution.sample(action_key)
        mask = (episode < num_episodes).astype(inputs.dtype)
        state, observation, reward, done = environment.step(task, state, action, step_key)
        reward = jnp.where(mask > 0, unless_diverged(distribution, action, reward), 0.0)
        ends = done | (time + 1 >= horizon)
        step = Trial(inputs, action, reward, mask, episode, mask * done, distribution, value)
        state, observation = jax.tree.map(
            lambda fresh, old: jnp.where(ends, fresh, old), environment.reset(task, reset_key), (state, observation)
        )
        last = jnp.concatenate(
            [jax.nn.one_hot(action, policy.num_actions), jnp.stack([reward, ends]).astype(inputs.dtype)]
        )
        return (state, observation, last, hidden, episode + ends, jnp.where(ends, 0, time + 1)), step

    nothing = jnp.zeros(policy.num_actions + 2)
    start = (state, observation, nothing, policy.start(), jnp.int32(0), jnp.int32(0))
    return jax.lax.scan(act, start, jax.random.split(act_key, num_episodes * horizon))[1]


def make_trial_sampler(
    environment: Environment,
    policy: RecurrentPolicy,
    *,
    num_episodes: int,
    horizon: int,
    discount: float = 0.99,
    decay: float = 0.95,
    reward_scale: float = 1.0,
) -> SampleEpisodeFn:
    """A distribution of trials that the current policy goes through.

    Args:
      environment: the processes.
      policy: the recurrent policy.
      num_episodes: E, of a trial.
      horizon: H, the most time steps of an episode.
      discount: γ, over the time steps of the whole trial.
      decay: λ of the generalised advantages.
      reward_scale: what rewards are multiplied by before values and advantages are computed. If returns are large,
        the squared error of the values outweighs the rest of the objective.

    Returns:
      `sample_episode(key, params)`, an episode whose support set is the trial, [L, ...], with an empty query set.

    Raises:
      ValueError: if `policy` is not a `RecurrentPolicy`, a count is wrong, γ or λ is negative or above 1, or the scale
        is not positive.
    """
    _check_policy(policy)
    num_episodes = check_integer("num_episodes", num_episodes, at_least=1)
    horizon = check_integer("horizon", horizon, at_least=1)
    for name, value in {"discount": discount, "decay": decay}.items():
        check_not_negative(name, value)
        if value > 1.0:
            raise ValueError(f"{name}={value} must be at most 1")
    check_positive("reward_scale", reward_scale)

    def sample_episode(key: PRNGKey, params: ArrayTree) -> Episode:
        task_key, trial_key = jax.random.split(key)
        task = environment.sample_task(task_key)
        trial = run_trial(environment, policy, params, task, trial_key, num_episodes=num_episodes, horizon=horizon)
        scaled = reward_scale * trial.reward
        advantage = generalised_advantages(scaled, trial.value, trial.mask, discount=discount, decay=decay)
        transition = Transition(trial.action, trial.reward, advantage, trial.mask, trial.policy)
        return Episode(Batch(trial.inputs, TrialTargets(transition, advantage + trial.value)), Batch((), ()))

    return sample_episode


def standardise_advantages(episodes: Episode) -> Episode:
    """Trials [T, L, ...] whose advantages have mean 0 and standard deviation 1 over all of them."""
    targets = episodes.support.targets
    transition = targets.transition
    transition = transition._replace(advantage=standardised(transition.advantage, transition.mask))
    return episodes._replace(support=episodes.support._replace(targets=targets._replace(transition=transition)))


def rl2(
    policy: RecurrentPolicy, *, clip: float = 0.2, value_weight: float = 0.5, entropy_weight: float = 0.01
) -> MetaLearner:
    """Builds RL²: the inner loop is the recurrent policy itself, and the outer one trains it on whole trials.

    The objective of one trial is its `clipped_surrogate`, plus `value_weight` times half the squared error of the
    values, minus `entropy_weight` times the entropy. Each is a sum over the time steps of the trial, divided by the
    most that it may have, L. So every time step counts the same, in short trials as in long ones.

    Args:
      policy: the recurrent policy.
      clip: ε of the clipped ratio.
      value_weight: weight of half the squared error of the values.
      entropy_weight: weight of the entropy, in nats.

    Returns:
      A `MetaLearner` for `make_trial_sampler`. `adapt` reads a trial [L, ...] and gives {"params": θ, "carry": the
      state of the policy at its end}; `predict` goes on from there through inputs [L, D], and returns distributions
      and values. The info of the objective is a `TrialInfo`.

    Raises:
      ValueError: if `policy` is not a `RecurrentPolicy`, a weight is negative, or `clip` is not positive.

    References:
      Duan et al., 2016. https://arxiv.org/abs/1611.02779
      Schulman et al., 2017, equation 9. https://arxiv.org/abs/1707.06347
    """
    _check_policy(policy)
    surrogate = clipped_surrogate(clip)
    check_not_negative("value_weight", value_weight)
    check_not_negative("entropy_weight", entropy_weight)

    def read(params: ArrayTree, carry: ArrayTree, inputs: jax.Array) -> tuple:
        return jax.lax.scan(lambda carry, step: policy.step(params, carry, step), carry, inputs)

    def adapt(meta_params, support, *, key=None, observe_fn=None):
        def go_on(carry, step):
            inputs, mask = step
            following, _ = policy.step(meta_params, carry, inputs)
            return jax.tree.map(lambda new, old: jnp.where(mask > 0, new, old), following, carry), None

        carry, _ = jax.lax.scan(go_on, policy.start(), (support.inputs, support.targets.transition.mask))
        task_params = {"params": meta_params, "carry": carry}
        return task_params, observed_once(task_params, observe_fn)

    def predict(task_params, inputs):
        return read(task_params["params"], task_params["carry"], inputs)[1]

    def objective(meta_params, episode):
        targets = episode.support.targets
        _, (distribution, value) = read(meta_params, policy.start(), episode.support.inputs)
        transition, mask = targets.transition, targets.transition.mask
        error = masked_mean(jnp.square(value - targets.value), mask)
        entropy = masked_mean(distribution.entropy(), mask)
        loss = surrogate(distribution, transition) + 0.5 * value_weight * error - entropy_weight * entropy
        loss *= jnp.mean(mask)  # the means of the terms are over the time steps that the trial has
        kl = masked_mean(transition.policy.kl(distribution), mask)
        return loss, TrialInfo(jnp.sum(transition.reward), kl, entropy, error)

    return MetaLearner(policy.init, adapt, predict, objective)

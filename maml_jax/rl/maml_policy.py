"""MAML within a trial: a policy that takes a policy-gradient step after every reward, and whose start is learnt.

The parameters of the moment φ are the state of a recurrent policy, and an inner step is its transition. Data and
adaptation therefore alternate once per time step, and whole trials are trained as those of RL². The derivative passes
through every inner step exactly. The objective counts each action under the φ that took it, so the reward of a trial
includes what was earned while adapting, as published totals do.

Finn, Abbeel and Levine, 2017, section 3.3, with one trajectory of one time step for every update.
https://arxiv.org/abs/1703.03400
"""

import jax
import jax.numpy as jnp

from maml_jax import models
from maml_jax.inner import mixed_mode
from maml_jax.rl.distributions import Categorical
from maml_jax.rl.policies import categorical_policy
from maml_jax.rl.surrogates import Transition, policy_gradient
from maml_jax.rl.trials import RecurrentPolicy
from maml_jax.types import ArrayTree, InnerGradFn, LossFn, Model, check_integer


def maml_policy(
    model: Model,
    *,
    num_actions: int,
    observation_size: int,
    inner_lr: float = 1.0,
    baseline: float = 0.0,
    learn_rates: bool = True,
    learn_temperature: bool = True,
    loss_fn: LossFn = policy_gradient,
    critic_size: int = 64,
    inner_grad: InnerGradFn = mixed_mode,
) -> RecurrentPolicy:
    """A policy that takes one inner step φ ← φ − α ∘ ∇ loss(φ) after every time step.

    The inner loss is a surrogate of softmax(f_φ), where f is the network; what acts is softmax(β f_φ). With β = 1 both
    are the same policy, but then a policy that has become certain has no gradient left, and cannot leave an arm that
    disappoints. The advantage of an action is its own reward minus b, so an action should not change what later ones
    earn: the policy is made for bandits. θ, b, the rates α (one per parameter) and β are learnt.

    Args:
      model: the network, from observations [S, D] to logits [S, A].
      num_actions: A.
      observation_size: D, the numbers of an observation.
      inner_lr: all rates at the start.
      baseline: b at the start.
      learn_rates: False keeps α at `inner_lr`.
      learn_temperature: False keeps β at 1.
      loss_fn: the inner loss, a surrogate of this package. All that are exact in the first derivative give the same
        inner steps; the derivative of `policy_gradient` is that of the step as it is taken.
      critic_size: hidden units of the values, which are a function of the probabilities of the actions and of the time.
      inner_grad: how an inner gradient is differentiated.

    Returns:
      A `RecurrentPolicy` for `run_trial`, `make_trial_sampler` and `rl2`. Its parameters are {"start": θ, "rates": α,
      "baseline": b, "inverse_temperature": β, "critic": those of the values}.

    Raises:
      ValueError: if `model` is no `Model`, or a count no positive integer.
    """
    num_actions = check_integer("num_actions", num_actions, at_least=1)
    observation_size = check_integer("observation_size", observation_size, at_least=1)
    policy = categorical_policy(model)
    critic = models.mlp(features=(check_integer("critic_size", critic_size, at_least=1), 1))
    observations = jax.ShapeDtypeStruct((1, observation_size), jnp.float32)

    def init(key: jax.Array, inputs: jax.Array) -> ArrayTree:
        start_key, critic_key = jax.random.split(key)
        start = policy.init(start_key, jnp.zeros(observations.shape))
        return {
            "start": start,
            "rates": jax.tree.map(lambda leaf: jnp.full_like(leaf, inner_lr), start),
            "baseline": jnp.float32(baseline),
            "inverse_temperature": jnp.float32(1.0),
            "critic": critic.init(critic_key, jnp.zeros((1, num_actions + 1))),
        }

    def start() -> ArrayTree:
        shapes = jax.eval_shape(policy.init, jax.random.key(0), observations)
        change = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
        return {"change": change, "observation": jnp.zeros(observation_size), "time": jnp.zeros(())}

    def step(params: ArrayTree, carry: ArrayTree, inputs: jax.Array) -> tuple:
        observation, action, reward, _ = jnp.split(
            inputs, [observation_size, observation_size + num_actions, observation_size + num_actions + 1]
        )
        learnt = {"rates": learn_rates, "inverse_temperature": learn_temperature}
        params = params | {name: jax.lax.stop_gradient(params[name]) for name, learns in learnt.items() if not learns}
        task_params = jax.tree.map(jnp.add, params["start"], carry["change"])
        seen = carry["observation"][None, None]
        acted = Transition(
            action=jnp.argmax(action)[None, None],
            reward=reward[None],
            advantage=reward[None] - params["baseline"],
            mask=jnp.sum(action)[None, None],  # before the first action it is 0, and so is the step
            policy=policy.apply(task_params, seen),
        )
        _, grads = inner_grad(lambda task_params: loss_fn(policy.apply(task_params, seen), acted))(task_params)
        change = jax.tree.map(lambda old, rate, grad: old - rate * grad, carry["change"], params["rates"], grads)
        task_params = jax.tree.map(jnp.add, params["start"], change)
        logits = params["inverse_temperature"] * policy.apply(task_params, observation[None]).logits[0]
        features = jnp.concatenate([jax.nn.softmax(logits), jnp.log1p(carry["time"])[None]])
        value = critic.apply(params["critic"], features[None])[0, 0]
        return (
            {"change": change, "observation": observation, "time": carry["time"] + 1.0},
            (Categorical(logits), value),
        )

    return RecurrentPolicy(init, start, step, num_actions)

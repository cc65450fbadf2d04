"""MAML within a trial: a policy that takes a policy-gradient step after every reward, and whose start is learned.

The current parameters φ are the state of a recurrent policy, and an inner step is its transition. Data and adaptation
therefore alternate once per time step, and whole trials are trained as those of RL². The derivative passes through
every inner step exactly. Every reward of a trial counts, also those that are earned while adapting.

Finn, Abbeel and Levine, 2017, section 3.2 and Algorithm 3, with one trajectory of one time step for every update.
https://arxiv.org/abs/1703.03400
"""

import jax
import jax.numpy as jnp

from maml_jax import models
from maml_jax.inner import mixed_mode
from maml_jax.rl.distributions import Categorical
from maml_jax.rl.policies import categorical_policy
from maml_jax.rl.surrogates import Transition, policy_gradient
from maml_jax.rl.trials import RecurrentPolicy, check_input_size
from maml_jax.types import ArrayTree, InnerGradFn, LossFn, Model, check_integer, check_positive, holds_for


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

    The inner loss is a surrogate of softmax(f_φ), where f is the network. What acts is softmax(β f_φ). With β = 1 both
    are the same policy; but a policy that has become certain has no gradient left, so it cannot leave an action that
    disappoints.

    The advantage of an action is its own reward minus b. That is right for bandits. Elsewhere it leaves out what an
    action changes in later rewards: the inner step is then biased, and the outer objective is not.

    θ, the rates α (one per parameter, which may become negative), b and β are learned, together with the values.

    Args:
      model: the network, from observations [S, D] to logits [S, A].
      num_actions: A.
      observation_size: D, the numbers of an observation.
      inner_lr: all rates at the start.
      baseline: b at the start.
      learn_rates: False keeps α at `inner_lr`, as in MAML.
      learn_temperature: False keeps β at 1, as in MAML.
      loss_fn: the inner loss, a surrogate of this package. All give the same inner steps. Keep `policy_gradient`: its
        second derivative is that of the step which is taken, and those of the others are not.
      critic_size: hidden units of the values, which are a function of the probabilities of the actions and of the time.
      inner_grad: how an inner gradient is differentiated.

    Returns:
      A `RecurrentPolicy` for `run_trial`, `make_trial_sampler` and `rl2`. Its inputs are [..., D + A + 2]. Its
      parameters are {"start": θ, "rates": α, "baseline": b, "inverse_temperature": β, "critic": those of the values}.

    Raises:
      ValueError: if `model` is not a `Model`, a count not a positive integer, `inner_lr` not positive or `baseline` not
        finite. `init` and `step` raise it if inputs or logits have another size.

    References:
      Finn et al., 2017, section 3.2 and Algorithm 3. https://arxiv.org/abs/1703.03400
    """
    num_actions = check_integer("num_actions", num_actions, at_least=1)
    observation_size = check_integer("observation_size", observation_size, at_least=1)
    check_positive("inner_lr", inner_lr)
    if not holds_for(baseline, lambda _: True):
        raise ValueError(f"baseline={baseline} must be a finite number")
    policy = categorical_policy(model)
    critic = models.mlp(features=(check_integer("critic_size", critic_size, at_least=1), 1))
    observations = jax.ShapeDtypeStruct((1, observation_size), jnp.float32)

    def init(key: jax.Array, inputs: jax.Array) -> ArrayTree:
        check_input_size(inputs, observation_size, num_actions)
        start_key, critic_key = jax.random.split(key)
        start = policy.init(start_key, jnp.zeros(observations.shape))
        logits = jax.eval_shape(policy.apply, start, observations).logits
        if logits.shape[-1] != num_actions:
            raise ValueError(f"the network has {logits.shape[-1]} outputs; num_actions={num_actions} needs as many")
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
        check_input_size(inputs, observation_size, num_actions)
        observation, action, reward, _ = jnp.split(
            inputs, [observation_size, observation_size + num_actions, observation_size + num_actions + 1]
        )
        learned = {"rates": learn_rates, "inverse_temperature": learn_temperature}
        params = params | {name: jax.lax.stop_gradient(params[name]) for name, learns in learned.items() if not learns}
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

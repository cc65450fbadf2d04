"""Numbers that are not finite: where a training ceased to be, and what helps against it."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.runs import RunError, flag
from maml_jax import checkpoint
from maml_jax.types import MetaInfo

MOST_SKIPPED = 100
"""Meta-steps in a row whose meta-gradient is not finite, before a training that leaves such steps out stops."""


def check_finite(
    info: MetaInfo, step: int, run_dir: Path, config: Any, *, is_skipped: bool = False, num_in_a_row: int = 0
) -> None:
    """Raises RunError naming the first meta-step after `step` that is not finite, and where it ceased to be.

    Args:
      info: of the meta-steps of one compiled call.
      step: the meta-steps before the call.
      run_dir: the directory of the run.
      config: its settings, for what can be changed.
      is_skipped: whether meta-gradients that are not finite are left out. Then only a call of several meta-steps
        without any other raises, or `MOST_SKIPPED` in a row, and a finite meta-gradient with a loss or parameters that
        are not finite.
      num_in_a_row: how many meta-gradients up to the last one of the call were not finite.
    """
    bad = ~info.finite
    if is_skipped and not (bad.all() and (len(bad) > 1 or num_in_a_row >= MOST_SKIPPED)):
        bad &= np.isfinite(info.grad_norm)  # the others had no update
    if not bad.any():
        return
    first = int(np.argmax(bad))
    what = "the parameters are"
    if not np.isfinite(info.grad_norm[first]):
        what = "the meta-gradient is"
    if not np.isfinite(info.loss[first]):
        what = "the loss is"
    norms = ", ".join(f"{norm:g}" for norm in info.grad_norm[max(0, first - 3) : first + 1])
    raise RunError(
        f"{what} not finite at meta-step {step + first} (loss {info.loss[first]:g}, norms of the meta-gradient up to "
        f"it {norms}). {_inner_losses(info.objective, first)}{_remedies(config, is_skipped)}"
        + (
            f"The checkpoints in {run_dir} are from before; choose another --run-dir for other settings"
            if checkpoint.latest(run_dir / "checkpoints") is not None
            else f"There is no checkpoint in {run_dir} yet; choose another --run-dir for other settings"
        )
    )


def check_selected(best: dict[str, Any], run_dir: Path, config: Any) -> None:
    """Raises RunError if a finished training had validations and none was finite; `best` is as in `keep_best`."""
    if not np.isfinite(best["score"][0]):
        raise RunError(
            f"no validation of {run_dir} was finite, so no state can be selected. The scores are in "
            f"{run_dir / 'metrics.jsonl'}. {_remedies(config, is_skipped=True)}Choose another --run-dir for other "
            "settings"
        )


def _remedies(config: Any, is_skipped: bool) -> str:
    """What helps against a loss that is not finite, by the flags that the experiment has."""
    from experiments.cli import has_flag  # Only here: benchmarks of an accelerator have no tyro, which it imports.

    is_trust_region = getattr(config, "outer_rule", None) == "trust-region"

    def has(name: str) -> bool:
        if is_trust_region and name in ("outer_lr", "outer_clip", "on_nonfinite"):
            return False  # it has no optimiser, and refuses such steps itself
        return has_flag(config, name)

    sizes = ("inner_lr", "initial_rate", "max_kl" if is_trust_region else "outer_lr")
    rates = [flag(name) for name in sizes if has(name)]
    bounds = [flag(name) for name in ("outer_clip", "max_norm") if has(name)]
    text = f"lower {' or '.join(rates)}"
    if bounds:
        text += f", or bound the meta-gradient by {bounds[0]}"
    if has("inner_lr"):
        text = f"if the inner optimiser is adaptive, set its eps_root to 1e-8; else {text}"
    skip = "--on-nonfinite skip leaves such meta-steps out. " if has("on_nonfinite") and not is_skipped else ""
    return f"{text[0].upper()}{text[1:]}. {skip}"


def _inner_losses(objective: Any, first: int) -> str:
    """A sentence on the support losses of the meta-step with the index `first`; nothing if it has none."""
    losses = np.asarray(getattr(objective, "support_loss", ()))
    if losses.ndim < 2 or not losses.shape[-1]:
        return ""
    losses = losses[first]
    shown = ", ".join(f"{loss:g}" for loss in losses[:10])
    if np.isfinite(losses).all():
        return (
            f"Its support losses before each inner step are finite: {shown}. It ceased to be finite in inner step "
            f"{len(losses)}, the last, or in the query loss. "
        )
    return (
        f"Its support loss ceased to be finite before inner step {int(np.argmin(np.isfinite(losses))) + 1}: {shown}. "
    )

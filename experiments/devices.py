"""How the experiments use the devices: precision, virtual devices of a CPU, and meshes."""

import math
import os
from pathlib import Path

import jax

from experiments.runs import RunError, num_cores
from maml_jax import parallel


def set_up_jax(precision: str) -> None:
    """Sets matrix precision, the compilation cache, and on a CPU one virtual device per core."""
    jax.config.update("jax_default_matmul_precision", matmul_algorithm(precision))
    if not jax.config.jax_compilation_cache_dir:
        cache_home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache_home / "maml_jax" / "programs"))
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", num_cores())


def matmul_algorithm(precision: str) -> str:
    """What `--precision` stands for in `jax_default_matmul_precision`."""
    # For the name "bfloat16" a GPU may choose TF32; the name of the algorithm leaves no choice.
    return {"bfloat16": "BF16_BF16_F32"}.get(precision, precision)


def mesh_for(*counts: int) -> jax.sharding.Mesh | None:
    """A mesh of the largest number of devices that divides every one of `counts`; None if that is one device.

    Every process contributes the same number of devices.

    Raises:
      RunError: if one of `counts` does not divide over the processes.
    """
    shared, num_processes = math.gcd(*counts), jax.process_count()
    if shared % num_processes:
        raise RunError(
            f"{' and '.join(map(str, counts))} episodes do not divide over {num_processes} processes; change "
            "--meta-batch-size or --eval-episodes, if the experiment has them, or the number of processes"
        )
    local = [jax.local_devices(process_index=process) for process in range(num_processes)]
    usable = max(n for n in range(1, min(map(len, local)) + 1) if shared % (n * len(local)) == 0)
    devices = [device for of_process in local for device in of_process[:usable]]
    return parallel.task_mesh(devices) if len(devices) > 1 else None


def mesh_of_any(count: int) -> jax.sharding.Mesh | None:
    """`mesh_for`, but None if `count` does not divide over the processes: each of them then computes everything."""
    return None if count % jax.process_count() else mesh_for(count)

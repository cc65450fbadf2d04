"""How the experiments set JAX up."""

import jax
import jax.numpy as jnp
import pytest

from experiments import devices


@pytest.mark.parametrize(
    ("precision", "algorithm"),
    [("float32", "float32"), ("tensorfloat32", "tensorfloat32"), ("bfloat16", "BF16_BF16_F32")],
)
def test_matrix_products_have_the_precision_that_is_asked_for(precision, algorithm, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")  # the number of devices cannot be changed any more
    names = ("jax_default_matmul_precision", "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        devices.set_up_jax(precision)
        assert jax.config.jax_default_matmul_precision == algorithm
        product = jax.jit(jnp.matmul).lower(jnp.ones((2, 2)), jnp.ones((2, 2))).as_text()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert ("bf16" in product) == (precision == "bfloat16")

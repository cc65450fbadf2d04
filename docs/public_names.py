"""Tells griffe, which reads the sources, what the public names of the library are.

A builder such as `maml` lives in a module of the same name. By its path alone, `maml_jax.maml` could be either. Here
every name in an `__all__` becomes what it is when the library is imported.
"""

import importlib
import types
from typing import Any

import griffe


class PublicNames(griffe.Extension):
    """Resolves the names in `__all__` of a package as Python does."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Replaces members of the package and of its subpackages."""
        replaced = []
        for module in _packages(pkg):
            runtime = importlib.import_module(module.path)
            for name in getattr(runtime, "__all__", ()):
                value = getattr(runtime, name)
                home, own_name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
                is_object = not isinstance(value, types.ModuleType) and str(home).split(".")[0] == pkg.path
                if is_object and own_name and home != module.path:
                    source = pkg[f"{home}.{own_name}".removeprefix(f"{pkg.path}.")]
                    replaced.append((module, name, griffe.Alias(name, source, parent=module)))
        # Only now, because a function may take the place of the module in which another name is found.
        for module, name, alias in replaced:
            module.members[name] = alias


def _packages(module: griffe.Module) -> list[griffe.Module]:
    below = [member for member in module.modules.values() if not member.is_alias and member.is_init_module]
    return [module, *(found for member in below for found in _packages(member))]

"""In every Python process the tests start: MLX's default device is the CPU, set as soon as somebody imports MLX.

It lies on PYTHONPATH (tests/conftest.py), where Python looks for a module of this name as it starts, and imports nothing
itself: tests watch what a command imports.
"""

import sys


class _OnCpu:
    """Finds ``mlx.core`` as everybody else would, and sets its default device once it is there."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != "mlx.core":
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def on_cpu(module):  # type: ignore[no-untyped-def]
                execute(module)
                module.set_default_device(module.cpu)

            spec.loader.exec_module = on_cpu
        return spec


sys.meta_path.insert(0, _OnCpu())

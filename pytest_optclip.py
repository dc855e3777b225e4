"""What pytest loads at its start: nothing, until `optclip.testing` is among its arguments.

A module beside the package, since importing the package would bring JAX into every run of pytest.
"""

from typing import Any


def pytest_load_initial_conftests(early_config: Any, parser: Any, args: list[str]) -> None:
    """Brings the plugin and its options where the contracts are asked for."""
    if any(arg.split("::")[0].rstrip("/") == "optclip.testing" for arg in args):
        from optclip.testing import plugin

        plugin.add_options(parser)
        early_config.pluginmanager.register(plugin, "optclip.testing.plugin")

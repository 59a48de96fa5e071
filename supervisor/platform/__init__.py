"""Everything that differs between macOS and Linux, behind one interface."""

import sys

from supervisor.platform.base import Platform


def current_platform() -> Platform:
    """Return the side of the interface for this machine."""
    if sys.platform == "darwin":
        from supervisor.platform.darwin import Darwin  # noqa: PLC0415 - each side imports only on its own system

        return Darwin()
    from supervisor.platform.linux import Linux  # noqa: PLC0415

    return Linux()

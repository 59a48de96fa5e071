"""What crosses a process boundary: messages, framing, errors, configuration, paths.

`gateway`, `worker` and `supervisor` import this package and never each other.
"""

from typing import Final

__version__: Final = "0.1.0"

#: Version of both planes. A peer that says another number in its hello is not spoken to.
PROTOCOL_VERSION: Final = 1

"""`GET /ui`: a page that shows the audit. It holds nothing itself; what it shows it asks for with the admin's key."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Final

from starlette.types import Receive, Scope, Send

_PART: Final = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


class Panel:
    """The endpoint. The page is read once; its policy names the one script and the one style that are in it."""

    def __init__(self) -> None:
        self._page = Path(__file__).with_name("panel.html").read_bytes()
        hashes = {
            kind.decode(): base64.b64encode(hashlib.sha256(text).digest()).decode()
            for kind, text in _PART.findall(self._page)
        }
        policy = (
            f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self._headers = [
            (b"content-type", b"text/html; charset=utf-8"),
            (b"content-length", str(len(self._page)).encode()),
            (b"content-security-policy", policy.encode()),
            (b"referrer-policy", b"no-referrer"),
            (b"x-content-type-options", b"nosniff"),
            (b"cache-control", b"no-store"),
        ]

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer."""
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else self._page})

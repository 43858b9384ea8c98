"""The page at `/`: a few plain files put into one, with a policy that lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources


def render_page() -> tuple[str, str]:
    """(HTML, Content-Security-Policy): style and script are inside, and only they may run."""
    folder = resources.files(__package__)
    style, found, started, body = (
        (folder / name).read_text("utf-8") for name in ("page.css", "page.js", "page_start.js", "page.html")
    )
    script = found + started
    html = body.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src {_hash(style)}",
            f"script-src {_hash(script)}",
            "img-src 'self' data: blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
    return html, policy


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

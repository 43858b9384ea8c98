"""A client of the server's own interface, with nothing but the standard library. What fails is one clear line."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from unime_ray.config_serve import ServeConfig
from unime_ray.errors import ConfigError

TIMEOUT_SECONDS = 90.0
MAX_ANSWER_BYTES = 256 << 20


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the API key would go along, to whatever host it names."""

    def redirect_request(self, *_: Any) -> None:
        return None


OPENER = urllib.request.build_opener(_Stay)


class Client:
    """`server` is the address, such as http://127.0.0.1:8000; the API key is read from the environment."""

    def __init__(self, server: str) -> None:
        self.server = server.rstrip("/")
        if not self.server.startswith(("http://", "https://")):
            raise ConfigError(f"--server: {server!r} is no address such as http://127.0.0.1:8000")
        self._key = os.environ.get(ServeConfig().api_key_env, "").split(",")[0].strip()

    def call(self, method: str, path: str, body: Any = None, query: dict[str, Any] | None = None) -> Any:
        """The JSON answer.

        Raises:
            ConfigError: no server is there, it is another one, or it refused: its own message.
        """
        url = self.server + path + (f"?{urllib.parse.urlencode(query)}" if query else "")
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self._key}"} if self._key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers, method=method)
        try:
            with OPENER.open(request, timeout=TIMEOUT_SECONDS) as answer:
                return json.loads(answer.read(MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            raise ConfigError(f"{self.server}: {_message(error)}") from error
        except ValueError as error:
            raise ConfigError(f"{self.server} does not answer in JSON; is it `unime-ray serve`?") from error
        except (OSError, http.client.HTTPException) as error:
            raise ConfigError(
                f"{self.server} does not answer ({error}); is `unime-ray serve` running there?"
            ) from error

    @staticmethod
    def quoted(identifier: str) -> str:
        return urllib.parse.quote(identifier, safe="")


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read(1 << 20))["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        return f"HTTP {error.code}"

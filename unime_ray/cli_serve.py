"""`unime-ray serve RUN`, `serve build`, `serve deploy`, and `serve items` for the live index of a server that runs."""

from __future__ import annotations

import base64
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from unime_ray.artifacts import Run
from unime_ray.errors import ConfigError
from unime_ray.serve.client import Client

DEFAULT = "run"
BATCH = 64
console = Console(highlight=False, markup=False)
HostOption = Annotated[str, typer.Option(help="Address to listen on.")]
PortOption = Annotated[int, typer.Option(help="Port to listen on.")]
ServerOption = Annotated[str, typer.Option("--server", help="Where the server answers.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A finished run folder.")]
LOCAL = "http://127.0.0.1:8000"


class RunByDefault(TyperGroup):
    """`serve RUN` is `serve run RUN`: what names no subcommand is a run folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    help="Serve a run: search page, /v1/search, /v1/embeddings, /v1/rerank. `serve RUN` starts it here.",
)
items = typer.Typer(no_args_is_help=True, help="Add, replace, delete and list items of a running server.")
app.add_typer(items, name="items")


@app.command(DEFAULT)
def run_here(folder: RunArgument, host: HostOption = "127.0.0.1", port: PortOption = 8000) -> None:
    """Serve a run's embedder, reranker and items from this machine (`serve RUN` for short)."""
    from unime_ray.cluster import connected
    from unime_ray.serve.bundle import run_config
    from unime_ray.serve.cli import serve_run

    run = Run(folder)
    config = run_config(run)
    with connected():
        serve_run(run, config, host, port)


@app.command()
def build(
    folder: RunArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("serve.yaml"),
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
) -> None:
    """Write the Ray Serve config of a run, to be kept under version control."""
    from unime_ray.serve.bundle import run_config
    from unime_ray.serve.config_file import write_file

    run = Run(folder)
    write_file(run, run_config(run).serve, output, host, port)
    console.print(f"wrote {output}; apply it with: unime-ray serve deploy {output}")


@app.command()
def deploy(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `serve build` wrote.")],
    address: Annotated[str, typer.Option(help="The Ray cluster.")] = "auto",
    wait: Annotated[float, typer.Option(help="Seconds to wait until it is deployed; 0: do not.")] = 300.0,
) -> None:
    """Apply a Serve config to a Ray cluster that runs; changed models or index are swapped while it answers."""
    import ray

    from unime_ray.serve.config_file import check_file, deploy_file

    check_file(file)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", address), logging_level=logging.WARNING)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster at {address!r}: start one with `ray start --head`") from error
    deploy_file(file)
    if wait:
        _await_deployed(wait)


def _await_deployed(seconds: float) -> None:
    from ray import serve

    from unime_ray.serve.cli import APP

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        status = serve.status().applications.get(APP)
        if status is not None and status.status == "RUNNING":
            console.print(f"{APP} is deployed")
            return
        if status is not None and status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ConfigError(f"{APP}: {status.status}: {' '.join(status.message.split())}")
        time.sleep(1.0)
    raise ConfigError(f"{APP} was not deployed in {seconds:.0f} s; `serve status` tells more")


# --- items ------------------------------------------------------------------------------------------------------------


@items.command("add")
def add(
    file: Annotated[Path, typer.Argument(help="JSONL: id, text, image (a path), instruction, dataset, split.")],
    server: ServerOption = LOCAL,
) -> None:
    """Add items, or replace those whose id is there. What is printed as written is durable."""
    client, written = Client(server), 0
    for part in _batches(_rows(file)):
        version = client.call("POST", "/v1/items", {"items": part})["version"]
        written += len(part)
        console.print(f"{written} items written (version {version})")


@items.command("delete")
def delete(ids: Annotated[list[str], typer.Argument()], server: ServerOption = LOCAL) -> None:
    """Delete items by id."""
    client = Client(server)
    for each in ids:
        client.call("DELETE", f"/v1/items/{client.quoted(each)}")
        console.print(f"deleted {each}")


@items.command("get")
def get(identifier: Annotated[str, typer.Argument(metavar="ID")], server: ServerOption = LOCAL) -> None:
    """Print one item as JSON."""
    client = Client(server)
    print(json.dumps(client.call("GET", f"/v1/items/{client.quoted(identifier)}"), ensure_ascii=False))


@items.command("list")
def list_items(
    server: ServerOption = LOCAL,
    limit: Annotated[int, typer.Option(help="How many at most.")] = 50,
    dataset: str = "",
    split: str = "",
    kind: str = "",
) -> None:
    """Print items as JSONL."""
    client, cursor = Client(server), 0
    wanted = {name: value for name, value in (("dataset", dataset), ("split", split), ("kind", kind)) if value}
    while limit > 0:
        page = client.call("GET", "/v1/items", query={"cursor": cursor, "limit": min(limit, 200), **wanted})
        for item in page["items"]:
            print(json.dumps(item, ensure_ascii=False))
        limit, cursor = limit - len(page["items"]), page["next_cursor"]
        if cursor is None:
            return


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Items of a JSONL file; pictures are read from their paths, relative to the file."""
    if not file.is_file():
        raise ConfigError(f"{file}: no such file")
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if row.get("image"):
                    row["image"] = base64.b64encode((file.parent / row["image"]).read_bytes()).decode()
            except (ValueError, AttributeError, TypeError, OSError) as error:
                raise ConfigError(f"{file}:{number}: {error}") from error
            yield row


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    for row in rows:
        part.append(row)
        if len(part) == BATCH:
            yield part
            part = []
    if part:
        yield part

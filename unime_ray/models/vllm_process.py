"""An engine of vLLM in a process of its own: its death is told, and it does not outlive the process that started it.

vLLM 0.32 does neither by itself. Its synchronous client notices that the engine's process was killed, closes its
sockets and leaves whoever waits for an answer waiting; and an engine whose parent was killed waits for requests, and
holds its memory, for ever. vLLM imports this module by name in an engine's process (`WORKER_EXTENSION`), which is when
that process starts to watch its parent; otherwise importing it does nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

from unime_ray.errors import EngineDied

WORKER_EXTENSION = "unime_ray.models.vllm_process.EndsWithParent"


class EndsWithParent:
    """What vLLM adds to its workers; it has nothing to add."""


def tell_of_death(engine: Any) -> None:
    """Have a waiting `engine.step()` raise EngineDied, or vLLM's own EngineDeadError, when the engine's process ends.

    `engine` is vLLM's `LLMEngine`; one that runs in this process needs none of this.
    """
    answers = getattr(engine.engine_core, "outputs_queue", None)
    if answers is None:
        return
    ends = [process.sentinel for process in engine.engine_core.resources.engine_manager.processes]

    def tell() -> None:
        wait(ends)
        answers.put(EngineDied("its process ended"))

    Thread(target=tell, name="vllm-death", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def end() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    Thread(target=end, name="vllm-parent", daemon=True).start()


_end_with_parent()

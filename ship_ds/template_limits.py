"""What a chat template may take. It is a program that came with somebody's model: transformers runs
it in jinja's sandbox, which keeps it from files and from Python, but not from looping for ever or
from making a text as large as the memory."""

import os
import resource
import selectors
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from jinja2 import TemplateError

from ship_ds.errors import UserError

SECONDS = 10
"""Of the processor. By the clock a first start after an installation met them once, with a format
that is made in 0.03 s: a child may have to wait for the disk, or for others."""
_PATIENCE = 6
"""Times that long by the clock: for a child that stands still, as one that was forked while a
thread held a lock."""
MEGABYTES = 1024
"""That rendering may take beside what the process has already."""
LETTERS = 1 << 20
"""Of the rendered text; a system message and one turn are much shorter."""

_SIZE = 8
"""Bytes in which the child says how long its answer is."""


class TemplateLimitError(Exception):
    """The template took too long, or too much."""


def within_limits(render: Callable[[], str], seconds: int = SECONDS, letters: int = LETTERS) -> str:
    """What `render` gives, made in a child of this process that is ended at a limit.

    Args:
        render: a pure function of Python; no thread and no lock of this process is of use to it.
        seconds: of the processor, until the child is killed.
        letters: of the text, at most.

    Raises:
        TemplateError: as `render` raised it, or what else it raised, in words.
        TemplateLimitError: a limit was met.
        UserError: the system starts no child.
    """
    reader, writer = os.pipe()
    try:
        with warnings.catch_warnings():
            # Of threads that hold locks as this process forks; the child asks for none of them.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
    except OSError as error:
        # Also where this process has mapped more than the machine's memory, touched or not.
        os.close(reader)
        os.close(writer)
        raise UserError(
            f"no process can be started to render a chat template in ({error.strerror}): end what "
            "else takes memory, or raise the limit of processes (ulimit -u)"
        ) from None
    if child == 0:
        _render_and_exit(render, writer, seconds, letters)
    os.close(writer)
    patience = _PATIENCE * seconds
    status = 0
    try:
        answer = _read(reader, time.monotonic() + patience, _SIZE + 1 + 4 * letters)
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)  # of a child that has ended already, how it did
    # A child that was killed as it wrote leaves a part of its answer.
    size, answer = answer[:_SIZE], answer[_SIZE:]
    if not answer or len(answer) != int.from_bytes(size):
        is_out_of_time = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
        raise TemplateLimitError(
            f"it takes more than {seconds} seconds of the processor"
            if is_out_of_time
            else f"its rendering was killed, or stood still for {patience} seconds"
        )
    kind, text = answer[:1], answer[1:].decode()
    if kind == b"m":
        raise TemplateLimitError(f"it takes more than {MEGABYTES} MB, or nests without end")
    if kind == b"e":
        raise TemplateError(text)
    if kind == b"l":
        raise TemplateLimitError(f"it renders one turn to more than {letters:,} letters")
    return text


def _render_and_exit(render: Callable[[], str], writer: int, seconds: int, letters: int) -> None:
    """The child: how long its answer is, and one byte that says of what kind, then the text."""
    try:
        answer = _rendered(render, seconds, letters)
        answer = len(answer).to_bytes(_SIZE) + answer
        while answer:
            answer = answer[os.write(writer, answer) :]
    finally:
        # No handler, buffer or thread of the parent's is the child's to close, and none of the
        # parent's callers is to hear of Ctrl-C twice.
        os._exit(0)


def _rendered(render: Callable[[], str], seconds: int, letters: int) -> bytes:
    try:
        _limit(seconds)
        text = render()
        return b"l" if len(text) > letters else b"t" + text.encode()
    except (MemoryError, RecursionError):
        return b"m"
    except Exception as error:
        message = (" ".join(str(error).split()) or type(error).__name__)[:1000]
        return b"e" + message.encode(errors="replace")


def _limit(seconds: int) -> None:
    """Memory and processor time of this process, which is a child and has used none so far."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    most = pages * resource.getpagesize() + (MEGABYTES << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def _read(reader: int, until: float, most: int) -> bytes:
    """All that the child writes in time; nothing where it is too late."""
    content = b""
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        while len(content) <= most:
            if not selector.select(max(0.0, until - time.monotonic())):
                return b""
            part = os.read(reader, 1 << 16)
            if not part:
                break
            content += part
    return content

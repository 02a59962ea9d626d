"""Frames on a Redis connection without a copy on the way: out of the arena, and straight back into it.

redis-py packs a command by copying its arguments together, and returns a value as a fresh object. A block
is megabytes long, so both are done here instead: a frame is sent as the two buffers it consists of, and a
``GET``'s reply is received into the frame's own. Replies are read here also because redis-py bounds each
receive and not the whole: a server that answers a drop at a time would hold a call for ever. Connecting
(TLS, credentials), the sentinels and the cluster's map of slots are redis-py's and hiredis's.

A connection is used by one thread at a time; nothing here is shared.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from redis import exceptions

from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.tier import Frame, Outcome

__all__ = ["Argument", "Deadline", "Reader", "Wire", "pack"]

Argument = bytes | int | Frame
"""Part of a command; a frame stands for its header and body, one value."""

_LINE_BUFFER_BYTES = 4096
_MAX_REPLY_BYTES = 16 << 20
"""Of a reply that is no frame: one to ``INFO``, or the names of what was evicted."""
_MAX_DEPTH = 4
_CODES: dict[str, type[exceptions.RedisError]] = {
    "ASK": exceptions.AskError,
    "CLUSTERDOWN": exceptions.ClusterDownError,
    "LOADING": exceptions.BusyLoadingError,
    "MASTERDOWN": exceptions.MasterDownError,
    "MOVED": exceptions.MovedError,
    "NOAUTH": exceptions.AuthenticationError,
    "NOPERM": exceptions.NoPermissionError,
    "OOM": exceptions.OutOfMemoryError,
    "READONLY": exceptions.ReadOnlyError,
    "TRYAGAIN": exceptions.TryAgainError,
}


class Deadline:
    """A moment by which a call has to be over."""

    __slots__ = ("_end",)

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def remaining_s(self) -> float:
        """Return the seconds left, always more than 0.

        Raises:
            redis.exceptions.TimeoutError: None are left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise exceptions.TimeoutError("the deadline has passed")
        return left


class Wire(Protocol):
    """The part of a redis-py connection's socket that is used here."""

    def settimeout(self, value: float | None, /) -> None:
        """Bound the next operation."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """Receive some bytes."""


def pack(commands: Iterable[Sequence[Argument]]) -> list[bytes | memoryview]:
    """Return what to send for ``commands``, with the bodies of frames as views of their own."""
    out: list[bytes | memoryview] = []
    pending: list[bytes] = []
    for command in commands:
        pending.append(b"*%d\r\n" % len(command))
        for argument in command:
            if isinstance(argument, Frame):
                body = argument.body
                pending += (b"$%d\r\n" % (HEADER_BYTES + len(body)), bytes(argument.header))
                out += (b"".join(pending), body)
                pending = [b"\r\n"]
            else:
                text = b"%d" % argument if isinstance(argument, int) else argument
                pending.append(b"$%d\r\n%b\r\n" % (len(text), text))
    out.append(b"".join(pending))
    return out


def _reply_error(line: str) -> exceptions.RedisError:
    """Return the exception that redis-py would raise for an error reply."""
    code, _, rest = line.partition(" ")
    kind = _CODES.get(code)
    try:
        return kind(rest) if kind is not None else exceptions.ResponseError(line)
    except (ValueError, IndexError):  # MOVED and ASK take their message apart
        return exceptions.ResponseError(line)


class Reader:
    """Receives the replies that are outstanding on a connection.

    Use one for all of them: it may have received more than it was asked for.

    Args:
        wire: The connection's socket.
        deadline: When to give up.
    """

    def __init__(self, wire: Wire, deadline: Deadline) -> None:
        self._wire = wire
        self._deadline = deadline
        self._buffer = memoryview(bytearray(_LINE_BUFFER_BYTES))
        self._start = 0
        self._end = 0

    def reply(self) -> object:
        """Read one reply of a few kilobytes: bytes, a whole number, None, or a list of such.

        Raises:
            redis.exceptions.ResponseError: An error reply; the connection can be used further. Inside
                a list it is returned instead.
            redis.exceptions.RedisError: Also other errors that mean one reply, such as
                ``BusyLoadingError``; else the connection failed or timed out.
        """
        found = self._value(_MAX_DEPTH)
        if isinstance(found, exceptions.RedisError):
            raise found
        return found

    def frame(self, frame: Frame) -> Outcome:
        """Read the reply to a ``GET`` into ``frame``.

        Returns:
            ``OK``, ``MISSING``, or ``FAILED`` where the value can't be a frame of that length; its bytes
            are then read and dropped.

        Raises:
            redis.exceptions.RedisError: As for :meth:`reply`.
        """
        kind, rest = self._head()
        if kind == b"-":
            raise _reply_error(rest)
        if kind != b"$":
            raise exceptions.InvalidResponse(f"Protocol error: a reply starts with {kind!r}")
        length = _number(rest)
        if length < 0:
            return Outcome.MISSING
        body = frame.body
        if HEADER_BYTES <= length <= HEADER_BYTES + len(body):
            self._fill(frame.header)
            self._fill(body[: length - HEADER_BYTES])
            outcome = Outcome.OK
        else:
            self._drop(length)
            outcome = Outcome.FAILED
        self._end_of_value()
        return outcome

    def _value(self, depth: int) -> object:
        kind, rest = self._head()
        if kind == b"+":
            return rest.encode()
        if kind == b"-":
            return _reply_error(rest)
        count = _number(rest)
        if kind == b":":
            return count
        if kind in (b"$", b"*") and count < 0:
            return None
        if kind == b"$" and count <= _MAX_REPLY_BYTES:
            value = bytearray(count)
            self._fill(memoryview(value))
            self._end_of_value()
            return bytes(value)
        if kind == b"*" and depth and count <= _MAX_REPLY_BYTES:
            return [self._value(depth - 1) for _ in range(count)]
        raise exceptions.InvalidResponse(f"Protocol error: a reply starts with {kind!r} {count}")

    def _head(self) -> tuple[bytes, str]:
        line = self._line()
        return line[:1], line[1:].decode(errors="replace")

    def _end_of_value(self) -> None:
        if self._take(2) != b"\r\n":
            raise exceptions.InvalidResponse("Protocol error: a value is longer than announced")

    def _line(self) -> bytes:
        searched = 0
        while True:
            found = bytes(self._buffer[self._start : self._end]).find(b"\r\n", searched)
            if found >= 0:
                line = self._take(found + 2)
                return line[:-2]
            searched = max(0, self._end - self._start - 1)
            self._more()

    def _take(self, count: int) -> bytes:
        while self._end - self._start < count:
            self._more()
        taken = bytes(self._buffer[self._start : self._start + count])
        self._start += count
        return taken

    def _more(self) -> None:
        """Receive into what is left of the buffer, after moving what is held to its start."""
        held = bytes(self._buffer[self._start : self._end])
        if len(held) == len(self._buffer):
            raise exceptions.InvalidResponse("Protocol error: a line is too long")
        self._buffer[: len(held)] = held
        self._start, self._end = 0, len(held)
        self._end += self._receive(self._buffer[self._end :])

    def _fill(self, target: memoryview) -> None:
        done = min(len(target), self._end - self._start)
        target[:done] = self._buffer[self._start : self._start + done]
        self._start += done
        while done < len(target):
            done += self._receive(target[done:])

    def _drop(self, count: int) -> None:
        count -= (held := min(count, self._end - self._start))
        self._start += held
        while count:
            self._start = self._end = 0
            count -= self._receive(self._buffer[:count])

    def _receive(self, into: memoryview) -> int:
        self._wire.settimeout(self._deadline.remaining_s())
        try:
            count = self._wire.recv_into(into)
        except TimeoutError as error:
            raise exceptions.TimeoutError("Timeout reading from socket") from error
        except OSError as error:
            raise exceptions.ConnectionError(f"Error while reading: {error}") from error
        if count == 0:
            raise exceptions.ConnectionError("Connection closed by server.")
        return count


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise exceptions.InvalidResponse(f"Protocol error: {text!r} is not a number") from None

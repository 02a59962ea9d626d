"""Batches: many commands to the servers that hold their keys, and what each of them answered.

A batch is cut so that one pipeline carries a bounded number of bytes. To a cluster the parts for all nodes
are sent before the first reply is read, so that the nodes work side by side. A key that has moved to
another node is asked for there, once. One node that fails takes its own keys with it and no others.

Thread-safe; each call has its own connections and deadline.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import msgspec
from redis import exceptions

from kvferry.connector.errors import TierError
from kvferry.plugins.redis.faults import block_outcome, has_moved, is_connection_lost, tier_error
from kvferry.plugins.redis.servers import Connection, Place, Servers, connection_to
from kvferry.plugins.redis.wire import Argument, Deadline, Reader, Wire, pack

__all__ = ["PIPELINE_BYTES", "Batches", "Receive", "Request"]

PIPELINE_BYTES = 32 << 20
"""Most bytes of blocks that one pipeline carries."""


class Request(msgspec.Struct, frozen=True):
    """Commands about one key that are sent together; the last reply, or the first error, is the answer."""

    key: bytes
    """Decides which server is asked."""
    commands: tuple[tuple[Argument, ...], ...]
    carried_bytes: int = 0
    """Bytes of blocks that the commands or their replies carry."""


Receive = Callable[[Reader, int], object]
"""Reads the reply to the request of this number; raises error replies."""


class Batches:
    """Carries batches out.

    Args:
        tier: The tier's name.
        servers: Where keys live.
    """

    def __init__(self, tier: str, servers: Servers) -> None:
        self._tier = tier
        self._servers = servers

    def run(
        self, requests: Sequence[Request], deadline: Deadline, receive: Receive | None = None
    ) -> list[object]:
        """Send every request and return one answer each: a reply, or the exception it came to.

        Args:
            requests: What to send, in order.
            deadline: When to give up.
            receive: Reads the reply to one request; its last reply as it is when omitted.

        Returns:
            Replies. An error reply is an exception of redis-py, a server that failed a TierError.

        Raises:
            TierError: Every server concerned failed.
        """
        answers: list[object] = [None] * len(requests)
        read = receive or (lambda reader, index: _last_reply(reader, requests[index]))
        for part in _parts(requests):
            self._round(requests, part, answers, deadline, read)
            moved = [index for index in part if has_moved(answers[index])]
            if moved:
                self._servers.lost()
                self._round(requests, moved, answers, deadline, read)
        failures = [answer for answer in answers if isinstance(answer, TierError)]
        if failures and len(failures) == len(answers):
            raise failures[0]
        return answers

    def _round(
        self,
        requests: Sequence[Request],
        part: Sequence[int],
        answers: list[object],
        deadline: Deadline,
        read: Receive,
    ) -> None:
        """Send and receive once."""
        try:
            groups = self._grouped(requests, part)
        except (exceptions.RedisError, exceptions.RedisClusterException, OSError) as error:
            self._fail("the cluster", error, part, answers)
            return
        with contextlib.ExitStack() as stack:
            sent = []
            for place, indices in groups.items():
                try:
                    lent = contextlib.ExitStack()
                    connection, wire = lent.enter_context(connection_to(place, deadline))
                    stack.push(lent)
                    commands = [command for index in indices for command in requests[index].commands]
                    connection.send_packed_command(pack(commands), check_health=False)
                    sent.append((place, indices, connection, wire))
                except (exceptions.RedisError, OSError) as error:
                    self._fail(place.label, error, indices, answers)
            for place, indices, connection, wire in sent:
                self._read(place, indices, connection, wire, answers, deadline, read)

    def _read(
        self,
        place: Place,
        indices: Sequence[int],
        connection: Connection,
        wire: Wire,
        answers: list[object],
        deadline: Deadline,
        read: Receive,
    ) -> None:
        reader = Reader(wire, deadline)
        for done, index in enumerate(indices):
            try:
                answers[index] = read(reader, index)
            except (exceptions.RedisError, OSError) as error:
                if is_connection_lost(error):
                    connection.disconnect()
                    self._fail(place.label, error, indices[done:], answers)
                    return
                answers[index] = error
                if block_outcome(error) is None:
                    self._fail(place.label, error, [index], answers)
        if any(isinstance(answers[index], TierError) for index in indices):
            connection.disconnect()  # the server may have another role by now

    def _grouped(self, requests: Sequence[Request], part: Sequence[int]) -> dict[Place, list[int]]:
        groups: dict[Place, list[int]] = {}
        for index in part:
            groups.setdefault(self._servers.place_of(requests[index].key), []).append(index)
        return groups

    def _fail(self, place: str, error: BaseException, indices: Sequence[int], answers: list[object]) -> None:
        self._servers.lost()
        failure = tier_error(self._tier, place, error)
        failure.__cause__ = error
        for index in indices:
            answers[index] = failure


def _parts(requests: Sequence[Request]) -> Iterator[list[int]]:
    """Cut a batch into runs that carry at most ``PIPELINE_BYTES``, or one request that is larger."""
    part: list[int] = []
    carried = 0
    for index, request in enumerate(requests):
        if part and carried + request.carried_bytes > PIPELINE_BYTES:
            yield part
            part, carried = [], 0
        part.append(index)
        carried += request.carried_bytes
    if part:
        yield part


def _last_reply(reader: Reader, request: Request) -> object:
    """Read all replies to a request; raise the first that is an error."""
    failure: exceptions.RedisError | None = None
    reply: object = None
    for _ in request.commands:
        try:
            reply = reader.reply()
        except exceptions.RedisError as error:
            if is_connection_lost(error):
                raise
            failure = failure or error
    if failure is not None:
        raise failure
    return reply

"""Payloads over plain TCP, by blocking sockets: nothing is encrypted.

python -m benchmarks.peers.bulk_tcp serve
python -m benchmarks.peers.bulk_tcp send PORT
"""

from __future__ import annotations

import asyncio
import socket
import sys

from benchmarks.peers import bulk, talk


def serve() -> None:
    """Takes what comes over one connection."""
    room = bytearray(bulk.SIZE_BYTES)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        talk.say(arguments=[str(listener.getsockname()[1])])
        connection, _ = listener.accept()
        with connection:
            while connection.recv_into(room, bulk.SIZE_BYTES, socket.MSG_WAITALL):
                connection.sendall(b"!")


def send(port: str) -> None:
    """Sends when it is told to."""
    data = bulk.payload()
    with socket.create_connection(("127.0.0.1", int(port))) as connection:

        async def once() -> None:
            connection.sendall(data)
            assert connection.recv(1)

        asyncio.run(bulk.obey(once))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        send(*sys.argv[2:])

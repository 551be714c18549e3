"""The process of a server: its socket, its signals, its end.

SIGTERM and Ctrl-C end it in order: new requests get 503 from then on, texts that are being written
go on to their end (at most `grace` seconds), sessions are kept, and the process ends with 0. A
second signal does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Generator
from types import FrameType

import uvicorn

from spectral_window.errors import ResourceError, UserError
from spectral_window.serving.app import create_app
from spectral_window.serving.service import Service

BACKLOG = 2048
SEND_SECONDS = 5  # for the last bytes to leave, when all texts have ended
POLL_SECONDS = 0.05


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at `host` and `port`; 0 takes a free port.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, number)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot listen, {reason} ({host}:{port}): give another --port or --host, or end what "
            "uses it"
        ) from None
    return listener


def address(listener: socket.socket) -> str:
    """Return the address of a socket as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    service: Service,
    listener: socket.socket,
    *,
    api_key: str | None = None,
    grace: float = 30.0,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal ends it.

    Args:
        service: what answers.
        listener: from `listen`.
        api_key: what requests must bring; None lets everybody in.
        grace: seconds that texts get to end after a signal.
        ready: called once, when requests are answered.
    """
    _server(service, api_key, grace, ready).run([listener])


@contextlib.contextmanager
def in_background(
    service: Service, *, api_key: str | None = None, host: str = "127.0.0.1"
) -> Generator[str, None, None]:
    """Serve in a thread within the block, on a free port; yield the address.

    Afterwards the texts that are still being written are cut.
    """
    with listen(host, 0) as listener:
        ready = threading.Event()
        server = _server(service, api_key, 0.0, ready.set)
        thread = threading.Thread(target=server.run, args=([listener],), name="server")
        thread.start()
        while not ready.wait(POLL_SECONDS):
            if not thread.is_alive():
                raise ResourceError("the server did not start (serving): see what it printed")
        try:
            yield address(listener)
        finally:
            service.scheduler.stop(cut=True)
            server.should_exit = True
            thread.join()


def _server(
    service: Service, api_key: str | None, grace: float, ready: Callable[[], None]
) -> Server:
    config = uvicorn.Config(
        create_app(service, api_key),
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=SEND_SECONDS,
    )
    return Server(config, service, grace, ready)


class Server(uvicorn.Server):
    """uvicorn's server, which ends when the texts have ended."""

    def __init__(
        self, config: uvicorn.Config, service: Service, grace: float, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.service, self.grace, self.ready = service, grace, ready
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self.ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle signals within the block. Unlike uvicorn's, a signal that was obeyed is not raised
        again afterwards."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self._ending is None and self.started:
            self.service.scheduler.stop()
            self._ending = self._loop.create_task(self._end())
        else:
            self.service.scheduler.stop(cut=True)
            self.should_exit = True

    async def _end(self) -> None:
        """Leave when nothing is being written any more."""
        scheduler, waited = self.service.scheduler, 0.0
        while not scheduler.idle:
            if waited >= self.grace:
                scheduler.stop(cut=True)
            await asyncio.sleep(POLL_SECONDS)
            waited += POLL_SECONDS
        self.should_exit = True

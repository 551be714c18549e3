"""Named sessions on disk: a text that goes on from request to request, at the cost of what is new.

A session is one file of constant size, which `Session.save` wrote: the model's state, the random
numbers, half a character. It is written before the last piece of an answer goes out, so an answer
that arrived is kept whatever happens to the process, and any process with the same model goes on
from it (`spectral-window generate --session` too). Nothing of a session stays in memory between
two requests.

One process uses a folder at a time: it holds a lock that ends with the process.
"""

from __future__ import annotations

import string
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from spectral_window.errors import UserError
from spectral_window.files import remove_leftovers, sync_folder, try_lock
from spectral_window.generation.session import Session
from spectral_window.generation.session_file import Owner

SUFFIX = ".session"
LONGEST = 80  # characters of a name, of which a file's name may have three for one
# Written as they are; all others as %41. Capitals are not among them, because the file systems of
# Macs do not tell them from small letters.
PLAIN = frozenset(string.ascii_lowercase + string.digits + "-_")


class SessionBusy(UserError):
    """Another request goes on with this session now."""


class NoSuchSession(UserError):
    """There is no session of this name."""


class Sessions:
    """The sessions of one folder.

    Args:
        folder: where the files are; made if it is not there.
        model: what writes them.
        tokenizer: its tokenizer.

    Raises:
        UserError: another process uses the folder, or it is a file.
    """

    def __init__(self, folder: Path, model: Any, tokenizer: Any) -> None:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"not a folder ({folder}): give a folder to --sessions")
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / ".lock"
        self._lock = lock.open("w")
        if not try_lock(self._lock, lock):
            self._lock.close()
            raise UserError(
                f"another server uses these sessions ({folder}): stop it, or give another folder"
            )
        remove_leftovers(folder)
        self.folder, self.model, self.tokenizer = folder, model, tokenizer
        self.owner = Owner.of(model, tokenizer)
        self._busy: set[str] = set()
        self._changing = threading.Lock()

    def close(self) -> None:
        """Let another process use the folder."""
        self._lock.close()

    def claim(self, name: str) -> None:
        """Reserve a session for one request, until `release`.

        Raises:
            UserError: the name cannot be one.
            SessionBusy: another request has it.
        """
        self.path(name)
        with self._changing:
            if name in self._busy:
                raise SessionBusy(
                    f"session {name!r} is in use by another request (session_id): wait for it"
                )
            self._busy.add(name)

    def release(self, name: str) -> None:
        """Let other requests have a session that was claimed."""
        with self._changing:
            self._busy.discard(name)

    @contextmanager
    def claimed(self, name: str) -> Iterator[None]:
        """Hold a session within the block; raises as `claim`."""
        self.claim(name)
        try:
            yield
        finally:
            self.release(name)

    def open(self, name: str) -> Session:
        """Return the session `name` as its last request left it, or a new one.

        Raises:
            IntegrityError: its file is damaged, or belongs to another model.
        """
        path = self.path(name)
        if not path.is_file():
            return Session(self.model, self.tokenizer)
        return Session.load(path, self.model, self.tokenizer, owner=self.owner)

    def save(self, name: str, session: Session) -> None:
        """Write the file of a session.

        Raises:
            ResourceError: it cannot be written.
        """
        session.save(self.path(name), owner=self.owner)

    def delete(self, name: str) -> None:
        """Delete a session.

        Raises:
            NoSuchSession: there is none.
            SessionBusy: a request goes on with it now.
        """
        with self.claimed(name):
            try:
                self.path(name).unlink()
            except FileNotFoundError:
                raise NoSuchSession(f"no session {name!r} (session_id): it has no file") from None
            sync_folder(self.folder)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every session's file, by name."""
        files = sorted(self.folder.glob(f"[!.]*{SUFFIX}"))
        return {unquote(path.name.removesuffix(SUFFIX)): path.stat().st_size for path in files}

    def path(self, name: str) -> Path:
        """Return where the session `name` is kept.

        Raises:
            UserError: the name is empty, too long, or has other than printable ASCII characters.
        """
        if not 0 < len(name) <= LONGEST or not (name.isascii() and name.isprintable()):
            raise UserError(
                f"{name[:20]!r} names no session (session_id): "
                f"give 1 to {LONGEST} printable ASCII characters"
            )
        plain = "".join(c if c in PLAIN else f"%{ord(c):02x}" for c in name)
        return self.folder / f"{plain}{SUFFIX}"

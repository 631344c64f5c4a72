"""Message bodies as they are stored: in clear, or sealed with AES-GCM when field keys are configured.

A sealed body belongs to its place: conversation and `client_message_id` are authenticated with it, so a row
moved to another conversation cannot be opened. Which key sealed it is stored beside it; keys are added at the
front of the setting, and older ones are dropped once `sessiongate keys rotate` has sealed everything anew.
"""

import base64
import binascii
import os
import re
from collections.abc import Mapping
from typing import Final, NamedTuple, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_KEY_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,40}")
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12


class StoredBody(NamedTuple):
    """The columns of a body: `body`, or `sealed_body` with the id of its key."""

    body: str | None
    sealed_body: bytes | None
    key_id: str | None


class UnreadableBodyError(Exception):
    """The key of a sealed body is not configured, or the row was tampered with."""


class Bodies:
    """Seals with the first of its keys and opens with any. Without keys, bodies are stored in clear."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._ciphers: Final = {key_id: AESGCM(key) for key_id, key in keys.items()}
        self.ids: Final = tuple(keys)
        self.current: Final = next(iter(keys), None)

    @classmethod
    def parse(cls, listed: str) -> Self:
        """From `id:base64,id:base64`. Raises ValueError, which never repeats a key."""
        keys: dict[str, bytes] = {}
        for entry in filter(None, map(str.strip, listed.split(","))):
            key_id, _, encoded = entry.partition(":")
            try:
                key = base64.b64decode(encoded, validate=True)
            except binascii.Error:
                key = b""
            if not _KEY_ID.fullmatch(key_id) or len(key) != _KEY_BYTES or key_id in keys:
                raise ValueError(f"must be id:key,…, each id once and each key {_KEY_BYTES} bytes in base64")
            keys[key_id] = key
        return cls(keys)

    def seal(self, conversation_id: int, client_message_id: str, body: str) -> StoredBody:
        if self.current is None:
            return StoredBody(body, None, None)
        nonce = os.urandom(_NONCE_BYTES)
        place = _place(conversation_id, client_message_id)
        sealed = self._ciphers[self.current].encrypt(nonce, body.encode(), place)
        return StoredBody(None, nonce + sealed, self.current)

    def open(self, conversation_id: int, client_message_id: str, stored: StoredBody) -> str:
        """Raises `UnreadableBodyError`."""
        if stored.body is not None:
            return stored.body
        assert stored.sealed_body is not None
        cipher = self._ciphers.get(stored.key_id or "")
        if cipher is None:
            raise UnreadableBodyError(f"The field key {stored.key_id!r} is not configured.")
        nonce, sealed = stored.sealed_body[:_NONCE_BYTES], stored.sealed_body[_NONCE_BYTES:]
        try:
            return cipher.decrypt(nonce, sealed, _place(conversation_id, client_message_id)).decode()
        except InvalidTag:
            raise UnreadableBodyError("A sealed body does not belong to its row.") from None


def _place(conversation_id: int, client_message_id: str) -> bytes:
    return f"{conversation_id}:{client_message_id}".encode()


def new_key(key_id: str) -> str:
    """A fresh key, as an entry of the setting. Raises ValueError when `key_id` cannot be one."""
    if not _KEY_ID.fullmatch(key_id):
        raise ValueError("A key's id has 1 to 40 letters, digits, dots, underscores or dashes.")
    return f"{key_id}:{base64.b64encode(os.urandom(_KEY_BYTES)).decode()}"

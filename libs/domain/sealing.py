"""Fields that are sealed at rest, with AES-GCM, when field keys are configured.

What is sealed belongs to its place, which is authenticated with it: moved to another row, it cannot be opened. Which
key sealed it is stored beside it; keys are added at the front of the setting, and older ones are dropped once
`sessiongate keys rotate` has sealed everything anew.
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


class Field(NamedTuple):
    """A field as it is stored: sealed with the key of that id, or in clear where that is None."""

    data: bytes
    key_id: str | None


class UnreadableFieldError(Exception):
    """The key of a sealed field is not configured, or the row was tampered with."""


class FieldKeys:
    """Seals with the first of its keys and opens with any. Without keys, fields are stored in clear."""

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

    def seal(self, place: str, clear: bytes) -> Field:
        """`place` names the row and the column."""
        if self.current is None:
            return Field(clear, None)
        nonce = os.urandom(_NONCE_BYTES)
        return Field(nonce + self._ciphers[self.current].encrypt(nonce, clear, place.encode()), self.current)

    def open(self, place: str, field: Field) -> bytes:
        """Raises `UnreadableFieldError`."""
        if field.key_id is None:
            return field.data
        cipher = self._ciphers.get(field.key_id)
        if cipher is None:
            raise UnreadableFieldError(f"The field key {field.key_id!r} is not configured.")
        nonce, sealed = field.data[:_NONCE_BYTES], field.data[_NONCE_BYTES:]
        try:
            return cipher.decrypt(nonce, sealed, place.encode())
        except InvalidTag:
            raise UnreadableFieldError("A sealed field does not belong to its row.") from None


def new_key(key_id: str) -> str:
    """A fresh key, as an entry of the setting. Raises ValueError when `key_id` cannot be one."""
    if not _KEY_ID.fullmatch(key_id):
        raise ValueError("A key's id has 1 to 40 letters, digits, dots, underscores or dashes.")
    return f"{key_id}:{base64.b64encode(os.urandom(_KEY_BYTES)).decode()}"

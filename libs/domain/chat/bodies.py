"""Message bodies as they are stored: in clear, or sealed with a field key, bound to their conversation and
`client_message_id`."""

from typing import Final, NamedTuple

from libs.domain.sealing import Field, FieldKeys


class StoredBody(NamedTuple):
    """The columns of a body: `body`, or `sealed_body` with the id of its key."""

    body: str | None
    sealed_body: bytes | None
    key_id: str | None


class Bodies:
    """Seals with the first of the field keys and opens with any. Without keys, bodies are stored in clear."""

    def __init__(self, keys: FieldKeys) -> None:
        self._keys = keys
        self.current: Final = keys.current

    def seal(self, conversation_id: int, client_message_id: str, body: str) -> StoredBody:
        if self.current is None:
            return StoredBody(body, None, None)
        return StoredBody(None, *self._keys.seal(_place(conversation_id, client_message_id), body.encode()))

    def open(self, conversation_id: int, client_message_id: str, stored: StoredBody) -> str:
        """Raises `UnreadableFieldError`."""
        if stored.body is not None:
            return stored.body
        assert stored.sealed_body is not None
        sealed = Field(stored.sealed_body, stored.key_id)
        return self._keys.open(_place(conversation_id, client_message_id), sealed).decode()


def _place(conversation_id: int, client_message_id: str) -> str:
    return f"{conversation_id}:{client_message_id}"

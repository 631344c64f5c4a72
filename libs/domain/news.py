"""News of conversations on their way from process to process, over Redis pub/sub.

They say where to look, never what is there: what a conversation holds is in PostgreSQL, and who watches one looks
there now and then without being told. Lost news are late news.
"""

from typing import Final, Protocol

import orjson

from libs.domain.channels import Channel

CHANNEL: Final = "sessiongate:conversations"


class Watcher(Protocol):
    """Whoever wants to know of conversations at once; see `libs.domain.transaction.Bell`."""

    def changed(self, conversation_id: int) -> None: ...

    def typing(self, conversation_id: int, user_id: int, *, on: bool) -> None: ...


class News:
    """Gathers what one message will say."""

    def __init__(self) -> None:
        self._changed: dict[int, None] = {}
        self._typing: dict[tuple[int, int], bool] = {}

    def __bool__(self) -> bool:
        return bool(self._changed or self._typing)

    def changed(self, conversation_id: int) -> None:
        self._changed[conversation_id] = None

    def typing(self, conversation_id: int, user_id: int, *, on: bool) -> None:
        self._typing[conversation_id, user_id] = on

    def encode(self, sender: str) -> bytes:
        typing = [(*who, on) for who, on in self._typing.items()]
        return orjson.dumps({"from": sender, "changed": list(self._changed), "typing": typing})


def tell(watcher: Watcher, message: bytes, *, but: str) -> None:
    """Tells what a message says, unless it is from `but`."""
    news = orjson.loads(message)
    if news["from"] == but:
        return
    for conversation_id in news["changed"]:
        watcher.changed(conversation_id)
    for conversation_id, user_id, on in news["typing"]:
        watcher.typing(conversation_id, user_id, on=on)


async def listen(url: str, watcher: Watcher, *, but: str) -> None:
    """Tells `watcher` the news of everyone but one until cancelled, whatever becomes of Redis meanwhile."""
    await Channel(url, CHANNEL).listen(lambda message: tell(watcher, message, but=but))

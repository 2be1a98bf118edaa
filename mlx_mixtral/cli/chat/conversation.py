"""What was said in a chat: turns, a system prompt, saved and loaded whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_mixtral.errors import CheckpointError, InvalidRequestError
from mlx_mixtral.files import replace_file
from mlx_mixtral.reading import read_json

__all__ = ["Conversation", "is_conversation"]


class Conversation:
    """Turns of user and assistant in order, and the system prompt in front of them."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """As ``model.chat`` takes them."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.turns

    def ask(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        self.turns.append({"role": "assistant", "content": text})

    def undo(self) -> bool:
        """Forget the last question and what was answered; False when there is none."""
        while self.turns:
            if self.turns.pop()["role"] == "user":
                return True
        return False

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.turns.clear()

    def save(self, path: Path) -> None:
        """Write the messages as JSON; the file appears whole, or stays what it was.

        Raises:
            DestinationError, DiskSpaceError: it cannot be written.
        """
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n"
        replace_file(path, text.encode())

    def load(self, path: Path) -> None:
        """Replace this conversation by a saved one; untouched when that is not a conversation.

        Raises:
            CheckpointError, InvalidRequestError: not a file of messages; what is wrong with it is named.
        """
        messages = read_json(path).get("messages")
        if not isinstance(messages, list):
            raise InvalidRequestError(f"{path} holds no list of messages")
        turns = [_turn(path, index, message) for index, message in enumerate(messages)]
        system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
        for index, turn in enumerate(turns):
            wanted = ("user", "assistant")[index % 2]
            if turn["role"] != wanted:
                at = index + (system is not None)
                raise InvalidRequestError(f"{path}: messages[{at}] is the {turn['role']}'s; {wanted} comes there")
        if len(turns) % 2:
            raise InvalidRequestError(f"{path}: the last message is the user's and has no answer")
        self.system, self.turns = system, turns


def is_conversation(path: Path) -> bool:
    """Whether a file is what ``save`` writes."""
    try:
        found = read_json(path)
    except CheckpointError:
        return False
    return set(found) == {"messages"} and isinstance(found["messages"], list)


def _turn(path: Path, index: int, message: Any) -> dict[str, str]:
    where = f"{path}: messages[{index}]"
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{where} is not an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise InvalidRequestError(f"{where} has role {role!r}; a chat knows system, user and assistant")
    if not isinstance(content, str):
        raise InvalidRequestError(f"{where}: content is {type(content).__name__}, not text")
    return {"role": role, "content": content}

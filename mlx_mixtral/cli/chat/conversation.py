"""What was said in a chat: turns, a system prompt, saved and loaded whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.files import read_json

__all__ = ["Conversation", "ConversationFileError"]


class ConversationFileError(InvalidRequestError):
    """A conversation cannot be saved or loaded; the message says why."""


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
            ConversationFileError: it cannot be written.
        """
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n"
        temporary = None
        try:
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            Path(temporary).replace(path)
            temporary = None
        except OSError as error:
            raise ConversationFileError(f"{path} cannot be written: {error.strerror or error}") from None
        finally:
            if temporary is not None:
                Path(temporary).unlink()

    def load(self, path: Path) -> None:
        """Replace this conversation by a saved one; untouched when that is not a conversation.

        Raises:
            ConversationFileError: not a file of messages; the message names what is wrong with it.
        """
        try:
            entries = read_json(path)
        except Exception as error:
            raise ConversationFileError(str(error)) from None
        messages = entries.get("messages")
        if not isinstance(messages, list):
            raise ConversationFileError(f"{path} holds no list of messages")
        turns = [_turn(path, index, message) for index, message in enumerate(messages)]
        system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
        for index, turn in enumerate(turns):
            wanted = ("user", "assistant")[index % 2]
            if turn["role"] != wanted:
                at = index + (system is not None)
                raise ConversationFileError(f"{path}: messages[{at}] is the {turn['role']}'s; {wanted} comes there")
        if len(turns) % 2:
            raise ConversationFileError(f"{path}: the last message is the user's and has no answer")
        self.system, self.turns = system, turns


def _turn(path: Path, index: int, message: Any) -> dict[str, str]:
    where = f"{path}: messages[{index}]"
    if not isinstance(message, Mapping):
        raise ConversationFileError(f"{where} is not an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise ConversationFileError(f"{where} has role {role!r}; a chat knows system, user and assistant")
    if not isinstance(content, str):
        raise ConversationFileError(f"{where}: content is {type(content).__name__}, not text")
    return {"role": role, "content": content}

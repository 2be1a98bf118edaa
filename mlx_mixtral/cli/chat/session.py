"""One chat session: messages and slash commands in, answers out, what was said kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlx_mixtral import GenerationStats, Mixtral
from mlx_mixtral.arguments import as_path
from mlx_mixtral.cli.chat.conversation import Conversation
from mlx_mixtral.cli.chat.settings import AnswerOptions, AnswerSettings
from mlx_mixtral.cli.console import note, one_line, terminal_safe
from mlx_mixtral.cli.destinations import CONVERSATION, check_place
from mlx_mixtral.cli.streaming import Interruptible, note_warnings, print_stream, stats_line
from mlx_mixtral.constraints.specs import ConstraintSpec
from mlx_mixtral.errors import ContextLengthError, MixtralError
from mlx_mixtral.generation.request import Speculation
from mlx_mixtral.sizes import format_bytes

__all__ = ["Session"]

LEAVE = ("/exit", "/quit", "/bye")
NO_ADAPTER = "none"
HELP = """\
/reset         forget the conversation, keep the system prompt
/undo          forget the last question and its answer
/system TEXT   set the system prompt; without TEXT, remove it
/save FILE     write the conversation to a file; /save --overwrite FILE replaces one
/load FILE     go on with a saved conversation
/set           list how answers are generated; /set NAME VALUE changes it: /set temperature 0.2
/adapter       list the adapters; /adapter NAME answers with one from now on, /adapter none with the model itself
/stats         tokens, speed and memory so far
/help          this list
/exit          leave (Ctrl-D too)
A line ending with \\ goes on in the next, as after Alt-Enter; lines between two \"\"\" are one message.
A pasted text is one message, whatever its lines are. Tab completes commands and file names.
Ctrl-C stops an answer and keeps what was said. A message that begins with / is written with a space before it."""


class Session:
    """A conversation with a model, driven line by line."""

    def __init__(
        self,
        model: Mixtral,
        options: AnswerOptions,
        conversation: Conversation,
        speculation: Speculation | None = None,
        constraint: ConstraintSpec | None = None,
    ) -> None:
        self.model, self.conversation, self.speculation = model, conversation, speculation
        self.constraint = constraint
        self.settings = AnswerSettings(options)
        self.ask: Callable[[str], bool] | None = None
        """Puts a question to the user, for True or False."""
        self._last: GenerationStats | None = None
        self._files: set[Path] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/undo": self._undo,
            "/system": self._system,
            "/save": self._save,
            "/load": self._load,
            "/set": self._set,
            "/adapter": self._adapter,
            "/stats": self._stats,
            "/help": lambda _: note(HELP),
        }

    @property
    def commands(self) -> list[str]:
        """What may be typed after a slash, the slash with it."""
        return [*self._commands, LEAVE[0]]

    @property
    def adapters(self) -> list[str]:
        """What ``/adapter`` takes."""
        return [*self.model.adapters, NO_ADAPTER] if len(self.model.adapters) else []

    def check(self) -> None:
        """Raise what a first message would, before one is typed: no tokenizer, no chat format, no room.

        Raises:
            ContextLengthError: the system prompt fills the context.
            TokenizerError: the model cannot chat.
        """
        used = len(self.model.tokenizer.encode_chat([*self.conversation.messages, {"role": "user", "content": "Hi"}]))
        if used >= (limit := self.model.config.max_context_tokens):
            raise ContextLengthError(
                f"the system prompt alone takes {used} tokens, and the context holds {limit}; give a shorter --system"
            )

    def handle(self, message: str) -> bool:
        """Take one message or command; False when the session ends. Errors become one line and the session goes on."""
        text = message.strip()
        if not text:
            return True
        command, *argument = text.split(maxsplit=1)
        # A text of several lines, a pasted one for instance, may begin with a slash that means nothing.
        if message.startswith("/") and (command in self._commands or "\n" not in text):
            if command in LEAVE:
                return False
            try:
                self._commands.get(command, self._unknown)("".join(argument) if command in self._commands else command)
            except MixtralError as error:
                note(f"error: {one_line(error)}")
            return True
        self._ask(text)
        return True

    def _ask(self, text: str) -> None:
        talk, options = self.conversation, self.settings.options
        talk.ask(text)
        try:
            with Interruptible(asks_only=True) as interrupt:
                stream = self.model.stream_chat(
                    talk.messages,
                    **options.arguments(),
                    cancelled=interrupt.cancelled,
                    on_prefill=interrupt.on_prefill,
                    speculation=self.speculation,
                    constraint=self.constraint,
                )
                note_warnings(stream.stats)
                answer, chunks = print_stream(stream)
        except ContextLengthError:
            used = len(self.model.tokenizer.encode_chat(talk.messages))
            talk.undo()
            limit = self.model.config.max_context_tokens
            note(
                f"error: the conversation would have {used} tokens and the context holds {limit}; this message was not "
                "sent: /reset starts over, /undo forgets the last exchange"
            )
            return
        except MixtralError as error:
            talk.undo()
            note(f"error: {one_line(error)}")
            return
        except KeyboardInterrupt:
            talk.undo()
            note("(stopped before an answer began; the message was taken back)")
            return
        self._last = stream.stats
        # Templates want a turn that says something; an empty answer would make the next one unreadable.
        if not answer.strip():
            talk.undo()
            note("(no answer; the message was taken back)")
            return
        talk.answer(answer.strip())
        if interrupt.pressed:
            note("(stopped; what was said so far is kept)")
        elif chunks[-1].finish_reason == "length" and len(chunks) < options.max_tokens:
            note("(the context is full: /reset starts over, /undo forgets the last exchange)")
        elif chunks[-1].finish_reason == "length":
            note(f"(cut off at --max-tokens {options.max_tokens}; /set max-tokens N changes it)")

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        note("(the conversation is empty)")

    def _undo(self, _: str) -> None:
        note("(forgot the last exchange)" if self.conversation.undo() else "(nothing to forget)")

    def _system(self, text: str) -> None:
        self.conversation.system = text or None
        note("(the system prompt is set)" if text else "(no system prompt)")

    def _save(self, name: str) -> None:
        if not name:
            note("error: /save needs a file name")
            return
        wanted, _, rest = name.partition(" ")
        name = rest.strip() if wanted == "--overwrite" else name
        # What this session wrote or read itself is its own to replace.
        kept = as_path("the file", name).resolve() in self._files
        place = check_place("the file", name, CONVERSATION, overwrite=kept or wanted == "--overwrite", ask=self.ask)
        self.conversation.save(place)
        self._files.add(place)
        note(f"(saved {len(self.conversation.messages)} messages to {one_line(name)})")

    def _load(self, name: str) -> None:
        if not name:
            note("error: /load needs a file name")
            return
        place = as_path("the file", name)
        self.conversation.load(place)
        self._files.add(place.resolve())
        note(f"(loaded {len(self.conversation.messages)} messages)")

    def _set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        name, equals, beginning = name.partition("=")
        value = f"{beginning} {value.strip().removeprefix('= ')}".strip()
        lines = self.settings.set(name, value) if value or equals else self.settings.show(name or None)
        for line in lines.splitlines():
            note(line)

    def _adapter(self, name: str) -> None:
        adapters = self.model.adapters
        if name:
            adapters.use(None if name == NO_ADAPTER else name)
            note(f"(answers from now on are computed with {adapters.in_use or 'the model itself'})")
            return
        if not len(adapters):
            note("there are no adapters; --adapter PATH loads one when the chat begins")
        for each in adapters:
            info = adapters[each]
            used = ", in use" * (each == adapters.in_use)
            note(f"{each}  {info.kind}, scale {info.scale:g}, {format_bytes(info.nbytes)}{used}")

    def _stats(self, _: str) -> None:
        turns = self.conversation.messages
        limit = self.model.config.max_context_tokens
        asked = [*turns, {"role": "user", "content": ""}] if turns else []
        used = len(self.model.tokenizer.encode_chat(asked)) if asked else 0
        note(f"{len(turns)} messages, {used} of {limit} tokens of context")
        if self._last is not None:
            note(f"last answer: {stats_line(self._last)}")

    def _unknown(self, command: str) -> None:
        note(
            f"error: {terminal_safe(command)} is not a command; /help lists them, and a space before it makes it a message"
        )

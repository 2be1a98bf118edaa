"""A jinja environment for templates from strangers: no attributes to climb, and bounded time and memory.

Jinja's own sandbox keeps a template away from Python's internals, not from looping forever or building huge values.
Here whatever a template does draws on one budget: each pass of a loop, each call, each character or element made.
Operations that can make much out of little are checked before they run; those no chat template needs are not there.
Nothing depends on signals or threads, so it works wherever it is called. Chat-template extras (`tojson`,
`strftime_now`, `raise_exception`, `generation` blocks) are those of transformers.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from typing import Any, cast

from jinja2 import Environment, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_mixtral.tokenizer.chat.limits import Budget, Counted, TemplateLimitError

__all__ = ["Sandbox"]

MAX_SOURCE_CHARS = 256 * 1024
MAX_INTEGER_BITS = 4096

# fmt: off
_FILTERS = frozenset({
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "indent",
    "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace",
    "reverse", "safe", "select", "selectattr", "sort", "string", "title", "tojson", "trim", "unique", "upper"
})
# Filters that turn a whole value into text, and filters that compare elements: both can walk into every part of it.
_WALKS = frozenset({
    "capitalize", "dictsort", "e", "escape", "groupby", "indent", "join", "lower", "max", "min", "replace", "safe",
    "sort", "string", "title", "tojson", "trim", "unique", "upper"
})
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset({
        "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdecimal", "isdigit",
        "islower", "isnumeric", "isspace", "isupper", "join", "lower", "lstrip", "partition", "removeprefix",
        "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines",
        "startswith", "strip", "title", "upper"
    }),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
}
# fmt: on


class RaisedByTemplateError(TemplateError):
    """The template itself refused the conversation, with `raise_exception`."""


class GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own class attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class Sandbox(ImmutableSandboxedEnvironment):
    """Environment of one rendering at a time; set `budget` before rendering."""

    intercepted_binops = frozenset(("+", "*", "**", "%", "/", "//", "-"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constants would be computed before a budget is there
            extensions=[loopcontrols, GenerationBlock],
            finalize=_finalize,
        )
        self.budget = Budget(0)
        self._source_size = 0
        kept = {name: _counted(name, self.filters[name]) for name in _FILTERS if name != "tojson"}
        ours = {"tojson": _counted("tojson", _tojson), "_loop": _loop, "_weighed": _weighed, "_text": _text}
        self.filters = {**kept, **ours}
        del self.globals["lipsum"], self.globals["cycler"], self.globals["joiner"]
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Write the charges into the template before it becomes Python."""
        for node in list(source.find_all(nodes.For)):
            if node.recursive:
                raise TemplateLimitError("it uses a recursive loop")
            cost = 1 + sum(len(data.data) for part in node.body for data in _template_data(part))
            node.iter = _filtered(node.iter, "_loop", nodes.Const(cost))
        for compare in source.find_all(nodes.Compare):
            compare.expr = _filtered(compare.expr, "_weighed", nodes.Const(False))
        return super()._generate(cast("nodes.Template", _bound_values(source)), *args, **kwargs)

    def compile(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(source, str):
            self._source_size = len(source)
            if self._source_size > MAX_SOURCE_CHARS:
                raise TemplateLimitError(f"it is longer than {MAX_SOURCE_CHARS} characters")
        return super().compile(source, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        if isinstance(obj, (int, float, complex, bytes, range)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No `str.format`, which jinja's sandbox would let through: its widths are a way to huge texts."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.charge(1)
        if operator == "**" or (operator == "*" and isinstance(left, int) and isinstance(right, int)):
            self._check_power(operator, left, right)
        elif operator == "*":
            sequence, times = (left, right) if isinstance(right, int) else (right, left)
            if isinstance(times, int) and isinstance(sequence, (str, bytes, list, tuple)):
                self.budget.allow(self.budget.weigh(sequence) * max(times, 0))
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right)
        elif operator == "+" and isinstance(left, (str, list, tuple)):
            self.budget.allow(self.budget.weigh(left) + self.budget.weigh(right))
        return super().call_binop(context, operator, left, right)

    def _check_power(self, operator: str, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_INTEGER_BITS:
                raise TemplateLimitError(f"it computes an integer of more than {MAX_INTEGER_BITS} bits")

    def _check_format(self, text: str, values: Any) -> None:
        directives = text.count("%")
        digits = "".join(c if c.isdigit() else " " for c in text).split()
        if "*" in text or any(len(number) > 3 for number in digits):
            raise TemplateLimitError("it formats with a width that is too large")
        self.budget.allow(len(text) + 1000 * directives + directives * self.budget.weigh(values))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call what a template calls; as jinja's own, this must not take names a template could pass."""
        budget = __self.budget
        # Literal text inside a macro or block is written on every call; the whole template's length bounds it.
        budget.charge(1 + (__self._source_size if isinstance(__obj, (Macro, BlockReference)) else 0))
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if name == "join" and args:
                args = (list(Counted(args[0], budget, 1)), *args[1:])
                budget.allow(budget.weigh(args[0]) + len(owner) * len(args[0]))
            elif name == "replace" and len(args) >= 2:
                _allow_replace(budget, owner, *args[:2])
            else:
                budget.charge(len(owner))
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, (dict, list, tuple)):
            budget.weigh(result, charge_text=False)
        return result


def _template_data(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    if isinstance(node, nodes.TemplateData):
        yield node
    yield from node.find_all(nodes.TemplateData)


def _filtered(value: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(cast("nodes.Expr", value), name, list(args), [], None, None, lineno=value.lineno)


def _bound_values(node: nodes.Node) -> nodes.Node:
    """Weigh what list, tuple and dict displays make; join `~` through a filter that checks first."""
    for field, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            setattr(node, field, _bound_values(value))
        elif isinstance(value, list):
            value[:] = [_bound_values(item) if isinstance(item, nodes.Node) else item for item in value]
    if isinstance(node, nodes.Concat):
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_text")
    if isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return _filtered(node, "_weighed", nodes.Const(True))
    return node


@pass_context
def _finalize(context: Any, value: Any) -> Any:
    context.environment.budget.weigh(value)
    return value


@pass_context
def _loop(context: Any, values: Any, cost: int) -> Counted:
    return Counted(values, context.environment.budget, cost)


@pass_context
def _weighed(context: Any, value: Any, whole: bool) -> Any:
    budget: Budget = context.environment.budget
    if whole:
        budget.weigh(value)
    else:
        budget.charge(1)
    return value


@pass_context
def _text(context: Any, values: list[Any]) -> str:
    context.environment.budget.weigh(values)
    return "".join(map(str, values))


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that charges for what it reads and makes."""
    passed = getattr(function, "jinja_pass_arg", None)

    @pass_context
    def counted(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        environment: Environment = context.environment
        budget: Budget = environment.budget  # type: ignore[attr-defined]
        budget.charge(1)
        if hasattr(value, "__next__") and name not in ("d", "default"):
            value = Counted(value, budget, 1)
        if name in _WALKS:
            value = list(value) if isinstance(value, Counted) else value
            weight = budget.weigh(value) + budget.weigh(args) + budget.weigh(kwargs)
            if name == "join":
                value = list(value)
                weight += len(str(args[0] if args else kwargs.get("d", ""))) * len(value)
            budget.allow(weight)
            if name == "replace" and len(args) >= 2:
                _allow_replace(budget, str(value), *args[:2])
            if name in ("indent", "tojson") and any(map(_large, (*args, *kwargs.values()))):
                raise TemplateLimitError("it indents by too much")
        elif hasattr(value, "__len__") and not isinstance(value, Counted):
            budget.charge(len(value))
        extra = {"context": context, "eval_context": context.eval_ctx, "environment": environment}
        first = (extra[passed.name],) if passed is not None else ()
        result = function(*first, value, *args, **kwargs)
        if isinstance(result, (dict, list, tuple)):
            budget.weigh(result, charge_text=False)
        return result

    return counted


def _large(width: Any) -> bool:
    """A width of a few dozen characters is all that indenting needs; it may be a string to indent with."""
    if isinstance(width, (tuple, list)):
        return any(map(_large, width))
    return len(width) > 64 if isinstance(width, str) else isinstance(width, int) and width > 64


def _allow_replace(budget: Budget, text: str, old: Any, new: Any) -> None:
    old, new = str(old), str(new)
    budget.allow(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as transformers' templates write it: nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise RaisedByTemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 64 or any(c.isdigit() for c in pattern):
        raise SecurityError("strftime_now takes a short pattern without digits")
    return datetime.datetime.now().strftime(pattern)

"""Jinja for templates that nobody vouches for: no way to Python's insides, and an end to time and memory.

Jinja's own sandbox closes the first. It lets a template loop for ever and write gigabytes, so here every turn of a
loop, call and filter looks at the clock, and what makes long strings is asked beforehand how long.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from jinja2 import Environment, Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_environment
from jinja2.visitor import NodeTransformer

SECONDS: Final = 10.0  # of one render; a real one takes a thousandth of a second
LONGEST: Final = 2**24  # characters of a string, elements of a list
WIDTH: Final = re.compile(r"\d{8,}")  # of a number in a format, such as %99999999d
NESTED: Final = re.compile(r"\{[^{}]*\{|%[^a-zA-Z%]*\*")  # a width that is an argument of its own
REFUSED: Final = ("encode", "expandtabs", "maketrans", "translate")  # methods that no template of a model calls


PASSED: Final = (Context, Environment, nodes.EvalContext)  # what Jinja gives a filter before what the template does


class Sandbox(ImmutableSandboxedEnvironment):
    """Where templates are compiled and rendered. One render at a time."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._deadline = 0.0
        del self.filters["wordwrap"]
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.filters |= {"_turns": _turns, "_joined": _joined}

    def compiled(self, source: str) -> Template:
        """A template of `source`, its loops and joins under watch.

        Raises:
            jinja2.TemplateSyntaxError: it is not Jinja.
        """
        return self.from_string(_Watching().visit(self.parse(source)))

    def write(self, template: Template, variables: Mapping[str, Any]) -> str:
        """The text that a template makes.

        Raises:
            jinja2.exceptions.SecurityError: it reached for what it may not, or took too long, or too much.
        """
        self._deadline = time.monotonic() + SECONDS
        pieces, length = [], 0
        for piece in template.generate(variables):
            length += len(piece)
            _require(length)
            pieces.append(piece)
        return "".join(pieces)

    def look_at_clock(self) -> None:
        """To be called at every turn of everything that turns."""
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it takes longer than {SECONDS:g} s")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Every call in a template; names as Jinja has them, for a template's own may be any other."""
        __self.look_at_clock()
        _require_small([*args, *kwargs.values()])
        if isinstance(text := getattr(__obj, "__self__", None), str):
            _foresee(getattr(__obj, "__name__", ""), text, [*args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` as Jinja has it, which asks first how long its result will be."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def ask_first(*args: Any, **kwargs: Any) -> str:
            _foresee("format", value.__self__, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return ask_first

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.look_at_clock()
        if operator == "+" and _sized(left) and _sized(right):
            _require(len(left) + len(right))
        elif operator == "*":
            _foresee_product(left, right)
            _foresee_product(right, left)
        elif operator == "**":
            _require(abs(right) * left.bit_length() if isinstance(left, int) and isinstance(right, int) else 0)
        elif operator == "%" and isinstance(left, str):
            _foresee("format", left, right if isinstance(right, tuple) else (right,))
        return super().call_binop(context, operator, left, right)


class _Watching(NodeTransformer):
    """Puts a watch into every loop, and into every `a ~ b`."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_turns", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "_joined", [], [], None, None, lineno=node.lineno)


@pass_environment
def _turns(environment: Sandbox, items: Iterable[Any]) -> Iterable[Any]:
    """The items of a loop; as they are where Jinja needs to know their number."""
    if isinstance(items, Sequence | Mapping):
        _require(len(items))
        return _Clocked(environment, items)
    return _clocked(environment, items)


class _Clocked:
    """A sized iterable."""

    def __init__(self, environment: Sandbox, items: Sequence[Any] | Mapping[Any, Any]) -> None:
        self._environment, self._items = environment, items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return _clocked(self._environment, self._items)


def _clocked(environment: Sandbox, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        environment.look_at_clock()
        yield item


@pass_environment
def _joined(environment: Sandbox, parts: Sequence[Any]) -> str:
    environment.look_at_clock()
    texts = [str(part) for part in parts]
    _require(sum(map(len, texts)))
    return "".join(texts)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that asks first how long its result will be; what Jinja passes along stays as it is."""

    @functools.wraps(function)
    def ask_first(*args: Any, **kwargs: Any) -> Any:
        first = next((place for place, argument in enumerate(args) if not isinstance(argument, PASSED)), len(args))
        passed, given = args[:first], list(args[first:])
        _require_small([*given, *kwargs.values()])
        if name == "join" and given:
            given[0] = given[0] if isinstance(given[0], Sequence) else list(given[0])
            _foresee("join", str(given[1]) if len(given) > 1 else "", given[:1])
        elif given and isinstance(given[0], str):
            _foresee(name, given[0], [*given[1:], *kwargs.values()])
        return function(*passed, *given, **kwargs)

    return ask_first


def _foresee(name: str, text: str, args: Sequence[Any]) -> None:
    """Refuse a method or filter of strings whose result would be too long."""
    if name == "replace" and len(args) >= 2 and all(isinstance(arg, str) for arg in args[:2]):
        _require(len(text) + text.count(args[0]) * len(args[1]))
    elif name == "join" and args and isinstance(args[0], Sequence):
        _require(len(text) * len(args[0]) + sum(len(item) for item in args[0] if isinstance(item, str)))
    elif name == "indent":
        _require(len(text) + text.count("\n") * max([4, *(_longest(arg) for arg in args)]))
    elif name in ("format", "format_map"):
        if WIDTH.search(text):
            raise SecurityError("a number in a format is too large")
        widths = sum(map(int, re.findall(r"\d+", text)))
        longest = max((_longest(arg) if NESTED.search(text) else len(str(arg)) for arg in args), default=0)
        _require(len(text) + widths + (text.count("{") + text.count("%")) * longest)
    elif name in REFUSED:
        raise SecurityError(f"it calls {name}")


def _foresee_product(sequence: Any, times: Any) -> None:
    if isinstance(times, int) and (_sized(sequence) or isinstance(sequence, int)):
        _require(times * len(sequence) if _sized(sequence) else sequence.bit_length() + times.bit_length())


def _longest(argument: Any) -> int:
    """Of what an argument may stand for: its text, or a width."""
    return abs(argument) if isinstance(argument, int) else len(str(argument))


def _sized(value: Any) -> bool:
    return isinstance(value, str | bytes | list | tuple)


def _require_small(values: Iterable[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > LONGEST for value in values):
        raise SecurityError("a number is too large")


def _require(length: int) -> None:
    if length > LONGEST:
        raise SecurityError(f"it makes more than {LONGEST:,} characters or elements")

"""From plain values to a call: pydantic checks them against the signatures, then the objects are built."""

import functools
import inspect
import json
import pydoc
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, TypeAdapter, ValidationError

from mllm_protector.errors import InputError, RecordError
from mllm_protector.helping import CONFIGS, flat, suggestion
from mllm_protector.plugins import loaded
from mllm_protector.ranges import Number, Whole

T = TypeVar("T")


def check_call(key: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check the names and types of a call's arguments, and those of all calls inside them.

    Args:
        key: of the call; empty for a script's function.
        function: whose signature is the schema.
        arguments: plain values; a ``_target_`` describes a call.

    Raises:
        InputError: an argument is unknown, missing or of the wrong type, or a ``_target_`` is not allowed.
    """
    signature = inspect.signature(function, eval_str=True)
    for name in arguments:
        if name not in signature.parameters:
            known = () if key else flat(arguments)
            raise InputError(f"{_join(key, name)}: unknown config key{suggestion(name, known)}")
    for name, parameter in signature.parameters.items():
        if name not in arguments and parameter.default is parameter.empty:
            group = name.removesuffix("s")  # options of the group judge fill judges
            given = f"{group}=[...]" if (CONFIGS / group).is_dir() else f"{_join(key, name)}=..."
            raise InputError(f"{given.partition('=')[0]} has no value; give {given}")
    # Plain values first: nested ones may repeat them, and a message should name the key as typed.
    for name, value in sorted(arguments.items(), key=lambda item: isinstance(item[1], dict)):
        annotation = signature.parameters[name].annotation
        check(_join(key, name), value, Any if annotation is inspect.Parameter.empty else annotation)


def check(key: str, value: Any, wanted: Any) -> None:
    """Check one value against an annotation, and the values inside it.

    Raises:
        InputError: as ``check_call``.
    """
    try:
        _validator(wanted).validate_python(value)
    except ValidationError as error:
        words = dict.fromkeys(
            _WORDS.get(each["type"], "one of the options that --help lists").format_map(each.get("ctx", {}))
            for each in error.errors()
        )
        null = " or null" if types.NoneType in get_args(wanted) else ""
        shown = value if isinstance(value, str) else json.dumps(value)
        raise InputError(f"{key}={shown}: must be {' or '.join(words)}{null}") from None
    if isinstance(value, dict) and "_target_" in value:
        arguments = {name: item for name, item in value.items() if name not in ("_target_", "_partial_")}
        check_call(key, _constructor(key, str(value["_target_"])), arguments)
    elif isinstance(value, dict):
        inside = [get_args(each)[1] for each in (wanted, *get_args(wanted)) if get_origin(each) is Mapping]
        for name, item in value.items():
            check(_join(key, name), item, inside[0] if inside else Any)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check(f"{key}[{index}]", item, Any)


_WORDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge:,}",
    "less_than_equal": "at most {le:,}",
    "list_type": "a list",
    "is_instance_of": "a list",
    "sequence_str": "a list",
    "dict_type": "a table of names and values",
    "mapping_type": "a table of names and values",
}
"""The types of pydantic's errors in words that follow "must be"."""


@functools.cache
def _validator(wanted: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_plain_type(wanted), config={"strict": True})


def _plain_type(wanted: Any) -> Any:
    """An annotation in terms of plain values: an object of a class is a table with a ``_target_``."""
    origin, inside = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_plain_type, inside))]  # noqa: UP007 - of as many as there are
    if origin in (list, Sequence, Mapping):
        return origin[tuple(map(_plain_type, inside))]
    if origin in (Annotated, Literal) or wanted in (Any, str, bool, types.NoneType):
        return wanted
    return {int: Whole, float: Number}.get(wanted, _Constructed)


def _has_target(value: dict[str, Any]) -> dict[str, Any]:
    if "_target_" not in value:
        raise ValueError
    return value


_Constructed = Annotated[dict[str, Any], AfterValidator(_has_target)]


def _constructor(key: str, target: str) -> Callable[..., Any]:
    """The object that a ``_target_`` names.

    It is defined in this package and not just imported there, or another package declares it (``plugins``).
    """
    if target.startswith("mllm_protector."):
        found: Any = pydoc.locate(target)
        allowed = str(getattr(found, "__module__", "")).startswith("mllm_protector.")
    else:
        found, allowed = loaded(key, target), True
    if not allowed or not callable(found):
        raise InputError(
            f"{key}._target_={target}: not a constructor of mllm_protector, "
            "and no installed package declares it"
        )
    return found  # type: ignore[no-any-return]


def construct(key: str, value: Any) -> Any:
    """Build what a checked value describes; ``_partial_: true`` gives a factory.

    Raises:
        InputError: a constructor refused its arguments. The message begins with the key.
    """
    if isinstance(value, list):
        return [construct(f"{key}[{index}]", item) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    arguments = {
        name: construct(_join(key, name), item)
        for name, item in value.items()
        if name not in ("_target_", "_partial_")
    }
    if "_target_" not in value:
        return arguments
    constructor = _constructor(key, value["_target_"])
    if value.get("_partial_"):
        return functools.partial(constructor, **arguments)
    return make(key, functools.partial(constructor, **arguments))


def make(key: str, factory: Callable[[], T]) -> T:
    """What a factory, or a method of a constructed object, makes.

    Raises:
        InputError: it refused its arguments. The message begins with the key, or with a file and its line.
    """
    try:
        return factory()
    except RecordError:
        raise
    except InputError as error:
        first = re.split("[=:. ]", str(error), maxsplit=1)[0]
        owner = getattr(factory, "__self__", None)
        given = hasattr(owner, first) or first in getattr(factory, "keywords", {})
        prefix = f"{key}." if given else "" if first == key else f"{key}: "
        raise InputError(f"{prefix}{error}") from error


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name

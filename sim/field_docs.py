"""The fields of settings, for people: path, default, what is allowed, how to choose.

Belongs here: reading all that off the structs, for errors and for `docs/scenarios.md`. It knows no setting by name.
"""

import ast
import difflib
import inspect
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from protocols.errors import ConfigError

PLAIN = {
    bool: "true, false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a table",
    NoneType: "",
}


class FieldDoc(Struct, frozen=True):
    """One field."""

    path: str
    default: str
    """As TOML; empty where there is none."""
    allowed: str
    how_to_choose: str


class TableDoc(Struct, frozen=True):
    """One table: its path, empty for the root, and the fields that are no tables themselves."""

    path: str
    summary: str
    fields: list[FieldDoc]


def describe(root: type[Struct], defaults: Struct | None = None, path: str = "") -> list[TableDoc]:
    """Every table below `root`, each before those inside it. Tables of a list have `[]` in their path.

    defaults: where the default values come from; left out, from the struct's own fields.
    """
    fields: list[FieldDoc] = []
    below: list[TableDoc] = []
    texts = _texts(root)
    hints = get_type_hints(root, include_extras=True)
    for field in msgspec.structs.fields(root):
        kind, full = hints[field.name], f"{path}.{field.name}".lstrip(".")
        default = field.default if defaults is None else getattr(defaults, field.name)
        inner, is_list = _struct_of(kind), _is_list(kind)
        if inner is not None:
            below += describe(inner, None if is_list else default, full + "[]" * is_list)
        if inner is None or is_list:
            fields.append(FieldDoc(full, _as_text(default), allowed(kind), texts.get(field.name, "")))
    summary = inspect.cleandoc(root.__doc__ or "").split("\n\n")[0]
    return [TableDoc(path, " ".join(summary.split()), fields), *below]


def page(tables: Iterable[TableDoc], leave_out: Collection[str] = ()) -> str:
    """The tables as Markdown, without the fields at the paths to leave out."""
    lines: list[str] = []
    for table in tables:
        if table.path:
            lines += [f"### {table.path}", "", table.summary, ""]
        lines += ["| field | default | allowed | how to choose |", "|---|---|---|---|"]
        for field in table.fields:
            if field.path not in leave_out:
                default = field.default and f"`{field.default}`"
                cells = f"`{field.path}`", default, field.allowed, field.how_to_choose
                # A bar would end the cell, even between code marks.
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def allowed(kind: Any) -> str:
    """What a field of this type takes, in a few words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        metas = [meta for meta in kind.__metadata__ if isinstance(meta, Meta)]
        return " ".join(filter(None, [allowed(arguments[0]), *map(_bounds, metas)]))
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " or ".join(filter(None, map(allowed, arguments)))
    if origin is tuple:
        repeated = len(arguments) == 2 and arguments[1] is Ellipsis
        return f"a list of {allowed(arguments[0])}" if repeated else f"[{', '.join(map(allowed, arguments))}]"
    if isinstance(kind, type) and issubclass(kind, Struct):
        return "a table"
    return PLAIN.get(origin or kind, "")


def allowed_at(root: type[Struct], path: str) -> list[str]:
    """What the field at this path takes; empty where nothing is known of it."""
    kind: Any = root
    for part in _parts(path):
        kind = _below(kind, part)
    text = "" if _struct_of(kind) else allowed(kind)
    return [text] if text else []


def check_path(root: type[Struct], path: str) -> None:
    """Whether there is a field at this path of names; a list is one field, and a free table takes any name.

    Raises:
        ConfigError: at the path, with the names that are near, or all there are.
    """
    kind: Any = root
    done = ""
    for name in path.split("."):
        struct = _struct_of(kind)
        if _is_list(kind) or (struct is None and not _has_any_keys(kind)):
            raise ConfigError(done, "is a value, not a table", [allowed(kind)])
        if struct is not None and name not in struct.__struct_fields__:
            raise unknown_field(root, done, name)
        kind = _below(kind, name)
        done = f"{done}.{name}".lstrip(".")


def unknown_field(root: type[Struct], path: str, name: str) -> ConfigError:
    """For a table at `path` in which somebody wrote `name`."""
    kind: Any = root
    for part in _parts(path):
        kind = _below(kind, part)
    struct = _struct_of(kind)
    known = sorted(struct.__struct_fields__) if struct else []
    full = f"{path}.{name}".lstrip(".")
    near = difflib.get_close_matches(name, known)
    problem = (
        f"there is no such field; did you mean {' or '.join(near)}?" if near else "there is no such field"
    )
    return ConfigError(full, problem, known)


def _parts(path: str) -> list[str]:
    """`devices.classes[0].share` to its names; a place in a list is one too."""
    return re.findall(r"[^.\[\]]+|\[[^\]]*\]", path)


def _below(kind: Any, part: str) -> Any:
    """The type of one field, or of a list's items."""
    if part.startswith("["):
        for option in _options(kind):
            if get_origin(option) is tuple:
                arguments = get_args(option)
                return arguments[0]
        return Any
    struct = _struct_of(kind)
    return get_type_hints(struct, include_extras=True).get(part, Any) if struct else Any


def _options(kind: Any) -> Sequence[Any]:
    """What is behind `Annotated`, and the parts of a union."""
    if get_origin(kind) is Annotated:
        return _options(get_args(kind)[0])
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _struct_of(kind: Any) -> type[Struct] | None:
    """The struct of a table or of a list of tables."""
    for option in _options(kind):
        inner = get_args(option)[0] if get_origin(option) is tuple else option
        if isinstance(inner, type) and issubclass(inner, Struct):
            return inner
    return None


def _is_list(kind: Any) -> bool:
    return any(get_origin(option) is tuple for option in _options(kind))


def _has_any_keys(kind: Any) -> bool:
    return kind is Any or any(get_origin(option) is dict for option in _options(kind))


def _bounds(meta: Meta) -> str:
    words = []
    for word, bound in (("from", meta.ge), ("above", meta.gt), ("up to", meta.le), ("below", meta.lt)):
        if bound is not None:
            words.append(
                f"{word} {bound:,.0f}" if 1 <= bound <= 1e7 and bound == int(bound) else f"{word} {bound:g}"
            )
    if meta.min_length:
        words.append("not empty")
    return " ".join(words)


def _as_text(default: Any) -> str:
    if default is None or default is msgspec.NODEFAULT:
        return ""
    return msgspec.json.encode(default).decode().replace(",", ", ")


def _texts(root: type[Struct]) -> dict[str, str]:
    """What stands under each field in the source, inherited ones included."""
    texts: dict[str, str] = {}
    for kind in reversed(root.__mro__):
        if isinstance(kind, type) and issubclass(kind, Struct) and kind is not Struct:
            texts.update(_texts_of(kind))
    return texts


def _texts_of(kind: type[Struct]) -> Iterator[tuple[str, str]]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    for entry, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
            text = after.value if isinstance(after, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                yield entry.target.id, " ".join(text.value.split())

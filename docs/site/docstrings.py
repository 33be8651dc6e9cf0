"""A griffe extension: turns the docstrings of at_fused into the Markdown of the API reference."""

from __future__ import annotations

import ast
import re
from textwrap import dedent

from griffe import Extension, Function, GriffeLoader, Module, Object, ParameterKind

VARIADIC = (ParameterKind.var_positional, ParameterKind.var_keyword)
ROLE = re.compile(r":\w+:`([\w.]+)`")
# A formula or an example: an indented block between empty lines.
BLOCK = re.compile(r"(?<=\n)\n((?: {4}.*\n)(?: {4}.*\n|\n(?= {4}))*)(?=\n|\Z)")
# "student, teacher: as in ..." and "TypeError, ValueError: as ...".
NAMES = re.compile(r"^ {4}(\w+(?:, \w+)+):(.*\n(?: {5,}.*\n)*)", re.M)
RETURNS = re.compile(r"^Returns:\n {4}", re.M)


def markdown(text: str, owner: Object) -> str:
    """Return the docstring of an object as Markdown that griffe can divide into sections."""

    def link(role: re.Match[str]) -> str:
        name = role[1]
        path = name if name.startswith("at_fused.") else owner.resolve(name)
        target = owner.modules_collection[path]
        target = target.final_target if target.is_alias else target
        return f"[`{name}`][{target.path}]" if target.is_public else f"`{name}`"

    text = BLOCK.sub(fence, ROLE.sub(link, text) + "\n")
    text = re.sub(r"^Source: ", "**Source:** ", NAMES.sub(separate, text), flags=re.M)
    # Without a type, griffe would take the description up to the first colon for one.
    result = owner.returns if isinstance(owner, Function) else ""
    return RETURNS.sub(lambda title: f"{title[0]}{result}: ", text)


def fence(block: re.Match[str]) -> str:
    """Return an indented block as a fenced one, highlighted if it is Python."""
    code = dedent(block[1]).rstrip()
    try:
        ast.parse(code)
        language = "python"
    except SyntaxError:
        language = "text"
    return f"\n```{language}\n{code}\n```\n"


def separate(item: re.Match[str]) -> str:
    """Return an item for each parameter, with its own type and default; a union of errors."""
    names = item[1].split(", ")
    if names[0].endswith("Error"):
        return f"    {' | '.join(names)}:{item[2]}"
    return "".join(f"    {name}:{item[2]}" for name in names)


class Docstrings(Extension):
    """Rewrites a package's docstrings and decides which of its members the reference shows."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **options: object) -> None:
        """Rewrite all objects of a package, now that names can be resolved in it."""
        self.rewrite(pkg)

    def rewrite(self, owner: Object) -> None:
        """Rewrite an object and its members."""
        # Not shown: the docstring of a class has its attributes, and torch prints extra_repr.
        if owner.is_attribute or owner.name == "extra_repr":
            owner.docstring = None
            return
        if owner.docstring:
            owner.docstring.value = markdown(owner.docstring.value, owner)
        if isinstance(owner, Function):
            for parameter in owner.parameters:
                if parameter.kind in VARIADIC:
                    parameter.default = None  # not "()" or "{}"
        for member in owner.members.values():
            if not member.is_alias:
                self.rewrite(member)

# SPDX-License-Identifier: Apache-2.0
"""An extension of griffe: reads the docstrings of this package as they are meant.

They are of Google's style, but for habits that are good to read in the source: one line
for several arguments, examples that are not indented, arguments in two groups, and
errors that are those of another function.
"""

import re

import griffe

ITEM = re.compile(r"( +)(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*)")


def rewritten(text: str) -> str:
    """A docstring in what griffe takes for Google's style."""
    text = text.replace("\n\nFor CUDA arrays:\n", "\n")
    text = re.sub(r"^Raises:\n {4}As ", "Raises errors as ", text, flags=re.M)
    return _examples(_items(text))


def _items(text: str) -> str:
    """`a, b: text` of Args and Attributes as one item for each name."""
    lines, written, section = text.split("\n"), [], ""
    while lines:
        line = lines.pop(0)
        if header := re.fullmatch(r"(Args|Attributes|[A-Z]\w+):", line):
            section = header[1]
        match = ITEM.fullmatch(line)
        if match is None or section not in ("Args", "Attributes"):
            written.append(line)
            continue
        indent, names, first = match.groups()
        rest = []
        while lines and lines[0].startswith(indent + " "):
            rest.append(lines.pop(0))
        for name in names.split(", "):
            written += [f"{indent}{name}: {first}", *rest]
    return "\n".join(written)


def _examples(text: str) -> str:
    """Doctests below a line `Example:` as a section, in a block of code."""

    def section(match: re.Match) -> str:
        block = re.sub(r"^ {4}", "", match[1], flags=re.M)
        body = "\n".join(f"    {line}" for line in block.strip("\n").split("\n"))
        return f"Examples:\n{body}\n"

    return re.sub(
        r"^Example:\n+((?:(?: {4})?(?:>>>|\.\.\.).*\n?(?:(?! *>>>|\n).+\n?)*)+)",
        section,
        text,
        flags=re.M,
    )


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called for every module, class, function and attribute."""
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)

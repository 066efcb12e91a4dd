# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: pages of the site that do not lie in docs/, and links to them.

Results stay beside their data, CHANGELOG.md and CONTRIBUTING.md at the root, examples
are programs. Links in all of these, and in docs/, are those of the repository, so that
they work in any viewer of it; here they become links of the site. A link to what the
site does not have is a warning, and `strict` makes that an error.
"""

import logging
import pathlib
import posixpath
import re

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STUBS = ROOT / "build" / "docs"
AT_THE_ROOT = ("CHANGELOG.md", "CONTRIBUTING.md")

log = logging.getLogger("mkdocs.hooks.docs_pages")


def repository_path(uri: str) -> str:
    """Where the source of a page lies in the repository."""
    outside = uri.startswith(("benchmarks/", "examples/")) or uri in AT_THE_ROOT
    return uri if outside else f"docs/{uri}"


def site_uri(path: str) -> str:
    """The page or file of the site for a path of the repository, or ''."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "index.md"
    if path.startswith("examples/") and path.endswith(".py"):
        return path.removesuffix(".py") + ".md"
    if path.startswith("benchmarks/results/") and path.endswith((".md", ".png")):
        return path
    return path if path in AT_THE_ROOT else ""


def on_startup(command, dirty):
    """Writes what the API pages are made of where there is no Python source.

    Before plugins start, which pass over a folder that is not there yet.
    """
    STUBS.mkdir(parents=True, exist_ok=True)
    names = ("numpy_module.cc", "cuda_arrays.cc")
    sources = [(ROOT / "cc" / name).read_text() for name in names]
    (STUBS / "lbe_ops_numpy.py").write_text(numpy_stub("\n".join(sources)))


def on_files(files, config):
    """Adds the pages and pictures from outside of docs/."""
    found = [*RESULTS.rglob("*.md"), *RESULTS.rglob("*.png")]
    for path in (*found, *(ROOT / name for name in AT_THE_ROOT)):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    for path in (ROOT / "examples").rglob("*.py"):
        text = f"# {path.name}\n\n```python\n{path.read_text()}```\n"
        uri = path.relative_to(ROOT).with_suffix(".md").as_posix()
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Makes links of the repository links of the site; gives tables a title."""
    uri = page.file.src_uri
    if uri.startswith("benchmarks/") and not re.search("^# ", markdown, re.M):
        folder = posixpath.basename(posixpath.dirname(uri))
        markdown = f"# {folder}: {pathlib.PurePath(uri).stem}\n\n{markdown}"
        page.meta["hide"] = ["navigation", "toc"]  # wide
    if uri.startswith("examples/"):
        page.meta["hide"] = ["navigation", "toc"]
    folder = posixpath.dirname(repository_path(uri))

    def moved(match: re.Match) -> str:
        target, anchor = match[1], match[2] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        found = site_uri(path)
        if not found:
            log.warning("%s: the site has no %s, which it links to", uri, path)
            return match[0]
        start = posixpath.dirname(uri) or "."
        return f"]({posixpath.relpath(found, start)}{anchor})"

    return re.sub(r"\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)", moved, markdown)


def on_post_page(output, page, config):
    """Looks for what a browser would load from the network."""
    loaded = re.findall(
        r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"', output
    )
    if loaded:
        raise PluginError(f"{page.file.src_uri} loads from the network: {loaded}")


def numpy_stub(source: str) -> str:
    """lbe_ops_numpy as Python without bodies, out of its pybind11 definitions."""
    text = [f'"""{_words(re.search(r"module.doc.. =(.*?);", source, re.S)[1])}"""']
    common = re.search(r"extra\.\.\., (.*?), documentation\);", source, re.S)[1]
    long = r'\bDefine\(\s*module,\s*"(\w+)",\s*R"\((.*?)\)",\s*\w+(.*?)\);\n'
    short = r'module\.def\(\s*"(\w+)",((?:(?!module\.def).)*?)((?:\s*"[^"]*")+)\);'
    functions = [
        (name, documentation, f"{arguments}, {common}")
        for name, documentation, arguments in re.findall(long, source, re.S)
    ]
    functions += [
        (name, _words(literals), arguments)
        for name, arguments, literals in re.findall(short, source, re.S)
    ]
    written = re.findall(r'\bDefine\(\s*module,|module\.def\(\s*"', source)
    if len(functions) != len(written):
        raise PluginError("cc/numpy_module.cc, cuda_arrays.cc: a definition is missed")
    for name, documentation, arguments in functions:
        text.append(
            f"def {name}({_signature(arguments)}):\n"
            f'    r"""{_indented(documentation)}"""'
        )
    for name, documentation in re.findall(
        r'py::class_<(\w+)>\([^R]*R"\((.*?)\)"', source, re.S
    ):
        text.append(f'class {name}:\n    r"""{_indented(documentation)}"""')
    for name, literals in re.findall(
        r'\n +\.def\("(\w+)", &[\w:]+,\s*("[^"]*")', source
    ):
        text[-1] += f'\n\n    def {name}(self):\n        """{_words(literals)}"""'
    return "\n\n\n".join(text) + "\n"


def _signature(arguments: str) -> str:
    names = {"none": "None", "py::none()": "None", "false": "False", "kPiE": "pi * e"}
    pattern = r'py::kw_only\(\)|py::arg\("(\w+)"\)(?:\s*=\s*("[^"]*"|[^,\s]+))?'
    parts = []
    for name, default in re.findall(pattern, arguments):
        value = f"={names.get(default, default)}" if default else ""
        parts.append(f"{name}{value}" or "*")
    return ", ".join(parts)


def _words(literals: str) -> str:
    return "".join(re.findall(r'"([^"]*)"', literals))


def _indented(text: str) -> str:
    text = re.sub(r"(?<!`)\b__\w+__\b", r"`\g<0>`", text)
    return "\n".join(f"    {line}".rstrip() for line in text.split("\n")).strip()

"""Code of others: objects that installed packages offer by entry points, and files that a user names.

A file is loaded as it was read, so its SHA-256 is that of the code that runs, and two versions of it live side by side.
"""

import hashlib
import importlib.metadata
import os
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import InputError, first_line

# environment: files that may stand in for those of a run, by their SHA-256, separated as in PATH
ALSO = "MBCNET_PLUGINS"
PLUGINS = "plugins"  # in a run folder: the texts of those that it was trained with
_SHA = "#sha256="


@cache
def entry_points(group: str) -> tuple[Any, ...]:
    """What installed packages offer under a group, such as mbcnet.models; InputError if one cannot be loaded."""
    found = []
    for each in importlib.metadata.entry_points(group=group):
        try:
            found.append(each.load())
        except Exception as error:  # whatever a package raises when it is imported
            package = each.dist.name if each.dist else "?"
            raise InputError(
                f"package {package}: its entry point {each.name!r} of {group} cannot be loaded ({type(error).__name__}: {first_line(error)}); "
                "update the package, or uninstall it"
            ) from None
    return tuple(found)


def pinned(plugin: str, source: str) -> str:
    """FILE or FILE#sha256=HEX -> the latter, of the file as it is; InputError if it is not there, or another than the one that was meant."""
    path, _, wanted = plugin.partition(_SHA)
    if not wanted:
        return f"{path}{_SHA}{hashlib.sha256(_read(path, source)).hexdigest()}"
    _find(path, wanted, source)
    return plugin


def load_plugin(plugin: str) -> ModuleType:
    """The module of FILE#sha256=HEX, which `pinned` gave; InputError names the line where it fails."""
    path, _, wanted = plugin.partition(_SHA)
    name = f"mbcnet_plugin_{wanted[:16]}"
    if name in sys.modules:  # its classes stay the same for all who load it
        return sys.modules[name]
    path, text = _find(path, wanted, path)
    module = ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(text, path, "exec"), module.__dict__)
    except Exception as error:  # whatever the user's code raises
        del sys.modules[name]
        line, trace = getattr(error, "lineno", 0), error.__traceback__
        while trace is not None:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == path else line
            trace = trace.tb_next
        raise InputError(f"{path}, line {line}: {type(error).__name__}: {first_line(error)}; fix the plug-in") from None
    return module


def write_plugins(folder: Path, plugins: Iterable[str]) -> None:
    """Keep the texts of FILE#sha256=HEX in FOLDER/plugins, which is not made where there are none."""
    for plugin in plugins:
        path, _, wanted = plugin.partition(_SHA)
        (folder / PLUGINS).mkdir(exist_ok=True)
        (folder / PLUGINS / Path(path).name).write_bytes(_find(path, wanted, path)[1])


def offered(modules: list[ModuleType], kind: type) -> Iterator[Any]:
    """The objects of a class that modules define or import, each once."""
    seen: set[int] = set()
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, kind) and id(value) not in seen:
                seen.add(id(value))
                yield value


def _read(path: str, source: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{source}: plugins: {path}: cannot be read ({error.strerror}); check the path") from None


def _find(path: str, wanted: str, source: str) -> tuple[str, bytes]:
    """The file of these bytes: at its path, or one of those that the environment names."""
    for candidate in (path, *os.environ.get(ALSO, "").split(os.pathsep)):
        if candidate and Path(candidate).is_file():
            text = Path(candidate).read_bytes()
            if hashlib.sha256(text).hexdigest() == wanted:
                return candidate, text
    why = "is another version" if Path(path).is_file() else "is not there"
    own = Path(source).parent / PLUGINS / Path(path).name
    kept = own if own.is_file() else "FILE"
    raise InputError(
        f"{source}: plugins: {path} {why}, wanted SHA-256 {wanted[:12]}...; put that one back, or read its code and let it be used by "
        f"{ALSO}={kept}"
    )

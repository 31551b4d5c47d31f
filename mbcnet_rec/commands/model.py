"""`mbcnet model new NAME`: write the skeleton of a model of your own, and its test."""

import argparse
import keyword
from importlib.resources import files
from pathlib import Path
from string import Template

from data.errors import InputError
from data.whole_folder import write_whole

TEMPLATES = {"model.txt": "{}.py", "model_test.txt": "test_{}.py"}


def new(args: argparse.Namespace) -> int:
    """Write the skeleton of a model of your own, and its test."""
    name = args.name
    if not name.isidentifier() or keyword.iskeyword(name) or not name.islower():
        raise InputError(f"NAME {name!r}: wanted a word of small letters, digits and _, such as gdcn; change it")
    paths = {template: Path(path.format(name)) for template, path in TEMPLATES.items()}
    if taken := [path for path in paths.values() if path.exists()]:
        raise InputError(f"{taken[0]}: exists already; choose another name, or move it away")
    title = "".join(part.capitalize() for part in name.split("_"))
    for template, path in paths.items():
        text = files("mbcnet_rec").joinpath("templates", template).read_text(encoding="utf-8")
        write_whole(path, Template(text).substitute(name=name, title=title))
    print(f"wrote {' and '.join(map(str, paths.values()))}")
    print(f"next: python -m pytest test_{name}.py")
    print(f"      mbcnet train --config run.toml --plugin {name}.py --set model.kind={name}")
    return 0

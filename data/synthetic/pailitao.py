"""The Pailitao-like schema: 192 fields, 2,780 dims, the seven EFGC groups of the paper's Table 1, as shipped in data/schemas.

The paper names some fields and gives the totals (Tables 1 and 2); the rest is what an image-to-product search would log, chosen so
that the totals hold: 416 for the grouped fields, 44 numbers, 75 fields of 16 and 35 of 32.
"""

from pathlib import Path
from typing import Literal

from data.schema import Schema, load_schema

Scale = Literal["paper", "demo"]

FOLDER = Path(__file__).parents[1] / "schemas"
FILES: dict[Scale, Path] = {"paper": FOLDER / "pailitao.toml", "demo": FOLDER / "pailitao_demo.toml"}


def pailitao_schema(scale: Scale) -> Schema:
    """Load the 192-field schema: with the paper's dims and true numbers of users and items (12 months), or narrow with small tables."""
    return load_schema(FILES[scale])

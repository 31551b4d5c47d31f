"""What a field, a table and a group are: TOML in, checked."""

from .feature import FIRST_VOCABULARY_ROW, FIT, MISSING_ROW, OUT_OF_VOCABULARY_ROW, Feature
from .schema import Schema, Table, Zch, format_schema, load_schema, parse_schema, schema_to_toml

__all__ = ["FIRST_VOCABULARY_ROW", "FIT", "MISSING_ROW", "OUT_OF_VOCABULARY_ROW", "Feature"]
__all__ += ["Schema", "Table", "Zch", "format_schema", "load_schema", "parse_schema", "schema_to_toml"]

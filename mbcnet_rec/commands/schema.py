"""`mbcnet schema`: look at a schema."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add the commands."""
    parser = subparsers.add_parser("schema", help="look at a schema, or infer one", description=__doc__)
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=type(parser))
    show = actions.add_parser("show", help="print a schema as a table", description=_show.__doc__)
    show.add_argument("path", metavar="FILE")
    show.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> int:
    """Print fields, tables and groups."""
    from data.schema import load_schema

    schema = load_schema(args.path)
    print(f"{schema.name}: {len(schema.features)} fields, {schema.width} dims, label {schema.label}")
    for feature in schema.features:
        table = schema.table_of.get(feature.name)
        sizes = (
            f"{table.num_embeddings:>14,} x {table.embedding_dim}"
            if table
            else f"{feature.dense_width:>14} dense"
        )
        print(f"  {feature.name:<40} {feature.kind:<22} {sizes}")
    return 0

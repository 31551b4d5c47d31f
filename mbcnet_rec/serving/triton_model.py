"""The model.py of an artifact in a model repository of NVIDIA Triton, for its Python backend: `mbcnet export --triton` copies it.

A row is one JSON object, {column: value}, null where a value is missing. Rows of all requests that Triton hands over together share one pass.
"""

# pyright: reportMissingImports=false

import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

sys.path.insert(0, str(Path(__file__).parent))
import mbcnet_serving


class TritonPythonModel:
    """What the backend calls."""

    def initialize(self, _: dict[str, str]) -> None:
        """Load the artifact beside this file; it maps the tables, so instances share them."""
        self.model = mbcnet_serving.load(Path(__file__).parent)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with the probabilities of its rows, or with what is wrong with one."""
        given = [triton.get_input_tensor_by_name(each, "ROW").as_numpy().reshape(-1) for each in requests]
        try:
            scores = np.split(self._probabilities([*chain(*given)]), np.cumsum([len(each) for each in given])[:-1])
            rows = [each.reshape(len(each), -1) for each in scores]
            return [triton.InferenceResponse([triton.Tensor("PROBABILITY", each)]) for each in rows]
        except ValueError as error:
            if len(requests) > 1:  # whose it is shows when each is scored alone
                return [answer for each in requests for answer in self.execute([each])]
            return [triton.InferenceResponse([], triton.TritonError(str(error)))]

    def _probabilities(self, texts: list[bytes]) -> np.ndarray:
        rows = [json.loads(each) for each in texts]
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or row.keys() != rows[0].keys():
                raise ValueError(
                    f"request: row {number}: wanted an object of the same columns as row 0, null where a value is missing"
                )
        return self.model.predict({name: [row[name] for row in rows] for name in rows[0]})

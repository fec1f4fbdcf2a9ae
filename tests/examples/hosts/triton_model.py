"""What Triton's ONNX Runtime backend does with a batch, for its Python backend, the one that PyPI carries."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as triton  # type: ignore[import-not-found,unused-ignore]


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._session = ort.InferenceSession(Path(args["model_repository"]) / args["model_version"] / "model.onnx")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Ragged inputs go end to end, the others one below the other; rows go back to their requests."""
        prompts, counts = (
            [triton.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in ("prompt_ids", "max_new_ids")
        )
        feeds = {
            "prompt_ids": np.concatenate([ids.ravel() for ids in prompts]),
            "prompt_lengths": np.array([ids.shape[1] for ids in prompts for _ in ids], np.int32),
            "max_new_ids": np.concatenate(counts),
        }
        (new_ids,) = self._session.run(None, feeds)
        ends = np.cumsum([len(ids) for ids in prompts])[:-1]
        return [
            triton.InferenceResponse([triton.Tensor("new_ids", np.ascontiguousarray(rows))])
            for rows in np.split(new_ids, ends)
        ]

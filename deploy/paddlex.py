"""Let PaddleX 3 open exported networks: importing this module registers every network of the suite.

``python -m deploy.paddlex`` is the command ``paddlex`` with them, for example to serve a pipeline.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")  # networks are local: ask no model hoster

from paddlex.inference.models.bindings import register_predictor_binding_map
from paddlex.inference.models.image_classification import ClasPredictor

from models import list_models


class Predictor(ClasPredictor):
    """PaddleX's classifier; in 3.7.2 each image's ``class_ids`` are those of the batch, on which serving fails."""

    def process(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        result = super().process(*args, **kwargs)
        return {**result, "class_ids": result["class_ids"].tolist()}


register_predictor_binding_map(Predictor, {"paddle_static": list_models(), "onnxruntime": list_models()})

if __name__ == "__main__":
    from paddlex.__main__ import console_entry

    console_entry()

"""The networks of the suite. Importing a module of this folder registers its paper's variants."""

import importlib
import pkgutil

from models.registry import ModelInfo, Variant, create_model, list_models, model_info

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"models.{_module.name}")

__all__ = ["ModelInfo", "Variant", "create_model", "list_models", "model_info"]

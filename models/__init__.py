"""The networks of the suite; importing a paper's module enters its variants into the registry."""

from models import coatnet, coatnet_simple, convmixer, dfformer, iformer, mobileformer, mobileformer_pvit, poolformer
from models.registry import ModelInfo, Variant, create_model, list_models, model_info

__all__ = ["ModelInfo", "Variant", "coatnet", "coatnet_simple", "convmixer", "create_model", "dfformer", "iformer",
           "list_models", "mobileformer", "mobileformer_pvit", "model_info", "poolformer"]

"""Weights: read files of any origin safely, load them into networks, and find the released ones."""

__all__ = ["load_weights", "save_weights"]


def __getattr__(name: str) -> object:
    """Import `load_weights` and `save_weights`, and numpy with them, when they are used: not for a tool's --help."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from engine.weights import state_dict

    return getattr(state_dict, name)

"""Networks for ``paddle.hub``: ``paddle.hub.load(FOLDER, "iformer_cifar", source="local", pretrained=True)``."""

import sys as _sys
from pathlib import Path as _Path

dependencies = ["paddle", "numpy", "cv2", "safetensors", "yacs", "yaml"]
_sys.path.insert(0, str(_Path(__file__).resolve().parent))  # paddle.hub takes it off the path again


def _entry(name):
    from configs.load import load_config, to_plain
    from engine import released
    from engine.weights import load_weights
    from errors import UserError
    from models import create_model, list_models, model_info

    folder = released.folder_of(name)

    def build(pretrained=False, **arguments):
        if pretrained and not folder:
            known = ", ".join(released.released_names())
            raise UserError(f"{name} has no released weights; pretrained=True is for {known}")
        network = name
        if folder:
            released.check_released(folder)
            config = load_config(folder / released.CONFIG)
            network = config.MODEL.NAME
            arguments = {"num_classes": config.MODEL.NUM_CLASSES, **to_plain(config.MODEL.ARGS),
                         "image_size": config.DATA.IMAGE_SIZE, **arguments}
        model = create_model(network, **arguments)
        if pretrained:
            load_weights(model, folder / released.WEIGHTS)
        model.eval()
        return model

    info = model_info(name) if name in list_models() else None
    what = f"{info.family} ({info.paper_url})." if info else f"The network of checkpoints/{name}."
    build.__name__ = name
    build.__doc__ = f"""{what}

    Images float32 ``[B, 3, H, W]`` to logits ``[B, num_classes]``, in evaluation mode.

    Args:
        pretrained: load the released weights; {"their config sets the defaults" if folder else "there are none"}.
        **arguments: ``num_classes``, ``image_size`` and others of ``models.create_model``.
    """
    return build


def _entries():
    from engine.released import released_names
    from models import list_models

    return {name: _entry(name) for name in {*list_models(), *released_names()}}


globals().update(_entries())

"""A Gradio page: an image in, the likeliest classes and an explanation out."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from analysis.explain.image_model import ImageModel
from analysis.explain.methods import METHODS, Explanation, explain
from analysis.explain.sheet import SIGNED, UNSIGNED
from configs.load import load_config
from datasets.files import read_image
from deploy.engines import require
from engine import released
from engine.model import load_model
from errors import UserError

TEXTS = {
    "en": {"network": "Network", "examples": "Examples",
           "method": "Explanation", "none": "none", "run": "Classify", "classes": "Five likeliest classes",
           "overlay": "What speaks for the first class", "no_image": "Choose an image."},
    "zh-CN": {"network": "网络", "examples": "示例", "method": "解释方法",
              "none": "无", "run": "分类", "classes": "最可能的五个类别", "overlay": "支持第一类别的区域",
              "no_image": "请选择图像。"},
}
TITLE = "Image classification · 图像分类"
EXAMPLES = Path(__file__).parent / "examples"
LIME_SAMPLES = 1000
SIDE = 320  # pixels of the overlay
MAX_UPLOAD = "64mb"
_LOCK = threading.Lock()  # one network at a time


def build(names: Sequence[str] = (), folder: Path = Path("output/demo")) -> Any:
    """Return the page, a ``gradio.Blocks``, with the released checkpoints ``names`` before all others.

    Uploads go into ``folder``; nothing else is written. Raises UserError for an unknown name, or without Gradio.
    """
    require("gradio")
    known = released.released_names()
    for name in names:
        if name not in known:
            raise released.unknown_weights(name)
    os.environ["GRADIO_TEMP_DIR"] = str(folder.resolve() / "uploads")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    text = gr.I18n(**TEXTS)

    def classify(name: str, path: str | None, method: str) -> tuple[dict[str, float], Image.Image | None]:
        if path is None:
            raise gr.Error(_both("no_image"), duration=None)
        try:
            with _LOCK:
                return classified(name, Path(path), method)
        except UserError as error:
            reason = str(error).replace(str(Path(path).parent) + os.sep, "")
            raise gr.Error(f"{reason}. {_both('no_image')}", duration=None) from error

    names = [*names, *(name for name in known if name not in names)]
    with gr.Blocks(title=TITLE, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# {TITLE}")
        with gr.Row():
            with gr.Column(min_width=280):
                network = gr.Dropdown(names, value=names[0], label=text("network"), elem_id="network")
                image = gr.Image(label="Image · 图像", sources=["upload", "clipboard"], height=240, elem_id="image")
                image.preprocess = lambda payload: payload.path if payload else None  # read_image checks the file
                gr.Examples([[str(path)] for path in sorted(EXAMPLES.glob("*.png"))], [image], label=text("examples"),
                            cache_examples=False)
                method = gr.Radio([(text("none"), ""), *((METHODS[key].title, key) for key in ("gradcam", "lime"))],
                                  value="gradcam", label=text("method"), elem_id="method")
                button = gr.Button(text("run"), variant="primary", elem_id="run")
            with gr.Column(min_width=280):
                classes = gr.Label(label=text("classes"), num_top_classes=5, elem_id="classes")
                overlay = gr.Image(label=text("overlay"), format="png", height=SIDE + 40, elem_id="overlay",
                                   buttons=["download", "fullscreen"])
        button.click(classify, [network, image, method], [classes, overlay], concurrency_limit=1)
    return page


def launch(page: Any, host: str | None = None, port: int | None = None) -> None:
    """Serve the page until it is stopped; fonts are the reader's own, and nothing outside is asked for.

    Host and port are GRADIO_SERVER_NAME and GRADIO_SERVER_PORT where not given, else 127.0.0.1 and the first free port
    from 7860.
    """
    import gradio as gr

    page.launch(server_name=host, server_port=port, i18n=gr.I18n(**TEXTS), theme=gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["monospace"]), ssr_mode=False, share=False, show_error=True,
        max_file_size=MAX_UPLOAD, footer_links=["settings"])


@cache
def image_model(name: str) -> ImageModel:
    """Return a released network as explanations take it."""
    folder = released.folder_of(name)
    released.check_released(folder)
    config = load_config(folder / released.CONFIG, ["RUNTIME.DEVICE=cpu"])
    return ImageModel(config, load_model(config, name)[0])


def classified(name: str, path: Path, method: str) -> tuple[dict[str, float], Image.Image | None]:
    """Return the probability of each class of an image file, and the map of the first class over the image."""
    model = image_model(name)
    image = model.prepare(read_image(path))
    found = explain(model, image, method, num_samples=LIME_SAMPLES) if method else None
    probabilities = model.probabilities_of(image) if found is None else found.probabilities
    scores = {model.class_name(index): float(value) for index, value in enumerate(probabilities)}
    return scores, found and drawn(found)


def drawn(found: Explanation) -> Image.Image:
    """Return an explanation of the predicted class over the grey image."""
    heat, signed = found.maps[0], METHODS[found.method].signed
    largest = float(np.abs(heat).max()) or 1.0
    colours = SIGNED((heat / largest + 1) / 2) if signed else UNSIGNED(heat / largest)  # RGBA
    grey = (found.image / 255 @ (0.299, 0.587, 0.114))[..., None]
    blended = colours[..., :3] * colours[..., 3:] + grey * (1 - colours[..., 3:])
    return Image.fromarray((255 * blended).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def _both(key: str) -> str:
    return " ".join(texts[key] for texts in TEXTS.values())

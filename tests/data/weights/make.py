"""Write the PyTorch files of this folder (needs PyTorch and safetensors; the tests need only the files).

Every tensor but the optimizer's is ``(arange(n) - n // 3) / 8`` in its shape, exact in every floating type used.
Run as ``python make.py``; the files here were written by PyTorch 2.13 on Python 3.11.
"""

import argparse
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent


def rule(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = int(np.prod(shape))
    values = torch.arange(count, dtype=torch.float64) - count // 3
    if dtype == torch.bool:
        return (values > 0).reshape(shape)
    if not dtype.is_floating_point and not dtype.is_complex:
        return (values % 8).reshape(shape).to(dtype)
    return (values / 8).reshape(shape).to(dtype)


def every_kind() -> OrderedDict[str, torch.Tensor]:
    state = OrderedDict()
    for name in ("float16", "bfloat16", "float32", "float64", "complex64", "int8", "int16", "int32", "int64", "uint8",
                 "bool"):
        state[f"kind.{name}"] = rule(3, 4, dtype=getattr(torch, name))
    state["transposed"] = rule(3, 4).t()
    state["permuted"] = rule(2, 3, 4, dtype=torch.bfloat16).permute(2, 0, 1)
    state["every_second"] = rule(5, 6)[1::2, 1::2]
    shared = rule(6, 2)
    state["shared.a"], state["shared.b"], state["shared.same"] = shared[:3], shared[3:], shared[:3]
    state["number"] = rule(1).reshape([])
    state["empty"] = rule(0, 3)
    return state


def network(prefix: str = "", shift: float = 0.0) -> OrderedDict[str, torch.Tensor]:
    """Return the state of Linear(3, 4), BatchNorm1d(4), Linear(4, 5)."""
    shapes = {"0.weight": (4, 3), "0.bias": (4,), "1.weight": (4,), "1.bias": (4,), "1.running_mean": (4,),
              "1.running_var": (4,), "2.weight": (5, 4), "2.bias": (5,)}
    state = OrderedDict((prefix + name, rule(*shape) + shift) for name, shape in shapes.items())
    state[prefix + "1.num_batches_tracked"] = torch.tensor(7)
    return state


def training_checkpoint() -> dict:
    """Return what timm's saver keeps beside the weights, and a little of what others do."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    arguments = argparse.Namespace(lr=1e-3, device=torch.device("cpu"), dtype=torch.float16, size=torch.Size([3, 8]),
                                   output=Path("output"), tags={"a", "b"}, betas=(0.9, 0.999), classes=Counter("aab"))
    return {"epoch": 3, "arch": "net", "version": 2, "metric": np.float64(71.25), "args": arguments,
            "state_dict": network("module."), "state_dict_ema": network("module.", shift=1.0),
            "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
            "amp_scaler": {"scale": 65536.0, "_growth_tracker": 0}}


if __name__ == "__main__":
    legacy = {"_use_new_zipfile_serialization": False}
    torch.save(every_kind(), HERE / "kinds_zip.pth")
    torch.save(every_kind(), HERE / "kinds_legacy.pth", **legacy)
    torch.save(training_checkpoint(), HERE / "timm_zip.pth.tar")
    torch.save(training_checkpoint(), HERE / "timm_legacy.pth.tar", **legacy)
    torch.save({"model": {"state_dict": network("_orig_mod.module.")}}, HERE / "compiled.pt", pickle_protocol=4)
    torch.save(torch.nn.Linear(3, 2), HERE / "whole_model.pt")
    torch.save({"weight": torch.nn.Parameter(rule(2, 3))}, HERE / "parameter.pt")
    save_file({name: value.contiguous().clone() for name, value in every_kind().items()},
              HERE / "kinds.safetensors", metadata={"format": "pt"})

"""What the ranks of the parts `trainer` and `parity` run, under torchrun."""

from __future__ import annotations

from typing import Any


def stage(engine: bool, **arguments: Any) -> list[dict[str, float]]:
    """tests.megatron.gpu_cases.stage with Transformer Engine's layers or without them.

    Weights are drawn on the device: for a figure of speed they need not be the same in every
    layout, and drawing billions of them on a CPU would take most of the time there is.
    """
    from megatron.core.models.gpt import gpt_layer_specs

    from lopd.megatron.training import trainer
    from tests.megatron.gpu_cases import stage as run

    if not engine:
        gpt_layer_specs.HAVE_TE = False  # lopd asks this flag which layers to build
    trainer.init_random = draw_on_device
    return run(**arguments)


def draw_on_device(model: Any, arch: Any, *, std: float, seed: int) -> None:
    """Matrices normal with this deviation, vectors (the norms' weights) ones."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std)
            else:
                parameter.fill_(1.0)


def parity(engine: bool, **arguments: Any) -> dict[str, float]:
    """tests.megatron.gpu_cases.parity with Transformer Engine's layers or without them."""
    from megatron.core.models.gpt import gpt_layer_specs

    from tests.megatron.gpu_cases import parity as run

    if not engine:
        gpt_layer_specs.HAVE_TE = False
    return run(**arguments)


def engine_obstacle() -> str:
    """Why Transformer Engine cannot be used here; empty where it can."""
    try:
        import transformer_engine.pytorch  # noqa: F401
        from megatron.core.models.gpt import gpt_layer_specs
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "" if gpt_layer_specs.HAVE_TE else "Megatron-Core does not find it"

"""Bodies for tests.megatron.launch.run_ranks with a stand-in for Transformer Engine on the path
(stand_in_engine), which Megatron-Core then finds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

LAYOUTS = {"tensor and expert": {"tensor": 2, "expert": 2}, "expert tensor": {"expert_tensor": 2}}


def two_ranks(moe: str, dense: str, biased: str, folder: str) -> dict[str, Any]:
    import megatron.core.optimizer as optimizers

    from lopd.megatron.model import engine
    from lopd.megatron.ranks import parallel
    from lopd.megatron.training import wrapping
    from megatron_patches import layer_spec
    from tests.megatron import context_cases
    from tests.megatron.parity_cases import Case, difference, load_model
    from tests.megatron.trainer_cases import settings_of, train, trainer_of

    result: dict[str, Any] = {
        "found": bool(layer_spec.gpt_layer_specs.HAVE_TE),
        "used without a GPU": layer_spec.has_transformer_engine(),
    }
    # As with a GPU and bfloat16, but in float32, so that differences show.
    engine.uses_engine = lambda dtype: True
    case = Case(Path(moe))
    for name, layout in LAYOUTS.items():
        model = load_model(case, {"ranks": 2, **layout})
        result[name] = {
            "difference": difference(model, case),
            "names": sorted(name for name, _ in model.named_parameters()),
        }
        result[name]["changed"] = _changed(model, case)
    for name, other in (("dense", Case(Path(dense))), ("biased", Case(Path(biased)))):
        model = load_model(other, {"ranks": 2, "tensor": 2})
        result[name] = {
            "difference": difference(model, other),
            "names": sorted(name for name, _ in model.named_parameters()),
            "changed": _changed(model, other),
        }
    result["one expert wrong"] = difference(
        _swapped(load_model(case, {"ranks": 2, "expert": 2})), case
    )
    both = LAYOUTS["tensor and expert"]
    result["optimizer"] = type(
        trainer_of(moe, settings_of(both)).optimizer.megatron.chained_optimizers[0].optimizer
    ).__name__
    result["training"] = train(trainer_of(moe, settings_of(both)))
    mark = wrapping.mark_experts
    wrapping.mark_experts = _mark_for_reduction_alone
    result["experts unmarked"] = train(trainer_of(moe, settings_of(both)), 1)
    wrapping.mark_experts = mark
    result["pipeline"] = train(trainer_of(moe, settings_of({"pipeline": 2})))
    result["context"] = context_cases.two_ranks(moe)
    result["adapters"] = _adapters(moe, biased)
    result["recomputed"] = train(trainer_of(moe, settings_of(both, recompute="full")))
    result["resumed"] = _resumed(moe, folder)
    result["precise"] = _precise(moe, folder)
    engine.uses_engine = lambda dtype: False
    optimizers.Adam = torch.optim.AdamW
    optimizers.USING_PYTORCH_OPTIMIZER = True
    result["local training"] = train(trainer_of(moe, settings_of(both)))
    result["local adapters"] = _adapters(moe, biased)
    result["refused"] = _refused(moe, folder)
    parallel.shutdown()
    return result


def _adapters(moe: str, biased: str) -> dict[str, Any]:
    """Trainings of adapters, on the layers that are chosen now: experts, and a norm that is fused
    with the layers behind it.
    """
    from tests.megatron.trainer_cases import settings_of, train, trainer_of

    results: dict[str, Any] = {}
    for name, model in (("moe", moe), ("biased", biased)):
        layout = LAYOUTS["tensor and expert"] if name == "moe" else {"tensor": 2}
        trainer = trainer_of(model, settings_of(layout, lora={"rank": 4, "alpha": 8.0}))
        results[name] = {**train(trainer), "adapters": len(dict(trainer.export_adapters()))}
    return results


def _mark_for_reduction_alone(module: Any) -> None:
    """Control: experts as Transformer Engine and Megatron-Core leave them for the gradient norm."""
    for name, parameter in module.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False


def _changed(model: Any, case: Any) -> list[str]:
    """Names whose bits are not those of the checkpoint, after a way there and back."""
    from lopd.megatron.ranks import parallel
    from lopd.megatron.weights.transfer import export_hf

    exported = dict(
        pair for bucket in export_hf(model, case.arch, bucket_bytes=40_000) for pair in bucket
    )
    if parallel.rank() != 0:
        return []
    expected = load_file(case.folder / "model.safetensors")
    same = {
        name
        for name in exported.keys() & expected.keys()
        if torch.equal(exported[name], expected[name])
    }
    return sorted((exported.keys() | expected.keys()) - same)


def _swapped(model: Any) -> Any:
    """Control: on each rank two experts change places."""
    with torch.no_grad():
        grouped = model.decoder.layers[0].mlp.experts.linear_fc1
        first = grouped.weight0.clone()
        second = grouped.weight1.clone()
        grouped.weight0.copy_(second)
        grouped.weight1.copy_(first)
    return model


def _resumed(moe: str, folder: str) -> dict[str, Any]:
    from tests.megatron.trainer_cases import microbatches_of, settings_of, train, trainer_of

    settings = settings_of(LAYOUTS["tensor and expert"], num_steps=3)
    first = trainer_of(moe, settings, checkpoints=folder)
    first.train_step(microbatches_of(0))
    first.save_checkpoint({})
    resumed = trainer_of(moe, settings, checkpoints=folder)
    resumed.resume()
    return {"unbroken": train(first, 3), "resumed": train(resumed, 3)}


PRECISE: dict[str, dict[str, Any]] = {  # how FusedAdam keeps the float32 weights and the moments
    "float32": {"store_param_remainders": False},
    "whole": {"store_param_remainders": False},
    "remainders": {"store_param_remainders": True},
    "moments of 16 bits": {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"},
}


def _precise(moe: str, folder: str) -> dict[str, Any]:
    """Trainings in bfloat16 whose FusedAdam keeps the weights, saved, gone on with, and gone on
    with otherwise.
    """
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import optimizer_config

    from lopd.megatron.model import overrides
    from tests.megatron.trainer_cases import settings_of, train, trainer_of, weights_digest

    overrides._refuse_missing_hardware = lambda table, where: None  # there is no GPU here
    newest = optimizer_config.is_te_min_version
    optimizer_config.is_te_min_version = optimizers.is_te_min_version = lambda *_, **__: True

    def settings(table: dict[str, Any]) -> Any:
        return settings_of({"expert": 2}, dtype=dtype, megatron=table)

    found: dict[str, Any] = {}
    for name, kept in PRECISE.items():
        dtype = "float32" if name == "float32" else "bfloat16"
        table = {"use_precision_aware_optimizer": True, **kept}
        path = f"{folder}/precise-{name.replace(' ', '-')}"
        unbroken = trainer_of(moe, settings(table))
        found[name] = {"unbroken": train(unbroken)["loss"], "weights": [weights_digest(unbroken)]}
        first = trainer_of(moe, settings(table), checkpoints=path)
        train(first, 3)
        first.save_checkpoint({})
        inner = first.optimizer.megatron.chained_optimizers[0].optimizer
        state = next(iter(inner.state.values()))
        found[name]["types"] = sorted({str(tensor.dtype) for tensor in state.values()})
        second = trainer_of(moe, settings(table), checkpoints=path)
        second.resume()
        found[name]["resumed"] = train(second)["loss"]
        found[name]["weights"].append(weights_digest(second))
        plain = trainer_of(moe, settings({}), checkpoints=path)  # Megatron keeps the weights
        plain.resume()
        found[name]["by Megatron"] = train(plain)["loss"]
    optimizer_config.is_te_min_version = optimizers.is_te_min_version = newest
    chained = first.optimizer.megatron.chained_optimizers[0]
    chained.optimizer.state.clear()
    try:
        chained.init_state_fn(chained.optimizer, chained.config)
    except TypeError as error:
        found["Megatron's own"] = str(error)
    return found


def _refused(moe: str, folder: str) -> str:
    """A checkpoint of the other layers."""
    from tests.megatron.trainer_cases import refused, settings_of, trainer_of

    trainer = trainer_of(
        moe, settings_of(LAYOUTS["tensor and expert"], num_steps=3), checkpoints=folder
    )
    return refused(trainer.resume)

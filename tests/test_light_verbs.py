"""Verbs that compute nothing import nothing heavy, and what stands in for it says the same."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lopd import devices
from lopd.deferred import deferred
from lopd.tasks.light_tokenizer import LightTokenizer, light_tokenizer
from lopd.tasks.tokenizer import load_tokenizer, stop_token_ids

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples/tiny_moe.toml"
MODEL = ROOT / "examples/tiny_models/teacher"
# What takes a second or more to import.
HEAVY = {"torch", "transformers", "sglang", "megatron", "matplotlib", "tensorboard", "triton"}
# What the light verbs need none of either. check and status read Parquet and arrays.
ARRAYS = {"numpy", "pyarrow", "aiohttp", "httpx"}
# What each verb may not import.
FORBIDDEN = {
    ("--help",): HEAVY | ARRAYS,
    ("knobs", "--all"): HEAVY | ARRAYS,
    ("knobs", "--changed", str(EXAMPLE)): HEAVY | ARRAYS,
    ("check", "--help"): HEAVY | ARRAYS,
    ("status", str(EXAMPLE)): HEAVY,
    ("check", str(EXAMPLE)): HEAVY,
    ("plan", str(EXAMPLE)): HEAVY,
    ("doctor", str(EXAMPLE)): HEAVY,
}


def modules_of(arguments: Sequence[str], tmp_path: Path, *, before: str = "") -> set[str]:
    """Return the top-level modules that are in memory when a command has ended."""
    code = f"""
import sys
{before}
from lopd.cli import main
sys.argv = ["lopd", *{list(arguments)!r}]
try:
    main()
except SystemExit:
    pass
sys.stderr.write("MODULES " + " ".join({{name.partition(".")[0] for name in sys.modules}}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return set(done.stderr.rpartition("MODULES ")[2].split())


@pytest.mark.parametrize("arguments", FORBIDDEN, ids=lambda given: " ".join(given)[:20])
def test_a_verb_imports_nothing_that_it_does_not_need(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    loaded = modules_of(arguments, tmp_path)
    assert {"typer", "pydantic"} <= loaded, "what is imported is seen"
    assert not loaded & FORBIDDEN[arguments]


def test_what_is_imported_all_the_same_is_seen(tmp_path: Path) -> None:
    """The control: one import of something heavy is enough."""
    assert modules_of(("--help",), tmp_path, before="import matplotlib") & HEAVY == {"matplotlib"}


def test_a_deferred_module_is_the_module() -> None:
    stand_in = deferred("json")
    assert stand_in.dumps is json.dumps
    with pytest.raises(AttributeError):
        _ = stand_in.absent


def test_devices_are_those_of_torch() -> None:
    import torch

    assert devices.torch_cuda() == torch.version.cuda
    assert devices.num_gpus() == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


# ---- the tokenizer of the checks ----

CHAT = [
    {"role": "user", "content": "81+06+02=?"},
    {"role": "assistant", "content": "81;87;89"},
    {"role": "user", "content": "2*3=?"},
]
# Loops with break, whitespace control, JSON, a special token by its name, a clock, and a switch.
TEMPLATE = """{%- for message in messages %}
{%- if loop.index > 5 %}{% break %}{% endif %}
{{- '<' + message['role'] + '>' + (message | tojson) }}
{% endfor %}
{% if enable_thinking %}!{% endif %}{{ eos_token }}{{ strftime_now('%Y') }}
{% if add_generation_prompt %}={% endif %}"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["its own", "all that templates do"])
def test_checks_see_what_transformers_sees(folder: Path, template: str | None) -> None:
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        # Every byte is a token, since the model's own tokenizer knows few letters.
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {letter: index for index, letter in enumerate([*letters, "<|im_end|>"])}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(folder / "tokenizer.json"))
    light = light_tokenizer(folder)
    assert isinstance(light, LightTokenizer), "the control: transformers was not asked"
    whole = load_tokenizer(folder)
    assert len(light) == len(whole)
    assert light.eos_token_id == whole.eos_token_id
    assert stop_token_ids(folder, light) == stop_token_ids(folder, whole)
    clock = datetime.datetime(2031, 5, 6).strftime
    rendered = set()
    for thinking in (True, False):
        ids = [
            one.apply_chat_template(
                [CHAT],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                enable_thinking=thinking,
                strftime_now=clock,
            )[0]
            for one in (light, whole)
        ]
        assert ids[0] == ids[1]
        assert light.decode(ids[0]) == whole.decode(ids[1], skip_special_tokens=False)
        rendered.add(tuple(ids[0]))
    assert len(rendered) == (1 if template is None else 2), "the control: the switch is seen"


def test_tokens_that_only_the_configuration_has_are_counted(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**about, "pad_token": "<|new|>"}), encoding="utf-8")
    light = light_tokenizer(folder)
    assert isinstance(light, LightTokenizer)
    assert len(light) == len(load_tokenizer(folder)) == 33


@pytest.mark.parametrize(
    "change", [{"auto_map": {}}, {"tokenizer_class": "LlamaTokenizer"}], ids=["code", "class"]
)
def test_an_unusual_folder_is_left_to_transformers(
    folder: Path, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr("lopd.tasks.light_tokenizer.load_tokenizer", asked.append)
    path = folder / "tokenizer_config.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**about, **change}), encoding="utf-8")
    light_tokenizer(folder)
    assert asked == [folder]
